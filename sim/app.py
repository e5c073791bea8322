"""The Flower ServerApp of `flwr run .`: our simulation, with Flower's engine doing the training."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from prfl import config, groups, models, store
from prfl.codec import Codec, Layout
from prfl.config import Experiment
from prfl.problem import Problem
from prfl.records import DIED, architecture_out, experiment_out, pack, reason, unpack
from prfl.types import Architecture, Task, Update
from sim import experiments
from sim.pools import Pool
from sim.run import simulate
from sim.workers import Failed, Workers

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config; the clock is virtual, the nodes only lend their cores.

    `experiment`: a name or a path; `overrides`: key=value, as a shell splits them; `out`: the run folder. Relative
    paths start where Flower's SuperLink was started.
    """
    chosen = context.run_config
    path = experiments.path(str(chosen["experiment"]))
    experiment = config.load(path, shlex.split(str(chosen["overrides"])))
    out, data_dir = str(chosen["out"]), str(chosen["data-dir"])
    folder = store.free(Path(out) if out else None, experiment.name).absolute()
    result = simulate(
        experiment, folder, pool=nodes(grid, experiment, data_dir), data_dir=Path(data_dir) if data_dir else None
    )
    print(f"{folder}: test accuracy {result['test_accuracy']:.4f}, model {result['model_sha256']}", flush=True)
    if result["stopped"]:
        raise RuntimeError(f"{result['stopped']}; {folder} is complete up to version {result['versions']}")


def nodes(grid: Grid, experiment: Experiment, data_dir: str = "") -> Pool:
    """Workers on the nodes of a Grid: any node trains for any client, because the message names the client."""

    def pool(given: Problem) -> Workers:
        found = groups.architecture(given.model, given.example).groups
        beside: dict[str, str | int] = {
            "experiment": experiment_out(experiment),
            "codec": "{}",
            "data-dir": str(Path(data_dir).absolute()) if data_dir else "",
            "architecture": architecture_out(Architecture(found)),  # no costs: a node's memory limits nothing
            "threads": 1,  # results are the same to the bit only with the same number
        }
        return GridWorkers(grid, Layout.of(models.values(given.model), found), beside)

    return pool


DEATHS = 30  # tries of a task sent alone, many because most only meet the dead worker again


class GridWorkers:
    """`sim.workers.Workers` over a Grid. One message a node at a time, or Flower runs them side by side.

    Flower keeps a worker process that died and prefers it to those that live. After a death we wait until all who live
    have answered, then send the task alone, to two nodes at once: one of them gets past the dead.
    """

    def __init__(self, grid: Grid, layout: Layout, beside: dict[str, str | int], poll: float = 0.01):
        self._grid, self._layout, self._beside, self._poll, self._codec = grid, layout, beside, poll, Codec()
        self._queue: dict[int, Task] = {}
        self._out: dict[str, tuple[int, int, Task]] = {}  # message -> node, job, task
        self._done: dict[int, Update | str] = {}
        self._died: dict[int, int] = {}  # job -> how often it died alone
        self._shaken = self._alone = False  # since a death; while a task is out alone

    def submit(self, job: int, task: Task) -> None:
        self._queue[job], self._died[job] = task, 0
        self._dispatch()

    def result(self, job: int) -> Update:
        while job not in self._done:
            self._dispatch()
            if not self._collect():
                time.sleep(self._poll)
        found = self._done[job]
        self.discard(job)
        if isinstance(found, str):
            raise Failed(found)
        return found

    def discard(self, job: int) -> None:
        for of in (self._died, self._done, self._queue):
            of.pop(job, None)

    def close(self) -> None:
        self._queue.clear()

    def _dispatch(self) -> None:
        if not self._queue or (self._shaken and self._out):
            return
        self._alone = self._shaken
        at_work = {node for node, _, _ in self._out.values()}
        idle = sorted(set(self._grid.get_node_ids()) - at_work)
        for node, job in zip(idle, [next(iter(self._queue))] * 2 if self._alone else list(self._queue), strict=False):
            task = self._queue[job]
            content = pack(self._codec.encode_task(task, self._layout), {**self._beside, "client": task.client})
            message = Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(task.version))
            asked = next(iter(self._grid.push_messages([message])), None)
            if asked:
                self._out[asked] = (node, job, task)
        for _, job, _ in self._out.values():
            self._queue.pop(job, None)

    def _collect(self) -> bool:
        """Take in what has come; whether anything has."""
        replies = list(self._grid.pull_messages(list(self._out))) if self._out else []
        for reply in replies:
            _, job, task = self._out.pop(reply.metadata.reply_to_message_id)
            if job not in self._died or job in self._done:
                continue
            if not reply.has_error() or reply.error.code != DIED:
                self._done[job] = self._read(reply, task)
                self._shaken = self._shaken and not self._alone
            elif all(job != other for _, other, _ in self._out.values()):
                self._shaken = True
                self._died[job] += self._alone
                if self._died[job] == DEATHS:
                    self._done[job] = f"{DEATHS} workers died of this task"
                else:
                    time.sleep(self._died[job] * self._poll)  # those that live may be starting up
                    self._queue = {job: task, **self._queue}
        return bool(replies)

    def _read(self, reply: Message, task: Task) -> Update | str:
        if reply.has_error():
            return reason(reply)
        try:
            return self._codec.decode_update(unpack(reply.content)[0], task, self._layout)
        except ValueError as refusal:
            return str(refusal)
