"""One run on real devices, from an experiment to a run folder; it goes on where it was when it was broken off."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from flwr.serverapp import Grid

from clients.local import undivided
from deploy.experiment import real
from deploy.home import write
from deploy.replies import Prompt
from prfl import checkpoint, cost, density, groups, models, problem, store
from prfl.codec import Layout
from prfl.config import Experiment
from prfl.records import architecture_out, experiment_out
from prfl.tally import Tally
from prfl.types import State
from strategies import parts
from strategies.grid import GridTransport
from strategies.judge import Judge, static
from strategies.run import finish, learn

REPLY = 3.0  # values of a reply over those of the model, at most: the update, and what clients report


def federate(grid: Grid, experiment: Experiment, folder: Path, data_dir: Path | None = None) -> dict[str, Any]:
    """Run the experiment on the nodes of a Grid; what `summary.json` holds. A folder with a run is gone on with.

    Every merged state is on disk before anything else happens. What had come since the last one when a run was broken
    off is lost and asked for again; the event `resume` says how much it was. ValueError: the experiment, its data or
    the folder are no good, or another process has it. TimeoutError: too few nodes.
    """
    with store.alone(folder):
        return _federate(grid, experiment, folder, data_dir)


def _federate(grid: Grid, experiment: Experiment, folder: Path, data_dir: Path | None) -> dict[str, Any]:
    settings, built = real(experiment), parts.of(experiment)
    given = problem.build(undivided(experiment), data_dir)
    architecture = groups.architecture(given.model, given.example)
    trusted = checkpoint.own(experiment)
    run, saved, lost = _opened(experiment, folder, trusted)
    earlier, tally = list(store.events(folder)), Tally({}, built.pacing.drop_late)

    def log(event: Mapping[str, Any]) -> None:
        run.log(event)
        tally(event)

    try:
        params = models.values(given.model)
        layout = Layout.of(params, architecture.groups)
        beside = {
            "experiment": experiment_out(experiment),
            "codec": json.dumps(asdict(built.codec)),
            "architecture": architecture_out(architecture),
            "run": _name(folder),
        }
        for event in earlier:
            tally(event)
        prompt = Prompt(grid, REPLY * cost.dense_bytes(params) + 2**20)
        transport = GridTransport(
            prompt, built.codec, layout, beside, timeout=settings.timeout, poll=settings.poll,
            elapsed=max((e["at"] for e in (*earlier, *lost)), default=0.0),
            joined=lambda at, client, name: log({"kind": "join", "at": at, "client": client, "class": name}),
            known=classes(built.method.density),
        )  # fmt: skip
        transport.enrol(settings.nodes, settings.wait)
        if saved is None:
            state = built.method.init(params, architecture, transport.classes, experiment.seed)
        else:
            for client, name in saved.classes.items():
                transport.classes.setdefault(client, name)
            state = replace(saved, classes=transport.classes)
        if earlier or lost:
            log(_resumed(transport.now(), state, tally, lost))
        judge = Judge(given, static(built.method, state))

        def keep(state: State) -> None:
            checkpoint.save(folder, state, {"offset": run.offset()}, trusted)

        state, stopped = learn(experiment, built, transport, state, run, judge, tally, keep=keep)
        checkpoint.save(folder, state, {"offset": run.offset()}, trusted)
    finally:
        run.close()
    polling = {"poll_seconds_mean": transport.polling.mean, "poll_seconds_longest": transport.polling.longest}
    return finish(experiment, built, layout, state, run, judge, tally, stopped, polling)


def classes(part: object) -> frozenset[str]:
    """The device classes that a density names, itself or in a part of it; none: it takes any."""
    if isinstance(part, density.tiers) and isinstance(part.levels, Mapping) and not part.dynamic:
        return frozenset(part.levels)
    inner = [getattr(part, f.name) for f in fields(part)] if is_dataclass(part) else []
    return frozenset[str]().union(*map(classes, inner))


def _name(folder: Path) -> str:
    """What devices know the run by: the same when it is gone on with, and another for every other run."""
    file = folder / "name"
    if not file.exists():
        write(file, token_hex(16).encode(), mode=0o644)
    return file.read_text()


def _opened(
    experiment: Experiment, folder: Path, trusted: Sequence[str]
) -> tuple[store.Run, State | None, list[dict[str, Any]]]:
    """The run folder, its last state, and the events that are lost."""
    if not (folder / "events.jsonl").exists():
        return store.Run(folder, parts.spelled(experiment)), None, []
    saved = checkpoint.load(folder, trusted) if (folder / "state").exists() else None
    run, lost = store.Run.again(folder, int(saved.beside["offset"]) if saved else 0)
    return run, saved.state if saved else None, lost


def _resumed(now: float, state: State, tally: Tally, lost: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The event of going on. `asked`: clients whose work is asked for again; `updates`: how many had come, and cost."""
    came = [e for e in lost if e["kind"] == "arrival"]
    asked = {e["client"] for e in lost if e["kind"] == "send"} | tally.at_work
    return {
        "kind": "resume",
        "at": now,
        "version": state.version,
        "asked": sorted(asked),
        "updates": sum(e["used"] for e in came),
        "bytes_down": sum(e["bytes_down"] for e in came),
        "bytes_up": sum(e["bytes_up"] for e in came),
    }
