"""Clients that answer anything: the real transport and the real loop go on, with a reason for every refusal."""

from __future__ import annotations

import json
import logging
import math
import re
import struct
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, validate_object_content
from test_flower import EXPERIMENT, Nodes, architecture, layout, local, task, transport
from world import OPTIONS
from xxhash import xxh3_64_digest

from clients import memory
from prfl.codec import Codec, Layout
from prfl.envelope import UPDATE, seal, unseal
from prfl.masks import Mask
from prfl.records import RAISED, pack, unpack
from prfl.types import Arrival, State, Task, Tree, Update, Work
from strategies import table
from strategies.flower import PruningStrategy
from strategies.grid import GridTransport
from strategies.method import Method, never
from strategies.pacing import buffered, sync
from strategies.server import serve

HOSTILE = 1000  # the node of client 0
GONE = 201  # Flower's code for a message that is not there any more
Forge = Callable[[bytes], Any]


def honest(of: Task, **changes: Any) -> Update:
    """A right answer, without training for it."""
    draw = torch.Generator().manual_seed(of.seed % 2**63)
    delta = {k: torch.randn(of.mask.count(k, v.shape), generator=draw) * 0.01 for k, v in of.params.items()}
    metrics = {"loss": 0.5, "loss_first": 0.6, "loss_last": 0.4, "accuracy": 0.2, "samples": 30.0, "steps": 3.0}
    return replace(Update(of.client, of.version, delta, of.mask, 30.0, metrics), **changes)


def encoded(of: Task, **changes: Any) -> bytes:
    return Codec().encode_update(honest(of, **changes), of, layout())[0]


def asked(message: Message) -> Task:
    return Codec().decode_task(unpack(message.content)[0], layout())


def right(message: Message) -> Message:
    return Message(pack(encoded(asked(message))), reply_to=message)


def fixed(data: bytes) -> bytes:
    """With the checksum that an attacker would compute."""
    return data[:-4] + xxh3_64_digest(data[:-4])[-4:]


def sections(data: bytes) -> list[bytes]:
    return [bytes(r.data) for r in unseal(data, UPDATE, layout(), 5)]


def with_section(number: int, content: bytes) -> Forge:
    def forge(data: bytes) -> RecordDict:
        parts = sections(data)
        parts[number] = content
        return pack(seal(UPDATE, layout(), *([p] for p in parts)))

    return forge


def with_length(number: int, size: int) -> Forge:
    return lambda data: pack(fixed(data[: 16 + 8 * number] + struct.pack("<Q", size) + data[24 + 8 * number :]))


def values(size: float) -> Forge:
    return lambda data: with_section(3, b"\0" + struct.pack("<f", size) * (len(sections(data)[3]) // 4))(data)


def long(data: bytes) -> RecordDict:
    """As `pack` does with much more."""
    return RecordDict(
        {"prfl": ArrayRecord({"prfl": Array("uint8", (len(data),), "prfl.raw", data)}), "config": ConfigRecord()}
    )


def record(**array: Any) -> Forge:
    """The message in an array with other labels."""

    def forge(data: bytes) -> RecordDict:
        content = long(data)
        content.array_records["prfl"]["prfl"].__dict__.update(array)
        return content

    return forge


def beside(name: str, other: Any) -> Forge:
    return lambda data: RecordDict({**pack(data), name: other})


def many(data: bytes) -> RecordDict:
    tiny = Array("uint8", (1,), "prfl.raw", b"x")
    arrays = {"prfl": Array("uint8", (len(data),), "prfl.raw", data), **{f"a{i}": tiny for i in range(10_000)}}
    return RecordDict({"prfl": ArrayRecord(arrays), "config": ConfigRecord()})


NONE = "^the message is none of prfl's$"
FORGED: dict[str, tuple[Forge, str]] = {
    "truncated": (lambda d: pack(d[:-1]), "^truncated: 1 bytes are missing$"),
    "cut to nothing": (lambda d: pack(b""), "^truncated: 0 bytes$"),
    "half": (lambda d: pack(fixed(d[: len(d) // 2])), "^truncated"),
    "oversized": (lambda d: pack(d + bytes(30 * 2**20)), "^31457280 bytes too many$"),
    "oversized and sealed": (with_section(3, bytes(30 * 2**20)), "^values: "),
    "another format": (lambda d: pack(fixed(d[:4] + b"\1" + d[5:])), "^format 1, this side speaks 2$"),
    "another kind": (lambda d: pack(fixed(d[:5] + b"\0" + d[6:])), "^an update was expected, not a task$"),
    "no such kind": (lambda d: pack(fixed(d[:5] + b"\xff" + d[6:])), "^an update was expected, not 255$"),
    "another model": (lambda d: pack(fixed(d[:8] + bytes(8) + d[16:])), "^another model$"),
    "another client": (with_section(0, struct.pack("<QQd", 1, 0, 1.0)), "^client 1, version 0, not 0, 0 as asked$"),
    "another version": (with_section(0, struct.pack("<QQd", 0, 9, 1.0)), "^client 0, version 9, not 0, 0 as asked$"),
    "heavy": (with_section(0, struct.pack("<QQd", 0, 0, 1e300)), r"^weight 1e\+300 is not within"),
    "weightless": (with_section(0, struct.pack("<QQd", 0, 0, 5e-324)), "^weight 4.94066e-324 is not within"),
    "no number": (with_section(0, struct.pack("<QQd", 0, 0, math.nan)), "^weight nan is not within"),
    "short fields": (with_section(0, b""), "^fields of 0 bytes instead of 24$"),
    "metric NaN": (with_section(1, b'{"loss":NaN}'), "^metrics: 'loss' is no finite number$"),
    "metric huge": (with_section(1, b'{"loss":1e999}'), "^metrics: 'loss' is no finite number$"),
    "metric missing": (with_section(1, b'{"loss":1.0}'), "^metrics: no loss_first$"),
    "metric bool": (with_section(1, b'{"loss":true}'), "^metrics: 'loss' is no finite number$"),
    "metric of text": (with_section(1, b'{"loss":"low"}'), "^metrics: 'loss' is no finite number$"),
    "metric nested": (with_section(1, b'{"loss":' + b"[" * 9999 + b"]" * 9999 + b"}"), "^metrics: not JSON"),
    "metric name": (with_section(1, json.dumps({"\x1b[2J": 1.0}).encode()), r"^metrics: '\\x1b\[2J' is no finite"),
    "metrics huge": (with_section(1, b" " * 2**20 + b"{}"), "^metrics: not JSON of at most 65536 bytes$"),
    "metrics list": (with_section(1, b"[]"), "^metrics: not a JSON object$"),
    "wrong mask": (with_section(2, b"\1" + bytes([3, 1]) * 9), "^(mask|truncated)"),
    "mask of channels": (with_section(2, b"\2\1\1"), "^mask: a kind was announced that no entry has$"),
    "mask bomb": (with_section(2, b"\1" + struct.pack("<BIBI", 4, 2**32 - 1, 0, 2**32 - 1)), "^mask: 4294967295 gaps"),
    "other mask": (with_section(2, b"\1\2\3\0\0\0\0\0\0"), "^(values|mask)"),
    "NaN": (values(math.nan), "^NaN in fc1.bias$"),
    "Inf": (values(-math.inf), "^Inf in fc1.bias$"),
    "absurd": (values(1e30), r"^1e\+30 in fc1.bias, more than 1e\+06$"),
    "signal": (with_section(4, bytes(100)), "^(signal|mask|values)"),
    "length 0": (with_length(3, 2**64 - 1), "^truncated"),
    "length 1": (with_length(0, 2**63), "^truncated"),
    "length 2": (with_length(2, 7), "^truncated: 7 bytes are missing$"),
    "nothing": (lambda d: RecordDict(), NONE),
    "no config": (lambda d: RecordDict({"prfl": long(d)["prfl"]}), NONE),
    "no array": (lambda d: RecordDict({"prfl": ArrayRecord(), "config": ConfigRecord()}), NONE),
    "text for bytes": (lambda d: RecordDict({"prfl": ConfigRecord({"prfl": "x"}), "config": ConfigRecord()}), NONE),
    "bytes in a config": (lambda d: RecordDict({"prfl": ConfigRecord({"prfl": d}), "config": ConfigRecord()}), NONE),
    "metrics for arrays": (lambda d: RecordDict({"prfl": MetricRecord({"prfl": 1}), "config": ConfigRecord()}), NONE),
    "metrics for a config": (lambda d: RecordDict({**long(d), "config": MetricRecord({"a": math.nan})}), NONE),
    "text in the config": (lambda d: RecordDict({"config": ConfigRecord({"prfl": "x"})}), NONE),
    "an empty config": (lambda d: RecordDict({"config": ConfigRecord()}), NONE),
    "bytes under another name": (lambda d: RecordDict({"other": pack(d)["config"]}), NONE),
    "an array beside": (beside("prfl", ArrayRecord([np.zeros(3)])), NONE),
    "metrics beside": (beside("metrics", MetricRecord({"num-examples": -1, "x": [math.nan] * 99})), NONE),
    "second array": (lambda d: RecordDict({**long(d), "prfl": ArrayRecord([np.zeros(3), np.zeros(2)])}), NONE),
    "ten thousand arrays": (many, NONE),
    "an ndarray": (lambda d: RecordDict({**long(d), "prfl": ArrayRecord([np.frombuffer(d, np.uint8)])}), NONE),
    "type": (record(dtype="float32"), NONE),
    "type of another type": (record(dtype=["uint8"]), NONE),
    "encoding": (record(stype="numpy.ndarray"), NONE),
    "text data": (record(data="prfl"), NONE),
    "no data": (record(data=None), NONE),
    "a view": (record(data=memoryview(b"prfl")), NONE),
}
FORGED_ERRORS: dict[str, tuple[Error, str]] = {
    "megabytes": (Error(RAISED, "x" * 2**22), "^x{200}$"),
    "megabytes of lines": (Error(RAISED, "no\n" * 2**20), "^no$"),
    "control characters": (Error(RAISED, "\x1b[31mred\x00\x07\u202e\r\u2028more\ud800"), r"^\[31mred +more$"),
    "blank": (Error(RAISED, " \n\t\n " * 10**5), "^Flower error 2$"),
    "no reason": (Error(10**9, None), "^Flower error 1000000000$"),
    "given up": (Error(RAISED, "given up!"), "^given up!$"),
    "a shortage without sense": (Error(RAISED, "memory: needs 1.0 MB of 2.0 MB"), "^memory: needs 1.0 MB of 2.0 MB$"),
}


def tame(reason: str) -> bool:
    return 0 < len(reason) <= 200 and reason.isprintable()


def one_reply(answer: Callable[[Message], Message | None]) -> Arrival:
    grid = Nodes(2)
    grid.answers[HOSTILE] = answer
    found = transport(grid)
    found.send(task(0))
    arrival = found.wait()
    assert arrival is not None
    assert found.busy() == 0
    assert found.idle() == [0, 1]
    return arrival


@pytest.mark.parametrize("kind", FORGED)
def test_forged_replies_are_refused_with_the_reason_and_little_memory(kind: str) -> None:
    forge, reason = FORGED[kind]
    content = forge(encoded(task(0)))
    one_reply(right)  # what is imported and cached once
    tracemalloc.start()
    arrival = one_reply(lambda m: Message(content, reply_to=m))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert arrival.task.client == 0
    assert arrival.update is None
    assert re.search(reason, arrival.reason), arrival.reason
    assert tame(arrival.reason)
    assert peak < 8 * 2**20


@pytest.mark.parametrize("kind", FORGED_ERRORS)
def test_forged_errors_are_short_lines(kind: str) -> None:
    error, reason = FORGED_ERRORS[kind]
    arrival = one_reply(lambda m: Message(error, reply_to=m))
    assert arrival.update is None
    assert re.search(reason, arrival.reason), arrival.reason
    assert tame(arrival.reason)


def test_a_right_answer_is_let_in_and_so_is_another_mask_of_this_model() -> None:
    arrival = one_reply(right)
    assert arrival.update is not None
    mask = Mask({"fc1.weight": torch.arange(64 * 16).view(16, 64) % 2 == 0})

    def masked(message: Message) -> Message:
        of = asked(message)
        delta = {k: mask.gather(k, v) for k, v in local().params.items()}
        return Message(pack(encoded(of, mask=mask, delta=delta)), reply_to=message)

    arrival = one_reply(masked)
    assert arrival.update is not None
    assert arrival.update.mask.count("fc1.weight", (16, 64)) == 512


# Replies to what was not asked, twice, for others


def test_replies_to_what_was_never_sent_and_duplicates_change_nothing() -> None:
    grid = Nodes(2)
    found = transport(grid)
    genuine = grid.pull_messages

    def pull(message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(genuine(message_ids))
        strays = []
        for reply in replies:
            for other in ("never", "m999", "", reply.metadata.reply_to_message_id):
                stray = Message(pack(b"x"), reply_to=grid.asked[0])
                stray.metadata.__dict__["_reply_to_message_id"] = other
                strays.append(stray)
        return [*strays[:3], *replies, *strays, *replies]

    grid.pull_messages = pull  # type: ignore[method-assign]
    found.send(task(0))
    found.send(task(1))
    came = [found.wait(), found.wait(), found.wait(found.now() + 0.05)]
    assert [a is not None and a.update is not None for a in came] == [True, True, False]
    assert (found.busy(), found._sent, found._queries) == (0, {}, {})


def test_a_node_that_says_it_is_another_node_is_taken_for_itself() -> None:
    grid = Nodes(2)
    stranger = grid.join(5, node=77)
    genuine = grid.reply

    def reply(message: Message) -> Message | None:
        answer = genuine(message)
        if answer is not None and message.metadata.dst_node_id == stranger:
            answer.metadata.__dict__["_src_node_id"] = HOSTILE
        return answer

    grid.reply = reply  # type: ignore[method-assign]
    found = transport(grid, 3)
    found.send(task(5))
    assert grid.asked[-1].metadata.dst_node_id == stranger
    found.send(task(0))
    assert grid.asked[-1].metadata.dst_node_id == HOSTILE
    arrivals = [found.wait(), found.wait()]
    assert sorted(a.task.client for a in arrivals if a and a.update) == [0, 5]


def test_an_answer_for_another_client_is_refused() -> None:
    def of_another(message: Message) -> Message:
        return Message(pack(encoded(task(1))), reply_to=message)

    assert one_reply(of_another).reason == "client 1, version 0, not 0, 0 as asked"


WHO: dict[str, dict[str, Any]] = {
    "huge": {"client": 2**64, "profile": "p"},
    "digits": {"client": "9" * 5000, "profile": "p"},
    "text": {"client": "7", "profile": "p"},
    "bool": {"client": True, "profile": "p"},
    "list": {"client": [1, 2], "profile": "p"},
    "negative": {"client": -(2**62), "profile": "p"},
    "long": {"client": 7, "profile": "p" * 10**6},
    "terminal": {"client": 7, "profile": "\x1b[2J"},
    "bytes": {"client": 7, "profile": b"p"},
    "nothing": {},
}


@pytest.mark.parametrize("kind", WHO)
def test_a_node_that_names_itself_with_nonsense_gets_no_task(kind: str) -> None:
    grid = Nodes(1)
    stranger = grid.join(1)
    genuine = grid.reply
    grid.reply = lambda m: (  # type: ignore[method-assign]
        Message(pack(b"", WHO[kind]), reply_to=m) if m.metadata.dst_node_id == stranger else genuine(m)
    )
    found = transport(grid, 1)
    for _ in range(3):
        found._pull()
        assert found.idle() == [0]
    assert found.classes.keys() == {0}


# Scores


def test_scores_that_are_nonsense_do_not_reach_the_means() -> None:
    Nodes()
    question = Message(pack(b""), dst_node_id=HOSTILE, message_type="evaluate")
    question.metadata.__dict__["_message_id"] = "q"

    def scores(**values: Any) -> Message:
        return Message(RecordDict({"metrics": MetricRecord(values)}), reply_to=question)

    strategy = PruningStrategy(Method(), sync(2), experiment=EXPERIMENT)
    odd = scores(accuracy=1.0)
    odd.__dict__["_content"] = "no records"
    assert strategy.aggregate_evaluate(1, [odd]) is None
    many = {"num-examples": 1.7e308, "accuracy": 1.0}
    told = strategy.aggregate_evaluate(
        1, [scores(**{"num-examples": 4, "accuracy": 0.5, "loss": 1.0}), scores(**many), scores(**many)]
    )
    assert told is not None
    assert dict(told) == {"num-examples": 4, "accuracy": 0.5, "loss": 1.0}
    for bad in (math.nan, math.inf, 3, [0.5]):
        told = strategy.aggregate_evaluate(
            1,
            [
                scores(**{"num-examples": 4, "accuracy": 0.5, "loss": 1.0}),
                scores(**{"num-examples": 4, "loss": 2.0, "accuracy": bad}),
            ],
        )
        assert told is not None
        assert dict(told) == {"num-examples": 8, "loss": 1.5}


# The worst that is let in


@pytest.mark.parametrize("name", sorted(table.METHODS))
def test_the_worst_that_is_let_in_never_ends_a_run(name: str) -> None:
    """A client at every bound of the codec, with a metric at the end of floats; the rest answers as it should."""
    grid = Nodes(4)
    options = {"name": name, **OPTIONS.get(name, {})} | ({"levels": [1.0, 0.5]} if name == "heterofl" else {})
    method, arch = table.method(options, Work(steps=1, batch=4)), architecture()
    shared = Layout.of(local().params, arch.groups)

    def answer(message: Message, wild: bool) -> Message:
        of = Codec().decode_task(unpack(message.content)[0], shared)
        sign = 1.0 if of.version % 2 else -1.0
        update = honest(of)
        if wild:
            delta = {k: torch.full_like(v, sign * 1e6) for k, v in update.delta.items()}
            losses = {"loss": 1.7e308 * sign, "loss_first": 1.7e308, "loss_last": -1.7e308}
            metrics = {
                **losses,
                "accuracy": -1.7e308,
                "samples": 0.0,
                "steps": 1e308,
                "class/999999999": 1.0,
                "class/-1": 1.0,
            }
            update = replace(update, delta=delta, weight=1e15 if of.version % 2 else 1e-6, metrics=metrics)
        if of.work.report:
            every = {k: update.delta[k].abs() for k in shared.shapes}
            update = replace(update, signal={k: torch.full_like(v, 9e19 if wild else 1.0) for k, v in every.items()})
        return Message(pack(Codec().encode_update(update, of, shared)[0]), reply_to=message)

    for client in range(4):
        grid.answers[1000 - 7 * client] = lambda m, wild=client == 0: answer(m, wild)
    found = GridTransport(grid, Codec(), shared, {}, timeout=20, poll=0.001)
    found.enrol(4)
    state = method.init(local().params, arch, found.classes)
    last = serve(method, buffered(4, 2), found, state, stop=lambda s, now: s.version == 12)
    assert last.version == 12
    assert all(bool(v.isfinite().all()) for v in last.params.values())


# Ten thousand


class Taken(Nodes):
    """Nodes whose replies are taken apart and put together by Flower, as on the way through a SuperLink.

    `spoil` may change the parts. As there, what was pulled together with a reply that can not be read is gone.
    """

    def __init__(self, clients: int, spoil: Callable[[dict[str, bytes], str], tuple[dict[str, bytes], str]]):
        super().__init__(clients)
        self.spoil, self.gone = spoil, dict[str, Message]()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        self.asked.clear()  # the memory of this run is measured
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        lost = [self.gone.pop(m) for m in wanted if m in self.gone]
        here = {m: self._waiting[m] for m in wanted if m in self._waiting}
        replies = [(m, reply) for m in here if (reply := self.reply(here[m])) is not None]
        for m, _ in replies:
            self.gone[m] = Message(Error(GONE, "Message Unavailable"), reply_to=self._waiting.pop(m))
        out = []
        for m, reply in replies:
            out.append(reply if here[m].metadata.message_type == "query" else self.through(reply))
        for reply in out:  # who pulls it will not ask for it again
            self.gone.pop(reply.metadata.reply_to_message_id, None)
        return lost + out

    def through(self, reply: Message) -> Message:
        reply.metadata.__dict__["_message_id"] = "r"
        parts = {k: v.deflate() for k, v in get_all_nested_objects(reply).items()}
        parts, root = self.spoil(parts, reply.object_id)
        message: Any = inflate_object_from_contents(root, parts)
        message.metadata.__dict__["_message_id"] = "r"
        return message  # type: ignore[no-any-return]


LENGTHS = (0, 1, 24, 2**12, 2**40, 2**64 - 1)


def mutate(data: bytes, draw: np.random.Generator) -> bytes:
    out, size = bytearray(data), len(data)
    if not size:
        return draw.bytes(9)
    at = int(draw.integers(size))
    match int(draw.integers(7)):
        case 0:
            out[at] ^= 1 << int(draw.integers(8))
        case 1:
            del out[at:]
        case 2:
            out[at:at] = draw.bytes(int(draw.integers(1, 40)))
        case 3:
            out[at : at + 4] = struct.pack("<I", int(draw.choice([0, 1, 7, 255, 2**31, 2**32 - 1])))
        case 4:
            where = 16 + 8 * int(draw.integers(5))
            out[where : where + 8] = struct.pack("<Q", LENGTHS[int(draw.integers(6))])
        case 5:
            other = int(draw.integers(size))
            out[at : at + 8], out[other : other + 8] = out[other : other + 8], out[at : at + 8]
        case _:
            out[at : at + 8] = draw.bytes(8)
    return bytes(out)


def spoiler(draw: np.random.Generator) -> Callable[[dict[str, bytes], str], tuple[dict[str, bytes], str]]:
    """Changes one of Flower's objects in a fifth of the replies, and puts right what SuperLinks look at."""

    def spoil(parts: dict[str, bytes], root: str) -> tuple[dict[str, bytes], str]:
        if draw.random() > 0.2:
            return parts, root
        old = list(parts)[int(draw.integers(len(parts)))]
        head, _, body = parts[old].partition(b"\0")
        kind, children, _ = head.decode().split(" ")
        body = mutate(body, draw)
        if draw.random() < 0.2:
            kind = str(draw.choice(["Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "ConfigRecord"]))
        if draw.random() < 0.1:
            children = ""
        content = f"{kind} {children} {len(body)}".encode() + b"\0" + body
        validate_object_content(content)  # a SuperLink lets it pass
        new = get_object_id(content)
        changed = {new if k == old else k: v.replace(old.encode(), new.encode()) for k, v in parts.items()}
        changed[new] = content
        return changed, new if old == root else root

    return spoil


def test_ten_thousand_mutations_leave_the_run_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    draw, counts = np.random.default_rng(11), {"refused": 0, "used": 0}
    clients, total = 40, 10_000
    caplog.set_level(logging.CRITICAL, "prfl")  # pytest would keep every line
    grid = Taken(clients, spoiler(np.random.default_rng(12)))
    resident: list[int] = []
    lines: set[str] = set()
    mask = Mask({"fc1.weight": torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.3})

    def answer(message: Message) -> Message:
        of, kind = asked(message), int(draw.integers(8))
        changes: dict[str, Any] = {}
        if kind == 0:
            changes = {"mask": mask, "delta": {k: mask.gather(k, v) for k, v in local().params.items()}}
        if kind == 1:
            changes = {"signal": {k: torch.ones(v.numel()) for k, v in local().params.items()}}
        data = Codec(("float32", "float16", "int8")[kind % 3]).encode_update(honest(of, **changes), of, layout())[0]
        if draw.random() < 0.95:
            data = mutate(data, draw)
            if draw.random() < 0.7 and len(data) > 4:
                data = fixed(data)
        return Message(pack(data), reply_to=message)

    def watched(state: State, arrivals: Any) -> tuple[Tree, Any]:
        for a in arrivals:
            assert a.update is not None
            assert (a.update.client, a.update.version) == (a.task.client, a.task.version)
            for k, v in a.update.delta.items():
                assert v.shape == (a.update.mask.count(k, layout().shapes[k]),)
                assert bool((v.abs() <= 1e6).all())
            assert 1e-6 <= a.update.weight <= 1e15
            assert all(math.isfinite(m) for m in a.update.metrics.values())
        return state.params, None

    class quiet:  # a merge that looks at all and learns nothing
        def init(self) -> None: ...
        def __call__(self, state: State, arrivals: Any) -> tuple[Tree, Any]:
            return watched(state, arrivals)

    def log(event: Any) -> None:
        if event["kind"] == "arrival":
            counts["used" if event["used"] else "refused"] += 1
            assert event["used"] == (event["reason"] == "")
            assert event["used"] or tame(event["reason"])
            assert 0 <= event["client"] < clients
            lines.add(re.sub(r"\d[\d.e+-]*|'.*'", "#", event["reason"]))
            if sum(counts.values()) % (total // 5) == 0:
                resident.append(memory.resident())

    for client in range(clients):
        grid.answers[1000 - 7 * client] = answer
    found = GridTransport(grid, Codec(), layout(), {}, timeout=60, poll=0.001)
    found.enrol(clients)
    method = Method(merge=quiet(), remask=never(), work=Work(steps=1, report="gradient", scope="all"))
    state = serve(
        method,
        buffered(clients, 20),
        found,
        method.init(local().params),
        stop=lambda s, now: sum(counts.values()) >= total,
        log=log,
    )
    assert counts["used"] > total / 50
    assert counts["refused"] > total / 2
    assert state.version > 10
    assert len(lines) > 15
    assert {"an answer that can not be read", "checksum", "another model", "NaN in fc#weight"} <= lines
    assert len(found._sent) <= clients
    assert not found._queries
    assert resident[-1] - resident[0] < 20 * 2**20


def test_a_reply_that_flower_can_not_read_harms_nobody_for_long() -> None:
    def spoil(parts: dict[str, bytes], root: str) -> tuple[dict[str, bytes], str]:
        return ({"0": b"Message  3\0\xff\xff\xff"}, "0") if b"spoil" in b"".join(parts.values()) else (parts, root)

    grid = Taken(3, spoil)
    grid.answers[HOSTILE] = lambda m: Message(pack(b"spoil"), reply_to=m)
    for node in (1000 - 7, 1000 - 14):
        grid.answers[node] = right
    found = GridTransport(grid, Codec(), layout(), {}, timeout=20, poll=0.001)
    found.enrol(3)
    reasons: list[tuple[int, str]] = []
    method = table.method("fedavg", Work(steps=1))
    state = serve(
        method,
        sync(3),
        found,
        method.init(local().params),
        stop=lambda s, now: s.version == 5,
        log=lambda e: reasons.append((e["client"], e["reason"])) if e["kind"] == "arrival" else None,
    )
    assert state.version == 5
    assert {r for c, r in reasons if c == 0 and r} <= {"Message Unavailable", "an answer that can not be read"}
    assert (0, "an answer that can not be read") in reasons
    assert [r for c, r in reasons if c and r].count("Message Unavailable") <= 2  # only those of the first batch
    assert not found._sent
