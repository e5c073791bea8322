"""One simulated run, from an experiment to a run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clients.evaluate import evaluate
from prfl import config, masks, problem, store
from prfl.codec import Layout
from prfl.config import Experiment
from prfl.problem import Problem
from prfl.types import State, Task, Work
from sim import plan
from sim.interrupt import Gate
from sim.pools import Pool, serial
from sim.tally import Tally
from sim.transport import VirtualTransport
from sim.workers import Workers
from strategies.method import Method
from strategies.server import Scores, Stalled, serve

CALIBRATION = 2000  # training samples that re-estimate static BatchNorm statistics before a test

Event = Mapping[str, Any]
Watch = Callable[[Event, Tally], None]


def simulate(
    experiment: Experiment,
    folder: Path,
    *,
    pool: Pool = serial,
    data_dir: Path | None = None,
    watch: Watch = lambda event, tally: None,
) -> dict[str, Any]:
    """Run the experiment in virtual time; what `summary.json` holds. Raises ValueError before anything is written.

    A run that stalls or is interrupted ends with its last merge: the folder is complete, `stopped` has the reason.
    A second Ctrl-C raises KeyboardInterrupt and leaves the folder without summary.
    """
    torch.set_num_threads(1)  # the workers have the other cores
    built = plan.parts(experiment)
    given = problem.build(experiment, data_dir)
    state = plan.start(built, given)
    layout = Layout.of(state.params, state.architecture.groups)
    tally = Tally([device.name for device in built.fleet], built.pacing.drop_late)
    judge = Judge(given, static(built.method, state))
    full = plan.spelled(experiment)
    with closing(pool(given)) as workers:
        run = store.Run(folder, full)
        try:
            run.write("split.json", problem.report(given))
            state, stopped = _served(experiment, built, given, run, state, layout, workers, judge, tally, watch)
        finally:
            run.close()
        run.save_model(state.params)
    dense = len(built.codec.encode_task(Task(0, 0, state.params, masks.DENSE, Work(), 0), layout))
    summary = _summary(experiment, run, state, tally, judge(state), dense, stopped)
    run.write("summary.json", summary)
    return summary


def _served(
    experiment: Experiment,
    built: plan.Parts,
    given: Problem,
    run: store.Run,
    state: State,
    layout: Layout,
    workers: Workers,
    judge: Judge,
    tally: Tally,
    watch: Watch,
) -> tuple[State, str | None]:
    """The last merged state, and why the run stopped before its end."""
    sizes, kept, gate = [len(part) for part in given.parts], [state], Gate()
    transport = VirtualTransport(
        built.fleet, sizes, workers, built.network.open(), built.codec, layout, state.architecture, built.residual
    )

    def log(event: Event) -> None:
        gate.shut()
        run.log(event)
        tally(event)
        watch(event, tally)
        if event["kind"] != "merge":  # a merge is done when its state is kept
            gate.open()

    def keep(state: State) -> None:
        kept[0] = state
        gate.open()

    def stop(state: State, now: float) -> bool:
        s, accuracy = experiment.stop, state.validation.get("accuracy", 0.0)
        return state.version >= s.versions or now >= s.seconds or tally.updates >= s.updates or accuracy >= s.accuracy

    def scored(state: State) -> Scores | None:
        due = state.version % experiment.evaluate_every == 0
        return judge(state, test=experiment.test == "always") if due else None

    with gate:
        try:
            serve(
                built.method, built.pacing, transport, state, stop=stop, selector=built.selector, evaluate=scored,
                keep=keep, log=log,
            )  # fmt: skip
        except KeyboardInterrupt:
            return kept[0], "interrupted"
        except (Stalled, ValueError) as reason:
            return kept[0], " ".join(str(reason).split())
    return kept[0], None


@dataclass(frozen=True)
class Judge:
    """Scores of the global model on the server; `static`: BatchNorm statistics are re-estimated first (HeteroFL)."""

    problem: Problem
    static: bool

    def __call__(self, state: State, test: bool = True) -> Scores:
        given, dataset = self.problem, self.problem.dataset
        some = dataset.train.subset(torch.arange(min(CALIBRATION, len(dataset.train)))) if self.static else None
        splits = (given.validation, dataset.test) if test else (given.validation,)
        return Scores(*(evaluate(state.params, given.model, split, calibrate=some) for split in splits))


def static(method: Method, state: State) -> bool:
    """Whether clients leave BatchNorm statistics to the evaluation."""
    work = method.work if isinstance(method.work, Work) else method.work(state.version)
    return work.statistics == "static"


def _summary(
    experiment: Experiment,
    run: store.Run,
    state: State,
    tally: Tally,
    scores: Scores,
    dense: int,
    stopped: str | None,
) -> dict[str, Any]:
    return {
        "experiment": experiment.name,
        "method": config.name(experiment.method),
        "pacing": config.name(experiment.pacing),
        "data": config.name(experiment.data.set),
        "seed": experiment.seed,
        "versions": state.version,
        "virtual_seconds": tally.at,
        "wall_seconds": run.seconds(),
        "client_updates": tally.updates,
        "failed_updates": tally.failed,
        "test_accuracy": scores.test["accuracy"],
        "test_loss": scores.test["loss"],
        "validation_accuracy": scores.validation["accuracy"],
        "validation_loss": scores.validation["loss"],
        "best_validation_accuracy": max(tally.best, scores.validation["accuracy"]),
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "dense_message_bytes": dense,
        "bytes_against_dense": (tally.bytes_up + tally.bytes_down) / max(1, 2 * dense * (tally.updates + tally.failed)),
        "mean_density": tally.mean_density,
        "final_density": tally.final_density,
        "updates_by_class": dict(sorted(tally.trained.items())),
        "stopped": stopped,
        "interrupted": stopped == "interrupted",
        "model_sha256": store.model_sha256(state.params),
        "events_sha256": run.events_sha256,
    }
