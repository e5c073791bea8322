"""A Flower Grid as a Transport: real clients, real time, one message a task."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from prfl.codec import Codec, Layout
from prfl.records import pack, reason, unpack
from prfl.types import GIVEN_UP, Arrival, Task

QUERY = 60.0  # seconds a node has to say who it is, before it is asked again


@dataclass
class Sent:
    """A task under way. `late`: nobody waits for it any more, but its client is still busy with it.

    `told`: its end has been reported already.
    """

    task: Task
    at: float
    bytes_down: int
    late: bool = False
    told: bool = False


class GridTransport:
    """Clients are numbered by the nodes' `partition-id`, asked for once with a query; newcomers join while it runs.

    `config` travels with every task. A task without an answer after `timeout` seconds has failed; its client gets
    another one when it has answered, or after as long again. `classes`: every client's device class; it grows as
    clients come. A client number that comes back on a new node (a device that was restarted) moves there.
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
        self._sent: dict[str, Sent] = {}  # message id -> task
        self._queries: set[str] = set()  # message ids
        self._ask_at: dict[int, float] = {}  # node -> when it may be asked again who it is
        self._nodes: dict[int, int] = {}  # client -> node
        self.classes: dict[int, str] = {}
        self._inbox: list[Arrival] = []

    def enrol(self, clients: int) -> None:
        """Wait until so many clients are there. Raises TimeoutError."""
        began = self.now()
        self._pull()
        while len(self.idle()) < clients:
            if self.now() - began > self._timeout:
                raise TimeoutError(f"{len(self.idle())} of {clients} clients came within {self._timeout:g} s")
            if not self._pull():
                time.sleep(self._poll)

    def now(self) -> float:
        return time.monotonic() - self._began

    def idle(self) -> Sequence[int]:
        here = set(self._grid.get_node_ids())
        self._ask_newcomers(here)
        taken = {s.task.client for s in self._sent.values()} | {a.task.client for a in self._waiting()}
        return sorted(c for c, node in self._nodes.items() if node in here and c not in taken)

    def busy(self) -> int:
        return sum(not sent.late for sent in self._sent.values()) + len(self._waiting())

    def send(self, task: Task) -> None:
        message = self.message(task)
        sent = Sent(task, self.now(), len(unpack(message.content)[0]))
        asked = next(iter(self._grid.push_messages([message])), None)
        if asked:
            self._sent[asked] = sent
        else:
            self._inbox.append(self._nothing(sent, "the node is gone"))

    def wait(self, until: float = inf) -> Arrival | None:
        """The next arrival. With nothing under way: None as soon as a client can be asked, or after the timeout."""
        began = self.now()
        while not self._inbox:
            if self._pull():
                continue
            time.sleep(self._poll)
            over = self.now() - began > self._timeout
            if self.now() >= until or (not self.busy() and (over or self.idle())):
                return None
        return self._inbox.pop(0)

    def forget(self) -> None:
        for sent in self._sent.values():
            sent.late = True
        self._inbox = [_given_up(a) for a in self._inbox]

    def message(self, task: Task, kind: str = MessageType.TRAIN) -> Message:
        """The task as a message to its client's node."""
        return Message(
            pack(self._codec.encode_task(task, self._layout), client=task.client, **self._config),
            dst_node_id=self._nodes[task.client],
            message_type=kind,
            group_id=str(task.version),
            ttl=2 * self._timeout,
        )

    def arrival(self, sent: Sent, reply: Message) -> Arrival:
        """A task's end, from the reply to its message; a reply that is none comes without update."""
        if reply.has_error():
            return self._nothing(sent, reason(reply))
        try:
            data, _ = unpack(reply.content)
            update = self._codec.decode_update(data, sent.task, self._layout)
        except ValueError as refusal:
            return self._nothing(sent, str(refusal))
        return Arrival(sent.task, sent.at, self.now(), sent.bytes_down, len(data), update)

    def _waiting(self) -> list[Arrival]:
        return [a for a in self._inbox if a.reason != GIVEN_UP]

    def _nothing(self, sent: Sent, why: str) -> Arrival:
        return Arrival(sent.task, sent.at, self.now(), sent.bytes_down, 0, None, why)

    def _pull(self) -> bool:
        """Take in what has come, and give up what does not come; whether there was any of it."""
        wanted = [*self._sent, *self._queries]
        replies = list(self._grid.pull_messages(wanted)) if wanted else []
        for reply in replies:
            asked = reply.metadata.reply_to_message_id
            if asked in self._queries:
                self._queries.remove(asked)
                self._enrolled(reply)
            elif asked in self._sent:
                sent = self._sent.pop(asked)
                if not sent.told:
                    arrival = self.arrival(sent, reply)
                    self._inbox.append(_given_up(arrival) if sent.late else arrival)
        overdue = [s for s in self._sent.values() if not s.late and self.now() - s.at > self._timeout]
        for sent in overdue:
            sent.late = sent.told = True
            self._inbox.append(self._nothing(sent, f"no answer in {self._timeout:g} s"))
        return bool(replies or overdue)

    def _ask_newcomers(self, here: Iterable[int]) -> None:
        new = [node for node in sorted(here) if self._ask_at.get(node, -inf) <= self.now()]
        messages = [Message(pack(b""), dst_node_id=node, message_type=MessageType.QUERY, ttl=QUERY) for node in new]
        self._ask_at |= dict.fromkeys(new, self.now() + QUERY)
        self._queries |= {asked for asked in (self._grid.push_messages(messages) if new else ()) if asked}

    def _enrolled(self, reply: Message) -> None:
        if reply.has_error():
            return
        try:
            _, who = unpack(reply.content)
            client, profile = int(str(who["client"])), str(who["profile"])
        except (KeyError, ValueError):  # not one of ours
            client = -1
        node = reply.metadata.src_node_id
        self._ask_at[node] = inf
        if client >= 0:
            self._nodes[client], self.classes[client] = node, profile


def _given_up(arrival: Arrival) -> Arrival:
    return replace(arrival, update=None, reason=GIVEN_UP)
