"""Runs told to TensorBoard, MLflow or Weights & Biases as they happen; each comes with its extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from prfl.config import ConfigError, plain
from prfl.specs import unknown
from prfl.tally import Tally


class Sink(Protocol):
    """Hears every event with what the run adds up to, then how it ended; None: it did not come to an end."""

    def __call__(self, event: Mapping[str, Any], tally: Tally) -> None: ...

    def close(self, summary: Mapping[str, Any] | None) -> None: ...


def scalars(event: Mapping[str, Any], tally: Tally) -> dict[str, float]:
    """What an event tells a sink, by name: scores and sums at an evaluation, updates and coverage at a merge."""
    kind = event["kind"]
    if kind == "merge":
        return {f"merge/{k}": float(v) for k, v in event.items() if k in ("updates", "coverage")}
    if kind != "evaluation":
        return {}
    scores = {k: v for k, v in event.items() if k not in ("kind", "at", "version", "wall") and v is not None}
    return {
        **{k.replace("_", "/", 1): float(v) for k, v in scores.items()},
        "cost/seconds": tally.at,
        "cost/bytes_down": float(tally.bytes_down),
        "cost/bytes_up": float(tally.bytes_up),
        "run/updates": float(tally.updates),
        "run/failed": float(tally.failed),
        "run/staleness": tally.staleness,
        **{f"density/{name}": density for name, density in tally.density.items()},
    }


class tensorboard:
    """Event files in `tensorboard/` of the run folder. A step is a version, and wall time is the run's own."""

    def __init__(self, folder: Path, experiment: Mapping[str, Any]):
        self._open: Callable[..., Any] = _needed("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self._folder, self._writer = folder / "tensorboard", cast(Any, None)

    def __call__(self, event: Mapping[str, Any], tally: Tally) -> None:
        if found := scalars(event, tally):
            self._writer = self._writer or self._open(str(self._folder))
            for name, value in found.items():
                self._writer.add_scalar(name, value, event["version"], walltime=event["at"])

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if self._writer is not None:
            self._writer.close()


class mlflow:
    """A run of the MLflow experiment of the same name, where MLFLOW_TRACKING_URI says or MLflow's default."""

    def __init__(self, folder: Path, experiment: Mapping[str, Any]):
        self._client = _needed("mlflow", "mlflow").MlflowClient()
        self._folder, self._experiment, self._run = folder, experiment, ""

    def __call__(self, event: Mapping[str, Any], tally: Tally) -> None:
        if not self._run:
            self._start()
        for name, value in scalars(event, tally).items():
            self._client.log_metric(self._run, name, value, int(1000 * event["at"]), event["version"])

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if self._run:
            for name, value in _numbers(summary or {}).items():
                self._client.log_metric(self._run, f"summary/{name}", value)
            self._client.set_terminated(self._run, "FAILED" if summary is None else "FINISHED")

    def _start(self) -> None:
        name = str(self._experiment["name"])
        known = self._client.get_experiment_by_name(name)
        number = known.experiment_id if known else self._client.create_experiment(name)
        self._run = self._client.create_run(number, run_name=self._folder.name).info.run_id
        for key, value in flat(self._experiment).items():
            self._client.log_param(self._run, key, value)


class wandb:
    """A run of the W&B project `prfl`; its settings are W&B's own, WANDB_MODE=offline among them."""

    def __init__(self, folder: Path, experiment: Mapping[str, Any]):
        self._init: Callable[..., Any] = _needed("wandb", "wandb").init
        self._folder, self._experiment, self._run = folder, experiment, cast(Any, None)

    def __call__(self, event: Mapping[str, Any], tally: Tally) -> None:
        if self._run is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._run = self._init(
                project="prfl", name=self._folder.name, dir=str(self._folder), config=dict(self._experiment)
            )
        if found := scalars(event, tally):
            self._run.log(found, step=event["version"])

    def close(self, summary: Mapping[str, Any] | None) -> None:
        if self._run is not None:
            self._run.summary.update(_numbers(summary or {}))
            self._run.finish(exit_code=summary is None)


TABLE: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {
    "tensorboard": tensorboard,
    "mlflow": mlflow,
    "wandb": wandb,
}


class Sinks:
    """Some of them as one, a context: without `ended` in it the run did not come to an end."""

    def __init__(self, names: Sequence[str], folder: Path, experiment: Mapping[str, Any]):
        """`experiment`: as plain data. ConfigError: there is none such, or it is not installed."""
        if odd := [name for name in names if name not in TABLE]:
            raise ConfigError(f"log: no {unknown(odd[0], TABLE)}")
        self._sinks = [TABLE[name](folder, experiment) for name in dict.fromkeys(names)]
        self._summary: Mapping[str, Any] | None = None

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *error: object) -> None:
        for sink in self._sinks:
            sink.close(self._summary)

    def __call__(self, event: Mapping[str, Any], tally: Tally) -> None:
        for sink in self._sinks:
            sink(event, tally)

    def ended(self, summary: Mapping[str, Any]) -> None:
        self._summary = summary


def flat(fields: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested fields under names with dots."""
    out: dict[str, Any] = {}
    for key, value in fields.items():
        out |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": plain(value)}
    return out


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in flat(summary).items() if isinstance(v, int | float)}


def _needed(extra: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(f"log: {extra} is not installed; pip install 'prfl[{extra}]'") from None
