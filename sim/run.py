"""One simulated run, from an experiment to a run folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from prfl import checkpoint, energy, problem, store
from prfl.codec import Layout
from prfl.config import Experiment
from prfl.problem import Problem
from prfl.tally import Tally
from sim import plan
from sim.pools import Place, Pool
from sim.transport import VirtualTransport
from strategies.judge import Judge, static
from strategies.run import Watch, finish, learn


def simulate(
    experiment: Experiment,
    folder: Path,
    *,
    pool: Pool = Place(),
    data_dir: Path | None = None,
    watch: Watch = lambda event, tally: None,
    given: Problem | None = None,
) -> dict[str, Any]:
    """Run the experiment in virtual time; what `summary.json` holds. Raises ValueError before anything is written.

    given: the experiment's problem, if it is built already.
    A run that stalls or is interrupted ends with its last merge: the folder is complete, `stopped` has the reason.
    A second Ctrl-C raises KeyboardInterrupt and leaves the folder without summary.
    """
    torch.set_num_threads(1)  # the workers have the other cores
    planned = plan.of(experiment)
    parts, given = planned.parts, given or problem.build(experiment, data_dir)
    state = plan.start(planned, given)
    layout = Layout.of(state.params, state.architecture.groups)
    tally = Tally(planned.classes, parts.pacing.drop_late)
    judge = Judge(given, static(parts.method, state))
    full = plan.spelled(experiment)
    sizes = [len(part) for part in given.parts]
    with store.alone(folder), closing(pool(given)) as workers:
        run = store.Run(folder, full)
        try:
            run.write("split.json", problem.report(given))
            transport = VirtualTransport(
                planned.fleet, sizes, workers, planned.network.open(), parts.codec, layout, state.architecture,
                planned.residual,
            )  # fmt: skip
            state, stopped = learn(experiment, parts, transport, state, run, judge, tally, watch)
        finally:
            run.close()
    checkpoint.save(folder, state, {}, checkpoint.own(experiment))
    watts = {device.name: device.watts for device in planned.fleet if device.watts}
    joules = energy.by_class(planned.classes, tally.busy, tally.radio, tally.at, watts)
    local = judge.local(state) if "local" in experiment.metrics else {}
    more = {"joules": joules} if joules else {}
    return finish(experiment, parts, layout, state, run, judge, tally, stopped, more, local)
