"""One simulated run, from an experiment to a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clients import local
from clients.evaluate import evaluate
from prfl import config, groups, masks, models, problem, store
from prfl.codec import Codec, Layout
from prfl.config import ConfigError, Experiment
from prfl.problem import Problem
from prfl.types import Selector, State, Task, Work
from sim import devices, network
from sim.devices import Device
from sim.pools import Pool, serial
from sim.tally import Tally
from sim.transport import VirtualTransport
from strategies import pacing as pacings
from strategies import selector as selectors
from strategies import table
from strategies.method import Method
from strategies.pacing import Pacing
from strategies.server import Scores, serve

CALIBRATION = 2000  # training samples that re-estimate static BatchNorm statistics before a test

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """An experiment's parts as objects."""

    method: Method
    pacing: Pacing
    selector: Selector
    fleet: tuple[Device, ...]
    codec: Codec


def parts(experiment: Experiment) -> Parts:
    """Everything that can be checked without data or model. Raises ConfigError."""
    work = config.work(experiment.work)
    settings = experiment.devices
    try:
        profiles = devices.load(Path(settings.profiles) if isinstance(settings.profiles, str) else settings.profiles)
        if settings.fleet:
            fleet = config.part("fleet", settings.fleet, devices.TABLE)
        else:
            fleet = devices.fleet(settings.mix, experiment.data.clients, experiment.seed, profiles, settings.spread)
    except ValueError as error:
        raise ConfigError(f"devices: {error}") from None
    if len(fleet) != experiment.data.clients:
        raise ConfigError(f"devices: the fleet has {len(fleet)} devices for {experiment.data.clients} clients")
    return Parts(
        table.method(experiment.method, work),
        config.part("pacing", experiment.pacing, pacings.TABLE),
        config.part("selector", experiment.selector, selectors.TABLE),
        fleet,
        config.part("codec", {"name": "codec", **experiment.codec}, {"codec": Codec}),
    )


def simulate(
    experiment: Experiment,
    folder: Path,
    *,
    pool: Pool = serial,
    data_dir: Path | None = None,
    watch: Callable[[Event, Tally], None] = lambda event, tally: None,
) -> dict[str, Any]:
    """Run the experiment in virtual time; what `summary.json` holds. Interrupted, all up to the last merge is kept."""
    torch.set_num_threads(1)  # the workers have the other cores
    built = parts(experiment)
    given = problem.build(experiment, data_dir)
    params = models.values(given.model)
    architecture = groups.architecture(given.model, given.example)
    layout = Layout.of(params, architecture.groups)
    classes = {c: device.name for c, device in enumerate(built.fleet)}
    state = built.method.init(params, architecture, classes, experiment.seed)

    tally = Tally([device.name for device in built.fleet])
    run = store.Run(folder, experiment)
    run.write("split.json", problem.report(given))
    workers = pool(partial(local.trainer, experiment, data_dir), given)
    transport = VirtualTransport(
        built.fleet,
        [len(part) for part in given.parts],
        workers,
        config.part("network", experiment.devices.network, network.TABLE).open(),
        built.codec,
        layout,
        architecture,
        experiment.residual,
    )
    judge = Judge(given, static(built.method, state))
    kept = [state]

    def log(event: Event) -> None:
        run.log(event)
        tally(event)
        watch(event, tally)

    def stop(state: State, now: float) -> bool:
        s, accuracy = experiment.stop, state.validation.get("accuracy", 0.0)
        return state.version >= s.versions or now >= s.seconds or tally.updates >= s.updates or accuracy >= s.accuracy

    interrupted = False
    try:
        state = serve(
            built.method,
            built.pacing,
            transport,
            state,
            stop=stop,
            selector=built.selector,
            evaluate=lambda state: None if state.version % experiment.evaluate_every else judge(state),
            keep=lambda state: kept.__setitem__(0, state),
            log=log,
        )
    except KeyboardInterrupt:
        state, interrupted = kept[0], True
    finally:
        workers.close()
    return _finished(experiment, built, run, state, tally, judge(state), layout, interrupted)


@dataclass(frozen=True)
class Judge:
    """Scores of the global model on the server; `static`: BatchNorm statistics are re-estimated first (HeteroFL)."""

    problem: Problem
    static: bool

    def __call__(self, state: State) -> Scores:
        given, dataset = self.problem, self.problem.dataset
        some = dataset.train.subset(torch.arange(min(CALIBRATION, len(dataset.train)))) if self.static else None
        scores = (evaluate(state.params, given.model, s, calibrate=some) for s in (given.validation, dataset.test))
        return Scores(*scores)


def static(method: Method, state: State) -> bool:
    """Whether clients leave BatchNorm statistics to the evaluation."""
    work = method.work if isinstance(method.work, Work) else method.work(state.version)
    return work.statistics == "static"


def _finished(
    experiment: Experiment,
    built: Parts,
    run: store.Run,
    state: State,
    tally: Tally,
    scores: Scores,
    layout: Layout,
    interrupted: bool,
) -> dict[str, Any]:
    run.save_model(state.params)
    dense = len(built.codec.encode_task(Task(0, 0, state.params, masks.DENSE, Work(), 0), layout))
    summary = {
        "method": name(experiment.method),
        "pacing": name(experiment.pacing),
        "seed": experiment.seed,
        "versions": state.version,
        "virtual_seconds": tally.at,
        "wall_seconds": run.seconds(),
        "client_updates": tally.updates,
        "failed_updates": tally.failed,
        "test_accuracy": scores.test["accuracy"],
        "test_loss": scores.test["loss"],
        "validation_accuracy": scores.validation["accuracy"],
        "best_validation_accuracy": max(tally.best, scores.validation["accuracy"]),
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "dense_message_bytes": dense,
        "bytes_against_dense": (tally.bytes_up + tally.bytes_down) / max(1, 2 * dense * (tally.updates + tally.failed)),
        "mean_density": tally.mean_density,
        "final_density": tally.final_density,
        "updates_by_class": dict(sorted(tally.trained.items())),
        "interrupted": interrupted,
        "model_sha256": store.model_sha256(state.params),
        "events_sha256": run.events_sha256,
    }
    run.write("summary.json", summary)
    run.close()
    return summary


def name(spec: config.Spec) -> str:
    """A part's name as its spec has it."""
    return spec if isinstance(spec, str) else str(spec.get("name", "own"))
