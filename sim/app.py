"""The Flower ServerApp of `flwr run .`: our simulation, with Flower's engine doing the training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from prfl import config, groups, models, store
from prfl.codec import Codec, Layout, Refused
from prfl.config import Experiment
from prfl.problem import Problem
from prfl.records import groups_out, pack, unpack
from prfl.types import Task, Update
from sim import experiments
from sim.pools import Pool
from sim.run import simulate
from sim.workers import TRIES, Failed, Run, Workers

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config; the clock is virtual, the nodes only lend their cores."""
    chosen = context.run_config
    experiment = config.load(experiments.path(str(chosen["experiment"])), str(chosen["overrides"]).split())
    out, data_dir = str(chosen["out"]), str(chosen["data-dir"])
    folder = Path(out) if out else store.fresh(Path("runs"), experiment.name)
    result = simulate(
        experiment, folder, pool=nodes(grid, experiment, data_dir), data_dir=Path(data_dir) if data_dir else None
    )
    print(f"{folder}: test accuracy {result['test_accuracy']:.4f}, model {result['model_sha256']}", flush=True)


def nodes(grid: Grid, experiment: Experiment, data_dir: str) -> Pool:
    """Workers on the nodes of a Grid: any node trains for any client, because the message names the client."""

    def pool(make: Callable[[], Run], given: Problem) -> Workers:
        found = groups.architecture(given.model, given.example).groups
        beside = {
            "experiment": experiment.model_dump_json(),
            "codec": "{}",
            "data-dir": data_dir,
            "groups": groups_out(found),
        }
        return GridWorkers(grid, Layout.of(models.values(given.model), found), beside)

    return pool


class GridWorkers:
    """`sim.workers.Workers` over a Grid. One message a node at a time, or Flower runs them side by side."""

    def __init__(self, grid: Grid, layout: Layout, beside: dict[str, str], poll: float = 0.01):
        self._grid, self._layout, self._beside, self._poll, self._codec = grid, layout, beside, poll, Codec()
        self._queue: list[tuple[int, Task]] = []
        self._out: dict[str, tuple[int, int, Task]] = {}  # message -> node, job, task
        self._done: dict[int, Update | str] = {}
        self._wanted: dict[int, int] = {}  # job -> tries left

    def submit(self, job: int, task: Task) -> None:
        self._queue.append((job, task))
        self._wanted[job] = TRIES
        self._dispatch()

    def result(self, job: int) -> Update:
        while job not in self._done:
            self._collect()
        found = self._done.pop(job)
        self._wanted.pop(job)
        if isinstance(found, str):
            raise Failed(found)
        return found

    def discard(self, job: int) -> None:
        self._wanted.pop(job, None)
        self._done.pop(job, None)
        self._queue = [(j, task) for j, task in self._queue if j != job]

    def close(self) -> None:
        self._queue.clear()

    def _dispatch(self) -> None:
        at_work = {node for node, _, _ in self._out.values()}
        for node in sorted(set(self._grid.get_node_ids()) - at_work):
            if not self._queue:
                return
            job, task = self._queue.pop(0)
            content = pack(self._codec.encode_task(task, self._layout), client=task.client, **self._beside)
            message = Message(content, dst_node_id=node, message_type=MessageType.TRAIN, group_id=str(task.version))
            for asked in self._grid.push_messages([message]):
                self._out[asked] = (node, job, task)

    def _collect(self) -> None:
        self._dispatch()
        replies = list(self._grid.pull_messages(list(self._out)))
        for reply in replies:
            _, job, task = self._out.pop(reply.metadata.reply_to_message_id)
            if job not in self._wanted:
                continue
            if reply.has_error() and reply.error.code == 0 and self._wanted[job] > 1:  # the actor died
                self._wanted[job] -= 1
                self._queue.insert(0, (job, task))
            else:
                self._done[job] = self._read(reply, task)
        if not replies:
            time.sleep(self._poll)

    def _read(self, reply: Message, task: Task) -> Update | str:
        if reply.has_error():
            return str(reply.error.reason or f"Flower error {reply.error.code}").splitlines()[0]
        try:
            return self._codec.decode_update(unpack(reply.content)[0], task, self._layout)
        except Refused as reason:
            return str(reason)
