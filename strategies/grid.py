"""A Flower Grid as a Transport: real clients, real time, one message a task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from prfl.codec import Codec, Layout
from prfl.records import pack, unpack
from prfl.types import Arrival, Task, Update


@dataclass
class _Sent:
    task: Task
    at: float
    bytes_down: int
    late: bool = False


class GridTransport:
    """Clients are numbered by the nodes' `partition-id`, asked for once with a query; newcomers join while it runs.

    `config` travels with every task. A task without an answer after `timeout` seconds has failed.
    """

    def __init__(
        self,
        grid: Grid,
        codec: Codec,
        layout: Layout,
        config: Mapping[str, int | float | str | bool | bytes],
        *,
        timeout: float = 3600.0,
        poll: float = 0.05,
    ):
        self._grid, self._codec, self._layout, self._config = grid, codec, layout, config
        self._timeout, self._poll, self._began = timeout, poll, time.monotonic()
        self._jobs: dict[str, _Sent] = {}  # message id -> what was asked
        self._queries: dict[str, int] = {}  # message id -> node
        self._nodes: dict[int, int] = {}  # client -> node
        self.classes: dict[int, str] = {}  # client -> device class
        self._inbox: list[Arrival] = []

    def enrol(self, clients: int) -> None:
        """Wait until so many clients are there. Raises TimeoutError."""
        while len(self._nodes) < clients:
            if self.now() > self._timeout:
                raise TimeoutError(f"{len(self._nodes)} of {clients} clients came within {self._timeout:g} s")
            self._ask_newcomers()
            self._pull()
            time.sleep(self._poll)

    def now(self) -> float:
        return time.monotonic() - self._began

    def idle(self) -> Sequence[int]:
        self._ask_newcomers()
        taken = {job.task.client for job in self._jobs.values()} | {a.task.client for a in self._inbox}
        here = set(self._grid.get_node_ids())
        return sorted(c for c, node in self._nodes.items() if node in here and c not in taken)

    def busy(self) -> int:
        return sum(not job.late for job in self._jobs.values()) + len(self._inbox)

    def send(self, task: Task) -> None:
        message = self.message(task)
        ids = list(self._grid.push_messages([message]))
        if ids and ids[0]:
            self._jobs[ids[0]] = _Sent(task, self.now(), len(unpack(message.content)[0]))
        else:
            self._inbox.append(Arrival(task, self.now(), self.now(), 0, 0, None, "the node is gone"))

    def message(self, task: Task, kind: str = MessageType.TRAIN) -> Message:
        """The task as a message to its client's node."""
        return Message(
            pack(self._codec.encode_task(task, self._layout), client=task.client, **self._config),
            dst_node_id=self._nodes[task.client],
            message_type=kind,
            group_id=str(task.version),
            ttl=self._timeout,
        )

    def wait(self, until: float = inf) -> Arrival | None:
        while not self._inbox:
            if not self._pull():
                if self.now() >= until or not self.busy():
                    time.sleep(self._poll)
                    return None
                time.sleep(self._poll)
        return self._inbox.pop(0)

    def forget(self) -> None:
        for job in self._jobs.values():
            job.late = True
        self._inbox.clear()

    def _pull(self) -> bool:
        """Take in what has come; whether anything has."""
        wanted = [*self._jobs, *self._queries]
        replies = list(self._grid.pull_messages(wanted)) if wanted else []
        for reply in replies:
            asked = reply.metadata.reply_to_message_id
            if asked in self._queries:
                self._enrolled(self._queries.pop(asked), reply)
            elif asked in self._jobs:
                self._take(self._jobs.pop(asked), reply)
        for asked in [m for m, job in self._jobs.items() if self.now() - job.at > self._timeout and not job.late]:
            self._jobs[asked].late = True
            self._fail(self._jobs[asked], f"no answer in {self._timeout:g} s")
        return bool(replies)

    def _take(self, job: _Sent, reply: Message) -> None:
        if job.late:
            return
        if reply.has_error():
            self._fail(job, str(reply.error.reason or f"Flower error {reply.error.code}"))
            return
        try:
            data, _ = unpack(reply.content)
            update: Update = self._codec.decode_update(data, job.task, self._layout)
        except ValueError as reason:
            self._fail(job, str(reason))
            return
        self._inbox.append(Arrival(job.task, job.at, self.now(), job.bytes_down, len(data), update))

    def _fail(self, job: _Sent, reason: str) -> None:
        self._inbox.append(Arrival(job.task, job.at, self.now(), job.bytes_down, 0, None, reason.splitlines()[0]))

    def _ask_newcomers(self) -> None:
        known = set(self._nodes.values()) | set(self._queries.values())
        new = [node for node in self._grid.get_node_ids() if node not in known]
        messages = [Message(pack(b""), dst_node_id=node, message_type=MessageType.QUERY, ttl=60.0) for node in new]
        for node, asked in zip(new, self._grid.push_messages(messages) if new else (), strict=False):
            if asked:
                self._queries[asked] = node

    def _enrolled(self, node: int, reply: Message) -> None:
        if reply.has_error():
            return
        _, who = unpack(reply.content)
        client = int(str(who["client"]))
        if client >= 0:
            self._nodes[client], self.classes[client] = node, str(who["profile"])
