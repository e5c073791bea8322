"""A Flower Grid as a Transport: real clients, real time, one message a task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from prfl.codec import Codec, Layout
from prfl.records import Scalar, line, pack, reason, unpack
from prfl.types import GIVEN_UP, METRICS, Arrival, Task

QUERY = 60.0  # seconds a node has to say who it is, before it is asked again
LOOK = 1.0  # seconds between two looks for newcomers, and at most between two looks for answers
HASTE = 0.02  # share of the time waited so far that an answer may lie there unseen

UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, DecodeError)

log = logging.getLogger("prfl")


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


@dataclass
class Polling:
    """How often answers were looked for in vain, and the seconds until the next look; 0 where every look found one.

    An answer lies there half as long.
    """

    looks: int = 0
    mean: float = 0.0
    longest: float = 0.0

    def slept(self, seconds: float) -> None:
        self.looks += 1
        self.mean += (seconds - self.mean) / self.looks
        self.longest = max(self.longest, seconds)


class GridTransport:
    """Clients are numbered by the nodes' `partition-id`, asked for once with a query; newcomers join while it runs.

    `config` travels with every task. A task without an answer after `timeout` seconds has failed; its client gets
    another one when it has answered, or after as long again. `classes`: every client's device class; it grows as
    clients come. A client number that comes back on a new node (a device that was restarted) moves there, once the old
    node is gone. `poll`: seconds between two looks for answers; they grow with the wait. `elapsed`: seconds of the run
    before this transport, when it goes on after an interruption. `joined` hears of every client that comes: when, its
    number, its device class. `known`: the device classes there can be, if not any; a node of another is left alone.
    """

    def __init__(
        self,
        grid: Grid,
        codec: Codec,
        layout: Layout,
        config: Mapping[str, Scalar],
        *,
        timeout: float = 3600.0,
        poll: float = 0.05,
        elapsed: float = 0.0,
        joined: Callable[[float, int, str], None] = lambda at, client, profile: None,
        known: Collection[str] = (),
    ):
        self._grid, self._codec, self._layout, self._config = grid, codec, layout, config
        self._timeout, self._poll, self._began = timeout, poll, time.monotonic() - elapsed
        self.polling, self._joined, self._known = Polling(), joined, known
        self._sent: dict[str, Sent] = {}  # message id -> task
        self._queries: dict[str, int] = {}  # message id -> node
        self._singly = False  # since a reply that can not be read took others with it
        self._retired: set[int] = set()  # clients
        self._ask_at: dict[int, float] = {}  # node -> when it may be asked again who it is
        self._nodes: dict[int, int] = {}  # client -> node
        self._idle: list[int] = []  # as of the latest look
        self.classes: dict[int, str] = {}
        self._inbox: list[Arrival] = []

    def enrol(self, clients: int, patience: float | None = None) -> None:
        """Wait until so many clients are there, the retired among them. Raises TimeoutError.

        patience: seconds; None: as long as a task may take.
        """
        began, patience = self.now(), self._timeout if patience is None else patience
        self._pull()
        while (there := len(self.idle()) + len(self._retired)) < clients:
            if self.now() - began > patience:
                raise TimeoutError(f"{there} of {clients} clients came within {patience:g} s")
            if not self._pull():
                time.sleep(min(LOOK / 4, 5 * self._poll))

    def now(self) -> float:
        return time.monotonic() - self._began

    def idle(self) -> Sequence[int]:
        here = set(self._grid.get_node_ids())
        self._ask_newcomers(here)
        taken = self._retired | {s.task.client for s in self._sent.values()} | {a.task.client for a in self._waiting()}
        self._idle = sorted(c for c, node in self._nodes.items() if node in here and c not in taken)
        return self._idle

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
        """The next arrival; None when the time is over, or somebody new can be asked.

        With nothing under way: None as soon as a client can be asked, or after the timeout.
        """
        began = looked = self.now()
        before = self._idle
        while not self._inbox:
            if self._pull():
                continue
            waited = self.now() - began
            pause = min(max(self._poll, HASTE * waited), LOOK, max(until - self.now(), 0.0))
            time.sleep(pause)
            self.polling.slept(pause)
            if self.now() >= until or (not self.busy() and (waited > self._timeout or self.idle())):
                return None
            if self.now() - looked > LOOK:
                looked = self.now()
                if set(self.idle()) - set(before):
                    return None
        return self._inbox.pop(0)

    def forget(self) -> None:
        for sent in self._sent.values():
            sent.late = True
        self._inbox = [_given_up(a) for a in self._inbox]

    def retire(self, client: int) -> None:
        self._retired.add(client)

    def message(self, task: Task, kind: str = MessageType.TRAIN) -> Message:
        """The task as a message to its client's node."""
        return Message(
            pack(self._codec.encode_task(task, self._layout), {**self._config, "client": task.client}),
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
            if missing := [name for name in METRICS if name not in update.metrics]:
                raise ValueError(f"metrics: no {missing[0]}")
        except ValueError as refusal:
            return self._nothing(sent, line(str(refusal)))
        return Arrival(sent.task, sent.at, self.now(), sent.bytes_down, len(data), update)

    def _waiting(self) -> list[Arrival]:
        return [a for a in self._inbox if a.reason != GIVEN_UP]

    def _nothing(self, sent: Sent, why: str) -> Arrival:
        return Arrival(sent.task, sent.at, self.now(), sent.bytes_down, 0, None, why)

    def _pull(self) -> bool:
        """Take in what has come, and give up what does not come; whether there was any of it."""
        replies, unread = self._replies([*self._sent, *self._queries])
        for asked in unread:
            if self._queries.pop(asked, None) is None and not (sent := self._sent.pop(asked)).told:
                arrival = self._nothing(sent, "an answer that can not be read")
                self._inbox.append(_given_up(arrival) if sent.late else arrival)
        for reply in replies:
            asked = reply.metadata.reply_to_message_id
            if asked in self._queries:
                self._enrolled(reply, self._queries.pop(asked))
            elif asked in self._sent:
                sent = self._sent.pop(asked)
                if sent.told:
                    log.info("client %d: its answer to version %d came too late", sent.task.client, sent.task.version)
                else:
                    arrival = self.arrival(sent, reply)
                    self._inbox.append(_given_up(arrival) if sent.late else arrival)
        overdue = [s for s in self._sent.values() if not s.late and self.now() - s.at > self._timeout]
        for sent in overdue:
            sent.late = sent.told = True
            self._inbox.append(self._nothing(sent, f"no answer in {self._timeout:g} s"))
        return bool(replies or unread or overdue)

    def _replies(self, wanted: Sequence[str]) -> tuple[list[Message], list[str]]:
        """The replies that have come, and the messages whose replies can not be read.

        Flower takes replies apart as it pulls them, and one that is none raises: those pulled with it are lost. From
        then on each is pulled alone, and does harm to nobody else.
        """
        replies: list[Message] = []
        unread: list[str] = []
        for ids in [[asked] for asked in wanted] if self._singly else [list(wanted)] * bool(wanted):
            try:
                replies += self._grid.pull_messages(ids)
            except UNREADABLE as error:
                log.warning("a reply can not be read: %s", type(error).__name__)
                if self._singly:
                    unread += ids
                else:
                    self._singly = True
        return replies, unread

    def _ask_newcomers(self, here: Iterable[int]) -> None:
        new = [node for node in sorted(here) if self._ask_at.get(node, -inf) <= self.now()]
        messages = [Message(pack(b""), dst_node_id=node, message_type=MessageType.QUERY, ttl=QUERY) for node in new]
        self._ask_at |= dict.fromkeys(new, self.now() + QUERY)
        pushed = self._grid.push_messages(messages) if new else ()
        self._queries |= {asked: node for asked, node in zip(pushed, new, strict=False) if asked}

    def _enrolled(self, reply: Message, node: int) -> None:
        """The node is that which was asked: what a reply says of its sender is the sender's word."""
        if reply.has_error():
            return
        try:
            client, profile = _who(reply)
        except ValueError as refusal:
            client, profile = -1, ""
            log.info("node %d is left alone: %s", node, refusal)
        self._ask_at[node] = inf
        if client >= 0 and self._known and profile not in self._known:
            here = ", ".join(sorted(self._known))
            log.warning(
                "client %d is left alone: the method has no share for class %r; it has %s", client, profile, here
            )
            return
        holder = self._nodes.get(client, node)
        if holder != node and holder in set(self._grid.get_node_ids()):
            self._ask_at[node] = self.now() + QUERY
            log.warning("node %d says it is client %d, but node %d is, and is here: left alone", node, client, holder)
        elif client >= 0:
            self._nodes[client], self.classes[client] = node, profile
            self._joined(self.now(), client, profile)
            log.info("client %d (%s) is node %d", client, profile, node)


def _who(reply: Message) -> tuple[int, str]:
    """Client number and device class; negative for a node without a number. Raises ValueError."""
    _, who = unpack(reply.content)
    client, profile = who.get("client"), who.get("profile")
    if type(client) is not int or client >= 2**63 or not isinstance(profile, str) or profile != line(profile):
        raise ValueError("it does not say who it is")
    return client, profile


def _given_up(arrival: Arrival) -> Arrival:
    return replace(arrival, update=None, reason=GIVEN_UP)
