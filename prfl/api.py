"""The Python door: `from prfl import run, compare`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prfl import config, report, store, traces
from prfl.config import ConfigError, Experiment, Spec
from prfl.energy import Watts

if TYPE_CHECKING:
    from sim.compare import Outcome
    from sim.pools import Place

Workers = str | int | None
"""Where clients train: in "processes" of this machine, one a core, on "ray", an actor a CPU, or "serial", in this one.

None, or how many there should be: processes, but actors on Ray where a cluster is joined or GPUs are shared out.
`ray_address`: HOST:PORT of a Ray cluster that runs already, or "auto" for this machine's; None: one of our own.
`device`: what they train on, "cpu" or "cuda"; `gpus`: with cuda, the share of a GPU that each actor takes.
"""


@dataclass(frozen=True)
class Result(Mapping[str, Any]):
    """What `summary.json` of a run holds, and the `folder` it lies in."""

    folder: Path
    summary: Mapping[str, Any] = field(repr=False)

    def __getitem__(self, key: str) -> Any:
        return self.summary[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.summary)

    def __len__(self) -> int:
        return len(self.summary)


@dataclass(frozen=True)
class Comparison:
    """Runs by method, in the order of their seeds; `failed`: what came to nothing, and why. `report`: the page."""

    folder: Path
    runs: Mapping[str, Sequence[Result]]
    failed: Mapping[str, str]
    report: Path | None


def run(
    experiment: str | Path = "default",
    changes: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    workers: Workers = None,
    ray_address: str | None = None,
    device: str = "cpu",
    gpus: float = 1.0,
    data_dir: str | Path | None = None,
) -> Result:
    """Simulate an experiment, a YAML file or the name of one that ships, with `changes` as {"method": "fedbuff"}.

    `out`: the run's folder; None: a new one in `runs/`. Raises ConfigError, a ValueError, for what can not be run, and
    KeyboardInterrupt at Ctrl-C, when the folder is complete up to there.

    >>> run("default", {"stop.versions": 1, "work.steps": 1}, workers="serial", out=folder / "one")["versions"]
    1
    """
    from sim import pools
    from sim.run import simulate

    chosen = _experiment(experiment, changes)
    folder = store.free(None if out is None else Path(out), chosen.name)
    with pools.kept(_place(workers, ray_address, device, gpus)) as pool:
        result = Result(folder, simulate(chosen, folder, pool=pool, data_dir=_path(data_dir)))
    if result["interrupted"]:
        raise KeyboardInterrupt
    return result


def compare(
    experiment: str | Path = "default",
    changes: Mapping[str, Any] | None = None,
    *,
    methods: Sequence[Spec],
    seeds: Sequence[int] = (1, 2, 3),
    out: str | Path | None = None,
    workers: Workers = None,
    ray_address: str | None = None,
    device: str = "cpu",
    gpus: float = 1.0,
    usual_pacing: bool = False,
    targets: Sequence[float] = (),
    data_dir: str | Path | None = None,
) -> Comparison:
    """Run every method with every seed, on one pool of workers, and write `report.html` and `report.md` to `out`.

    What has been run there is not run again. `usual_pacing`: each method in the pacing of its paper, not the
    experiment's. `targets`: accuracies whose cost is told. Raises ConfigError before anything is run.
    """
    from sim import compare as comparing
    from sim import pools

    chosen = _experiment(experiment, changes)
    folder = comparing.place(chosen, _path(out))
    todo = comparing.jobs(chosen, methods, seeds, folder, usual_pacing)
    with pools.kept(_place(workers, ray_address, device, gpus)) as pool:
        ended = list(comparing.run(todo, pool, _path(data_dir)))
    return gathered(ended, folder, targets)


def gathered(
    ended: Sequence[Outcome],
    folder: Path,
    targets: Sequence[float] = (),
    watts: Mapping[str, Watts] | None = None,
) -> Comparison:
    """The comparison that these jobs came to, with its report in the folder, if there is a run to report on."""
    groups: dict[str, list[traces.Trace]] = {}
    for outcome in ended:
        if outcome.summary is not None:
            groups.setdefault(outcome.job.label, []).append(traces.read(outcome.job.folder, watts))
    failed = {f"{o.job.label}, seed {o.job.experiment.seed}": o.reason for o in ended if o.summary is None}
    told = [f"Failed: {run} ({reason})." for run, reason in failed.items()]
    page = _reported(groups, ended[0].job.experiment.name, folder, targets, told) if groups else None
    runs = {label: [Result(t.folder, t.summary) for t in found] for label, found in groups.items()}
    return Comparison(folder, runs, failed, page)


def gather(
    folders: Sequence[Path], out: Path, targets: Sequence[float] = (), watts: Mapping[str, Watts] | None = None
) -> Path:
    """The report on finished runs, simulated or real, or on all below these folders. Raises ConfigError."""
    groups = traces.grouped([traces.read(folder, watts) for folder in traces.expand(folders)])
    names = {str(t.config["name"]) for found in groups.values() for t in found}
    return _reported(groups, ", ".join(sorted(names)), out, targets)


def _reported(
    groups: Mapping[str, Sequence[traces.Trace]],
    name: str,
    folder: Path,
    targets: Sequence[float],
    told: Sequence[str] = (),
) -> Path:
    """The report's page, written with what goes beside it, the summaries of all runs among it."""
    page = folder / "report.html"
    report.make(groups, _title(name, groups), targets, told).write(page)
    summaries = {label: [t.summary for t in found] for label, found in groups.items()}
    (folder / "summaries.json").write_text(json.dumps(summaries, indent=1, default=str) + "\n", encoding="utf-8")
    return page


def _title(name: str, groups: Mapping[str, Sequence[traces.Trace]]) -> str:
    return f"{name}: {' and '.join(groups) if len(groups) < 3 else f'{len(groups)} methods'}"


def _experiment(experiment: str | Path, changes: Mapping[str, Any] | None) -> Experiment:
    from sim import experiments

    overrides = [f"{key}={_yaml(value)}" for key, value in (changes or {}).items()]
    return config.load(experiments.path(str(experiment)), overrides)


def _yaml(value: Any) -> str:
    try:
        return yaml.safe_dump(config.plain(value), default_flow_style=True, width=10**9).removesuffix("...\n").strip()
    except yaml.YAMLError:
        raise ConfigError(f"{value!r} is no value of an experiment") from None


def _place(workers: Workers, address: str | None, device: str, gpus: float) -> Place:
    from sim import pools

    if workers is None or isinstance(workers, str):
        return pools.place(workers, 0, address, device, gpus)
    count = workers if type(workers) is int and workers > 0 else -1
    return pools.place(None, count, address, device, gpus)


def _path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)
