"""The wire format: exact both ways, short, fast, and closed to everything that is no message."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from xxhash import xxh3_64_digest

from prfl.bitstream import ABSENT, Reader, decode_mask, decode_set, encode_mask, encode_set
from prfl.codec import Codec, Layout, Refused, digest
from prfl.envelope import BLOCK, TASK, seal, seal_values, unseal
from prfl.masks import DENSE, Mask
from prfl.types import Group, Member, Task, Tree, Update, Work

G1 = Group(8, (Member("c1.weight", 0), Member("c1.bias", 0), Member("c2.weight", 1)))
G2 = Group(6, (Member("c2.weight", 0), Member("c2.bias", 0), Member("fc.weight", 1, repeat=4)))
SHAPES = {
    "c1.weight": (8, 3, 3, 3),
    "c1.bias": (8,),
    "c2.weight": (6, 8, 3, 3),
    "c2.bias": (6,),
    "fc.weight": (10, 24),
    "scale": (),
    "nothing": (0, 4),
}


def tree(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=draw) * scale for k, shape in SHAPES.items()}


def bits(share: float, *names: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {k: torch.rand(SHAPES[k], generator=draw) < share for k in names or ("c1.weight", "c2.weight", "fc.weight")}


MODEL = tree()
LAYOUT = Layout.of(MODEL, (G1, G2))
MASKS = {
    "dense": DENSE,
    "half": Mask(bits(0.5)),
    "few": Mask(bits(0.02)),
    "most": Mask(bits(0.97)),
    "none": Mask(bits(0.0)),
    "all": Mask(bits(1.0)),
    "one entry": Mask(bits(0.3, "fc.weight")),
    "bias, scalar, empty": Mask(bits(0.5, "c1.bias", "scale", "nothing")),
    "channels": Mask(channels={G1: torch.tensor([0, 3, 7]), G2: torch.tensor([1, 2])}),
    "first channels": Mask(channels={G2: torch.arange(2)}),
    "all channels": Mask(channels={G1: torch.arange(8), G2: torch.arange(6)}),
    "no channel": Mask(channels={G1: torch.arange(0)}),
    "both": Mask(bits(0.4, "c1.weight"), {G1: torch.tensor([2, 5]), G2: torch.tensor([0, 5])}),
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def task_for(mask: Mask, work: Work = Work(), **more: int) -> Task:
    return replace(Task(3, 7, MODEL, mask, work, 2**63 + 11, 0.25), **more)


def update_for(mask: Mask, seed: int = 5, scale: float = 0.01) -> Update:
    delta = {k: mask.gather(k, v) for k, v in tree(seed, scale).items()}
    return Update(3, 7, delta, mask, 40.0, {"loss": 0.1 + 0.2, "seconds": 1e-300})


def same_tree(a: Tree, b: Tree) -> bool:
    """Bit for bit, so that -0.0 is not 0.0."""
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a
    )


def same_mask(a: Mask, b: Mask) -> bool:
    sides = a.channels.keys() == b.channels.keys() and all(
        torch.equal(a.channels[g], b.channels[g]) for g in a.channels
    )
    return sides and a.bits.keys() == b.bits.keys() and all(torch.equal(a.bits[k], b.bits[k]) for k in a.bits)


def kept(params: Tree, mask: Mask) -> Tree:
    return {k: mask.scatter(k, mask.gather(k, v), torch.zeros(v.shape)) for k, v in params.items()}


def fixed(data: bytes) -> bytes:
    """With the checksum that an attacker would compute."""
    return data[:-4] + xxh3_64_digest(data[:-4])[-4:]


def entropy(p: float) -> float:
    return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


# Sets


@given(st.integers(0, 3000), st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.95, 1.0]), st.integers(0, 99))
def test_sets_come_back(size: int, share: float, seed: int) -> None:
    flags = np.random.default_rng(seed).random(size) < share
    data = encode_set(flags)
    reader = Reader(memoryview(data + b"more"))
    back = decode_set(reader, size)
    assert back is not None
    assert back.dtype == np.bool_
    assert np.array_equal(back, flags)
    assert reader.at == len(data) <= 1 + (size + 7) // 8


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=12))
def test_sets_with_runs_come_back(runs: list[tuple[bool, int]]) -> None:
    flags = np.concatenate([np.zeros(0, np.bool_), *(np.full(n, value) for value, n in runs)])
    back = decode_set(Reader(memoryview(encode_set(flags))), len(flags))
    assert back is not None
    assert np.array_equal(back, flags)


def test_sets_by_hand() -> None:
    def flags(size: int, *at: int) -> np.ndarray:
        return np.isin(np.arange(size), at)

    assert encode_set(flags(3, 0, 1, 2)) == b"\1"
    assert encode_set(flags(40, 0, 1, 2)) == b"\2\3\0\0\0"
    assert encode_set(flags(10, 0, 2, 9)) == b"\3" + bytes([0b10100000, 0b01000000])
    # 2 of 256: 6 remainder bits; gaps 5 = 0b000101 and 14 = 0b001110, quotients 0 and 0, bit planes from the lowest
    gaps = struct.pack("<BIBI", 4, 2, 6, 2) + bytes([0b11000000, 0b10000000, 0b01000000, 0b11000000, 0b01000000, 0, 0])
    assert encode_set(flags(256, 5, 20)) == gaps
    assert encode_set(~flags(256, 5, 20)) == b"\5" + gaps[1:]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\6",
        b"\2\1",
        b"\2\0\1\0\0",
        b"\3\0",
        struct.pack("<BIBI", 4, 0, 6, 0),
        struct.pack("<BIBI", 4, 200, 1, 200) + bytes(100),
        struct.pack("<BIBI", 4, 2, 60, 2) + bytes(100),
        struct.pack("<BIBI", 4, 2, 6, 2**32 - 1) + bytes(100),
        struct.pack("<BIBI", 4, 2, 6, 3) + bytes(100),
        struct.pack("<BIBI", 4, 2, 7, 3) + b"\x60" + b"\xff" * 20,
        struct.pack("<BIBI", 4, 2, 63, 3) + b"\x60" + bytes(63),
    ],
)
def test_sets_that_are_none(data: bytes) -> None:
    with pytest.raises(Refused):
        decode_set(Reader(memoryview(data)), 256 - 1)


@every_mask
def test_masks_come_back(mask: Mask) -> None:
    back = decode_mask(Reader(memoryview(encode_mask(mask, LAYOUT))), LAYOUT)
    assert same_mask(back, mask)
    assert digest(back) == digest(mask)


def test_masks_on_top_of_a_smaller_one() -> None:
    big, small = bits(0.6), bits(0.2)
    for mask, before in (
        (Mask(big), Mask(small)),
        (DENSE, Mask(small)),
        (Mask(bits(1.0)), Mask(small)),
        (MASKS["all channels"], MASKS["channels"]),
        (Mask(big, {G1: torch.arange(5)}), Mask(small, {G1: torch.tensor([1, 4])})),
    ):
        data = encode_mask(mask, LAYOUT, before)
        assert same_mask(decode_mask(Reader(memoryview(data)), LAYOUT, before), mask)
    with pytest.raises(ValueError, match="not nested"):
        encode_mask(Mask(small), LAYOUT, Mask(big))


def test_a_mask_of_another_model_is_not_written() -> None:
    with pytest.raises(ValueError, match="no entry other"):
        encode_mask(Mask({"other": torch.ones(3, dtype=torch.bool)}), LAYOUT)
    with pytest.raises(ValueError, match="no group"):
        encode_mask(Mask(channels={replace(G1, size=9): torch.arange(2)}), LAYOUT)


def test_digests_tell_masks_apart_and_do_not_depend_on_order() -> None:
    assert len({digest(m) for m in MASKS.values()}) == len(MASKS)
    mixed = Mask(bits(0.4), {G1: torch.tensor([2, 5]), G2: torch.tensor([0, 5])})
    turned = Mask(dict(reversed(mixed.bits.items())), dict(reversed(mixed.channels.items())))
    assert digest(mixed) == digest(turned)
    assert len(digest(mixed)) == 8


def test_layouts_do_not_depend_on_order_but_on_all_else() -> None:
    turned = Layout.of(dict(reversed(MODEL.items())), (G2, G1))
    assert turned.checksum == LAYOUT.checksum
    others = [
        Layout.of(MODEL),
        Layout.of(MODEL, (G1,)),
        Layout.of({**MODEL, "scale": torch.zeros(1)}, (G1, G2)),
        Layout.of({**MODEL, "more": torch.zeros(1)}, (G1, G2)),
        Layout.of(MODEL, (G1, replace(G2, size=7))),
    ]
    assert len({LAYOUT.checksum, *(other.checksum for other in others)}) == 6


# Messages, exactly


@every_mask
def test_tasks_come_back(mask: Mask) -> None:
    task = task_for(mask)
    back = Codec().decode_task(Codec().encode_task(task, LAYOUT), LAYOUT)
    assert same_tree(back.params, kept(MODEL, mask))
    assert same_mask(back.mask, mask)
    assert replace(back, params=task.params, mask=mask) == task


@every_mask
@pytest.mark.parametrize("other", ["dense", "both"])
def test_updates_come_back(mask: Mask, other: str) -> None:
    for task in (task_for(mask), task_for(MASKS[other])):
        update = update_for(mask)
        data, carry = Codec().encode_update(update, task, LAYOUT)
        back = Codec().decode_update(data, task, LAYOUT)
        assert carry is None
        assert same_tree(back.delta, update.delta)
        assert same_mask(back.mask, mask)
        assert replace(back, delta=update.delta, mask=mask) == update
        assert back.mask is task.mask or not same_mask(mask, task.mask)


@every_mask
@pytest.mark.parametrize("scope", ["kept", "all"])
def test_signals_come_back(mask: Mask, scope: str) -> None:
    task = task_for(mask, Work(report="gradient2", scope=scope))
    whole = {k: v.reshape(-1) if scope == "all" else mask.gather(k, v) for k, v in tree(9, 1e-6).items()}
    for signal in (whole, {"fc.weight": whole["fc.weight"]}, {}):
        update = replace(update_for(mask), signal=signal)
        back = Codec().decode_update(Codec().encode_update(update, task, LAYOUT)[0], task, LAYOUT)
        assert back.signal is not None
        assert same_tree(back.signal, signal)


def test_a_mask_is_sent_only_when_it_is_news() -> None:
    mask, codec = MASKS["half"], Codec()
    task = task_for(mask)
    with_mask, without = codec.encode_task(task, LAYOUT), codec.encode_task(task, LAYOUT, known=True)
    assert len(with_mask) - len(without) == len(encode_mask(mask, LAYOUT)) - 9
    back = codec.decode_task(without, LAYOUT, mask)
    assert back.mask is mask
    assert same_tree(back.params, kept(MODEL, mask))
    for held in (None, DENSE, MASKS["few"]):
        with pytest.raises(Refused, match="another"):
            codec.decode_task(without, LAYOUT, held)
    equal = Mask({k: v.clone() for k, v in mask.bits.items()})
    answers = [len(codec.encode_update(replace(update_for(mask), mask=m), task, LAYOUT)[0]) for m in (mask, equal)]
    assert answers[0] == answers[1]


def test_params_may_travel_apart() -> None:
    task, codec = task_for(MASKS["half"]), Codec()
    data = codec.encode_task(task, LAYOUT, known=True, apart=True)
    assert len(data) < 520
    joined = kept(MODEL, task.mask)
    assert codec.decode_task(data, LAYOUT, task.mask, joined).params is joined
    with pytest.raises(Refused, match="apart"):
        codec.decode_task(data, LAYOUT, task.mask)


def test_every_field_of_work_travels() -> None:
    values = {int: 12, float: 0.1 + 0.2}
    defaults = {f.name: f.default for f in fields(Work) if not isinstance(f.default, str)}
    changed = Work(
        **{k: not v if type(v) is bool else values[type(v)] for k, v in defaults.items()},
        loss="bce", absent="zero", statistics="static", report="change", window="last", scope="all",
    )  # fmt: skip
    assert not any(getattr(changed, f.name) == f.default for f in fields(Work))
    back = Codec().decode_task(Codec().encode_task(task_for(DENSE, changed), LAYOUT), LAYOUT)
    assert back.work == changed
    whole = Codec().decode_task(Codec().encode_task(task_for(DENSE, Work(lr=1, clip=1e17)), LAYOUT), LAYOUT)
    assert type(whole.work.lr) is float
    assert whole.work.clip == 1e17


@pytest.mark.parametrize("order", ["row", "channels last"])
def test_values_are_written_in_row_major_order(order: str) -> None:
    model = {"w": torch.arange(48.0).view(2, 3, 2, 4)}
    if order == "channels last":
        model["w"] = model["w"].to(memory_format=torch.channels_last)
    layout = Layout.of(model)
    data = Codec().encode_task(replace(task_for(DENSE), params=model), layout)
    assert np.frombuffer(unseal(data, TASK, layout, 4)[3].data[1:], "<f4").tolist() == list(range(48))


# Size and speed


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2, 0.1, 0.05, 0.01])
def test_messages_are_as_short_as_their_content(share: float) -> None:
    draw = torch.Generator().manual_seed(2)
    model = {"a.weight": torch.zeros(512, 3136), "a.bias": torch.zeros(512), "b.weight": torch.zeros(62, 512)}
    where = {k: torch.rand(v.shape, generator=draw) < share for k, v in model.items() if v.dim() > 1}
    layout, mask = Layout.of(model), Mask(where if share < 1 else {})
    data = Codec().encode_task(replace(task_for(mask), params=model), layout)
    ideal = 4 * sum(layout.sizes(mask)) + sum(b.numel() * entropy(b.float().mean().item()) for b in where.values()) / 8
    assert len(data) <= 1.02 * ideal


# Lossy settings


def test_a_codec_has_three_settings() -> None:
    assert [Codec(v).lossless for v in ("float32", "float16", "int8")] == [True, False, False]
    with pytest.raises(ValueError, match="float32, float16, int8"):
        Codec("float8")


@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1.0, 1e6, 1e34])
@pytest.mark.parametrize("values", ["float16", "int8"])
def test_lossy_errors_are_bounded(values: str, scale: float) -> None:
    params = tree(4, scale)
    params["fc.weight"][0, 0] = 4 * scale
    params["fc.weight"][1:] *= 1e-10
    params["c1.bias"][:] = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0))
    codec = Codec(values)
    back = codec.decode_task(codec.encode_task(replace(task_for(DENSE), params=params), LAYOUT), LAYOUT).params
    for k, v in params.items():
        top = v.abs().max() if v.numel() else torch.tensor(0.0)
        bound = torch.maximum(v.abs() * 2**-11, top * 2**-39) if values == "float16" else top / 127 * 1.00001
        assert bool(((back[k] - v).abs() <= bound).all()), k


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_what_is_too_small_becomes_zero_and_zero_stays(values: str) -> None:
    codec = Codec(values)
    for scale in (0.0, 1e-42):
        params = tree(4, scale)
        back = codec.decode_task(codec.encode_task(replace(task_for(DENSE), params=params), LAYOUT), LAYOUT).params
        assert all(bool(((back[k] - v).abs() <= 1e-41).all()) for k, v in params.items())


def test_int8_is_unbiased_and_drawn_from_the_seed() -> None:
    model = {"w": torch.tensor([1.0, 0.5003, -0.123, 0.0011, 0.0, -0.99])}
    layout, codec, runs = Layout.of(model), Codec("int8"), 4000
    tasks = [replace(task_for(DENSE), params=model, seed=seed) for seed in range(runs)]
    back = torch.stack([codec.decode_task(codec.encode_task(t, layout), layout).params["w"] for t in tasks])
    standard_error = 0.5 / 127 / runs**0.5  # a step times at most one half
    assert bool(((back.mean(0) - model["w"]).abs() <= 5 * standard_error + 1e-7).all())
    assert len(back.unique(dim=0)) > 4
    assert codec.encode_task(tasks[0], layout) == codec.encode_task(tasks[0], layout)


def test_draws_of_int8_are_independent_between_blocks() -> None:
    """A sum over 8 blocks errs as independent draws do; the same draws in every block would err 2.8 times as much."""
    blocks, runs = 8, 400
    values = torch.full((blocks * BLOCK,), 0.3 / 127)
    values[0] = 1.0
    sums = []
    for seed in range(runs):
        _, _, codes = seal_values("int8", [values], (seed,))
        sums.append(torch.as_tensor(codes)[BLOCK // 2 :: BLOCK].sum(dtype=torch.int64).item())
    expected = (0.3 * blocks * 0.7) ** 0.5
    assert np.mean(sums) == pytest.approx(0.3 * blocks, abs=4 * expected / runs**0.5)
    assert 0.9 * expected < np.std(sums) < 1.1 * expected


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_error_feedback_loses_nothing_but_the_last_carry(values: str) -> None:
    codec, carry = Codec(values), None
    wanted = {k: torch.zeros(s, dtype=torch.float64) for k, s in SHAPES.items()}
    arrived = {k: torch.zeros(s, dtype=torch.float64) for k, s in SHAPES.items()}
    masks = [MASKS[k] for k in ("dense", "half", "channels", "few", "both", "none", "all")]
    for version in range(28):
        mask = masks[version % len(masks)]
        task = task_for(mask, version=version)
        update = replace(update_for(mask, seed=version), version=version)
        data, carry = codec.encode_update(update, task, LAYOUT, carry=carry)
        got = codec.decode_update(data, task, LAYOUT)
        for k in SHAPES:
            mask.add_into(k, wanted[k], update.delta[k].double(), 1.0)
            mask.add_into(k, arrived[k], got.delta[k].double(), 1.0)
    assert carry is not None
    assert any(bool(v.any()) for v in carry.values())
    for k in SHAPES:
        assert torch.allclose(arrived[k] + carry[k], wanted[k], atol=1e-6)


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_a_lossy_signal_is_near_and_its_carry_stays_sound(values: str) -> None:
    task = task_for(MASKS["half"], Work(report="gradient2", scope="all"))
    signal = {k: v.reshape(-1) ** 2 for k, v in tree(3, 1e-5).items()}  # below what a bare float16 can tell from 0
    delta = {k: v.clone() for k, v in update_for(task.mask).delta.items()}
    delta["c1.bias"][2] = math.inf
    data, carry = Codec(values).encode_update(replace(update_for(task.mask), signal=signal), task, LAYOUT)
    back = Codec().decode_update(data, task, LAYOUT).signal
    assert back is not None
    assert all(bool(((back[k] - v).abs() <= v.max() / 126).all()) for k, v in signal.items() if len(v))
    _, carry = Codec(values).encode_update(replace(update_for(task.mask), delta=delta), task, LAYOUT)
    assert carry is not None
    assert all(bool(v.isfinite().all()) for v in carry.values())


# Nothing else gets in


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf")])
def test_not_finite_is_refused_by_name(values: str, bad: float, word: str) -> None:
    task, update = task_for(MASKS["half"], Work(scope="all")), update_for(MASKS["half"])
    update = replace(update, signal={"c2.bias": torch.zeros(6), "fc.weight": torch.zeros(240)})
    for tree_, prefix in ((update.delta, ""), (update.signal, "signal ")):
        broken = {k: v.clone() for k, v in tree_.items()}
        broken["fc.weight"][-1] = bad
        data, _ = Codec(values).encode_update(
            replace(update, **{"signal" if prefix else "delta": broken}), task, LAYOUT
        )
        named = "(NaN|Inf)" if values == "int8" else word  # a step of infinity hides which of both it was
        with pytest.raises(Refused, match=f"{named} in {prefix}fc.weight"):
            Codec().decode_update(data, task, LAYOUT)


def test_what_no_training_comes_to_is_refused() -> None:
    task = task_for(DENSE, Work(report="gradient2"))
    full = {k: torch.full((v.numel(),), 1.0) for k, v in MODEL.items()}

    def answer(delta: float = 1.0, signal: float = 1.0) -> Update:
        values = [{k: v * scale for k, v in full.items()} for scale in (delta, signal)]
        update = replace(update_for(DENSE), delta=values[0], signal=values[1])
        return Codec().decode_update(Codec().encode_update(update, task, LAYOUT)[0], task, LAYOUT)

    back = answer(-1e6, 9e19)
    assert back.signal is not None
    assert same_tree(back.delta, {k: v * -1e6 for k, v in full.items()})
    assert same_tree(back.signal, {k: v * 9e19 for k, v in full.items()})
    with pytest.raises(Refused, match=r"^1e\+30 in c1.bias, more than 1e\+06$"):
        answer(delta=-1e30)
    with pytest.raises(Refused, match=r"^2e\+20 in signal c1.bias, more than 1e\+20$"):
        answer(signal=2e20)


def test_parameters_may_be_as_large_as_floats_are() -> None:
    params = {k: torch.full(v.shape, -3e38) for k, v in MODEL.items()}
    back = Codec().decode_task(Codec().encode_task(replace(task_for(DENSE), params=params), LAYOUT), LAYOUT)
    assert same_tree(back.params, params)


REFUSED_UPDATES: dict[str, tuple[Callable[[Update], Update], str]] = {
    "weight 0": (lambda u: replace(u, weight=0.0), "weight 0"),
    "weight < 0": (lambda u: replace(u, weight=-1.0), "weight -1"),
    "weight NaN": (lambda u: replace(u, weight=math.nan), "weight nan"),
    "weight Inf": (lambda u: replace(u, weight=math.inf), "weight inf"),
    "weight huge": (lambda u: replace(u, weight=1e300), r"weight 1e\+300 is not within 1e-06 and 1e\+15"),
    "weight tiny": (lambda u: replace(u, weight=5e-324), "weight 4.94066e-324"),
    "metric NaN": (lambda u: replace(u, metrics={"loss": math.nan}), "metrics: 'loss'"),
    "metric Inf": (lambda u: replace(u, metrics={"loss": -math.inf}), "metrics: 'loss'"),
    "metric name": (lambda u: replace(u, metrics={"a\nb": 1.0}), "metrics"),
    "metrics too many": (lambda u: replace(u, metrics={f"m{i:08}": 1.0 for i in range(9999)}), "65536 bytes"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED_UPDATES.values(), ids=REFUSED_UPDATES.keys())
def test_updates_that_nobody_can_use(change: Callable[[Update], Update], reason: str) -> None:
    task = task_for(MASKS["half"])
    data, _ = Codec().encode_update(change(update_for(task.mask)), task, LAYOUT)
    with pytest.raises(Refused, match=reason):
        Codec().decode_update(data, task, LAYOUT)


# Delivered without being written


def delivered(values: str, update: Update, task: Task, carry: Tree | None = None) -> tuple[Update, Tree | None]:
    """What `deliver` makes of an update, held against writing and reading it."""
    codec = Codec(values)
    data, withheld = codec.encode_update(update, task, LAYOUT, carry=carry)
    back = codec.decode_update(data, task, LAYOUT)
    got, length, kept_back = codec.deliver(update, task, LAYOUT, carry=carry)
    assert length == len(data)
    assert (got.client, got.version, got.weight, got.metrics) == (back.client, back.version, back.weight, back.metrics)
    assert same_tree(got.delta, back.delta)
    assert list(got.delta) == list(back.delta)
    assert (got.signal is None) == (back.signal is None)
    assert got.signal is None or back.signal is None or same_tree(got.signal, back.signal)
    assert (got.mask is task.mask) == (back.mask is task.mask)
    assert same_mask(got.mask, back.mask)
    assert (withheld is None) == (kept_back is None)
    assert withheld is None or kept_back is None or same_tree(withheld, kept_back)
    return got, kept_back


@every_mask
@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
def test_delivering_is_writing_and_reading(values: str, mask: Mask) -> None:
    task, update = task_for(mask), update_for(mask)
    _, carry = delivered(values, update, task)
    delivered(values, update_for(mask, 6), task, carry)
    delivered(values, update_for(MASKS["both"]), task)
    delivered(values, replace(update, weight=3, metrics={}), task)
    for scope in ("kept", "all"):
        named = [k for k in reversed(SHAPES) if k not in ("c2.bias", "scale")]
        signal = {k: tree(8)[k].flatten() if scope == "all" else mask.gather(k, tree(8)[k]) for k in named}
        got, _ = delivered(values, replace(update, signal=signal), task_for(mask, Work(report="change", scope=scope)))
        assert got.signal is not None
        assert sorted(got.signal) == sorted(named)


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
def test_delivering_leaves_out_what_the_model_lacks_and_gradients(values: str) -> None:
    task, update = task_for(DENSE), update_for(DENSE)
    delta = {k: v.clone().requires_grad_() for k, v in reversed(update.delta.items())} | {"alien": torch.zeros(2)}
    got, _ = delivered(values, replace(update, delta=delta), task)
    assert list(got.delta) == list(LAYOUT.shapes)
    assert not any(v.requires_grad for v in got.delta.values())


def with_value(where: str, value: float) -> Callable[[Update], Update]:
    """The last value of an entry of an update's delta or signal, set."""

    def change(update: Update) -> Update:
        broken = {k: v.clone() for k, v in getattr(update, where).items()}
        broken["fc.weight"][-1] = value
        return replace(update, **{where: broken})

    return change


REFUSED = [change for change, _ in REFUSED_UPDATES.values()]
REFUSED += [with_value("delta", v) for v in (math.nan, math.inf, -math.inf, 2e6, -1e30)]
REFUSED += [with_value("signal", v) for v in (math.nan, math.inf, 2e20, -3e38)]
REFUSED += [lambda u: with_value("delta", math.nan)(replace(u, weight=0.0, metrics={"loss": math.nan}))]


@pytest.mark.parametrize("values", ["float32", "float16", "int8"])
@pytest.mark.parametrize("change", REFUSED)
def test_delivering_refuses_what_reading_refuses_with_the_same_text(
    values: str, change: Callable[[Update], Update]
) -> None:
    task, codec = task_for(MASKS["half"], Work(report="change")), Codec(values)
    sound = replace(update_for(task.mask), signal={"fc.weight": torch.ones(task.mask.count("fc.weight", (10, 24)))})
    codec.deliver(sound, task, LAYOUT)
    update = change(sound)
    data, _ = codec.encode_update(update, task, LAYOUT)
    with pytest.raises(Refused) as read:
        codec.decode_update(data, task, LAYOUT)
    with pytest.raises(Refused) as told:
        codec.deliver(update, task, LAYOUT)
    assert str(told.value) == str(read.value)


@pytest.mark.parametrize("sort", ["client", "mask", "shape"])
def test_delivering_says_what_cannot_be_written_as_writing_does(sort: str) -> None:
    task, update = task_for(MASKS["half"]), update_for(MASKS["half"])
    broken = {
        "client": replace(update, client=4),
        "mask": replace(update, mask=Mask({"alien": torch.ones(2, dtype=torch.bool)})),
        "shape": replace(update, delta={**update.delta, "c1.bias": torch.zeros(3)}),
    }[sort]
    with pytest.raises(ValueError, match=r".") as written:
        Codec().encode_update(broken, task, LAYOUT)
    with pytest.raises(ValueError, match=r".") as told:
        Codec().deliver(broken, task, LAYOUT)
    assert str(told.value) == str(written.value)


def test_messages_for_others_are_refused() -> None:
    codec, task = Codec(), task_for(MASKS["half"])
    data, _ = codec.encode_update(update_for(task.mask), task, LAYOUT)
    for other in (replace(task, client=4), replace(task, version=8)):
        with pytest.raises(Refused, match="client 3, version 7"):
            codec.decode_update(data, other, LAYOUT)
    with pytest.raises(Refused, match="another model"):
        codec.decode_update(data, task, Layout.of(MODEL))
    with pytest.raises(Refused, match="a task was expected, not an update"):
        codec.decode_task(data, LAYOUT)
    with pytest.raises(Refused, match="format 1, this side speaks 2"):
        codec.decode_update(fixed(data[:4] + b"\1" + data[5:]), task, LAYOUT)
    with pytest.raises(Refused, match="not a message"):
        codec.decode_update(b"PK\3\4" + data[4:], task, LAYOUT)
    with pytest.raises(Refused, match="checksum"):
        codec.decode_update(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], task, LAYOUT)
    for cut in (0, 1, 20, 60, len(data) - 1):
        with pytest.raises(Refused, match="truncated"):
            codec.decode_update(data[:cut], task, LAYOUT)
    with pytest.raises(Refused, match="3 bytes too many"):
        codec.decode_update(data + b"abc", task, LAYOUT)
    with pytest.raises(Refused, match="density"):
        codec.decode_task(codec.encode_task(replace(task, density=1.5), LAYOUT), LAYOUT)


def tampered(section: int, content: bytes) -> bytes:
    """A task with one section replaced: 1 is the work, 2 the mask, 3 the values."""
    parts = [bytes(r.data) for r in unseal(Codec().encode_task(task_for(DENSE), LAYOUT), TASK, LAYOUT, 4)]
    parts[section] = content
    return seal(TASK, LAYOUT, *([p] for p in parts))


WORK = vars(Work())


@pytest.mark.parametrize(
    "content",
    [
        {**WORK, "new": 1},
        {**WORK, "epochs": 1.5},
        {**WORK, "epochs": True},
        {**WORK, "epochs": 10**400},
        {**WORK, "lr": "0.1"},
        {**WORK, "lr": None},
        {**WORK, "lr": math.nan},
        {**WORK, "lr": math.inf},
        {**WORK, "lr": True},
        {**WORK, "scaler": 1},
        {**WORK, "loss": "mse"},
        {**WORK, "loss": ["bce"]},
        [WORK],
        7,
    ],
)
def test_work_that_is_none(content: object) -> None:
    with pytest.raises(Refused, match="work"):
        Codec().decode_task(tampered(1, json.dumps(content).encode()), LAYOUT)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe{}", b"{", b"[" * 60000, b'{"lr":' * 9000, b"9" * 5000, b" " * 70000]
)
def test_json_that_is_none(content: bytes) -> None:
    with pytest.raises(Refused, match="work"):
        Codec().decode_task(tampered(1, content), LAYOUT)


@pytest.mark.parametrize(
    ("section", "content"),
    [
        (0, bytes(31)),
        (2, b""),
        (2, b"\4"),
        (2, b"\1" + bytes([ABSENT] * 7)),
        (2, b"\0\0"),
        (2, b"\xff" + bytes(7)),
        (2, b"\1" + b"\2\xff\xff\xff\xff" * 7),
        (2, b"\2" + b"\2\x09\0\0\0" * 2),
        (3, b"\3"),
        (3, b"\0" * 9),
        (3, b"\1" + bytes(4)),
    ],
)
def test_sections_that_are_none(section: int, content: bytes) -> None:
    with pytest.raises(Refused):
        Codec().decode_task(tampered(section, content), LAYOUT)


def test_values_of_another_length_are_refused() -> None:
    values = bytes(unseal(Codec().encode_task(task_for(DENSE), LAYOUT), TASK, LAYOUT, 4)[3].data)
    for wrong in (values + b"\0", values + bytes(4), values[:-1], values[:-4]):
        with pytest.raises(Refused, match="values"):
            Codec().decode_task(tampered(3, wrong), LAYOUT)


def bombs() -> list[tuple[Layout, bytes]]:
    """Short messages that announce much; the models are of 40 kB."""
    model = {"w": torch.zeros(100, 100), "b": torch.zeros(100)}
    layout = Layout.of(model)
    work, fields_ = json.dumps(WORK).encode(), struct.pack("<QQQd", 1, 1, 1, 1.0)
    value = seal_values("float32", [torch.zeros(1)], (0,))
    huge = [b"\1\0" + struct.pack("<BIBI", 4, n, k, m) for n, k, m in [(2**32 - 1, 0, 2**32 - 1), (5000, 1, 2**31)]]
    out = [
        seal(TASK, layout, [fields_], [work], [mask], value) for mask in (*huge, b"\1\0\1", b"\1\2\xff\xff\xff\xff\1")
    ]
    plain = seal(TASK, layout, [fields_], [work], [b"\0"], value)
    for at in range(16, 48, 8):
        out += [fixed(plain[:at] + struct.pack("<Q", n) + plain[at + 8 :]) for n in (2**64 - 1, 2**40, 2**31)]
    return [(layout, data) for data in out]


def test_nothing_is_allocated_for_what_a_message_merely_announces() -> None:
    for layout, data in bombs():
        tracemalloc.start()
        with pytest.raises(Refused):
            Codec().decode_task(data, layout)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 500_000


def mutate(data: bytes, draw: np.random.Generator) -> bytes:
    out = bytearray(data)
    at = int(draw.integers(len(out)))
    match int(draw.integers(6)):
        case 0:
            out[at] ^= 1 << int(draw.integers(8))
        case 1:
            del out[at:]
        case 2:
            out[at:at] = draw.bytes(int(draw.integers(1, 20)))
        case 3:
            out[at : at + 4] = struct.pack("<I", int(draw.choice([0, 1, 7, 255, 2**31, 2**32 - 1])))
        case 4:  # a length of a section
            where = 16 + 8 * int(draw.integers(4))
            out[where : where + 8] = struct.pack("<Q", int(draw.integers(2**12)))
        case _:
            out[at : at + 8] = draw.bytes(8)
    return bytes(out)


def test_ten_thousand_mutations_are_refused_or_valid() -> None:
    draw, codec = np.random.default_rng(0), Codec()
    signal = {k: v.reshape(-1) for k, v in MODEL.items() if k != "scale"}
    work = Work(report="gradient", scope="all")
    tasks = [task_for(MASKS[k], work) for k in ("dense", "few", "channels", "both")]
    cases: list[tuple[bytes, Callable[[bytes], Task | Update]]] = []
    for i, task in enumerate(tasks):
        cases.append(
            (codec.encode_task(task, LAYOUT, known=i == 1), lambda d, t=task: codec.decode_task(d, LAYOUT, t.mask))
        )
        update = replace(update_for(MASKS["half"] if i % 2 else task.mask), signal=signal if i > 1 else None)
        data, _ = Codec(("float32", "float16", "int8")[i % 3]).encode_update(update, task, LAYOUT)
        cases.append((data, lambda d, t=task: codec.decode_update(d, t, LAYOUT)))
    passed = lines = 0
    for _ in range(10_000):
        data, decode = cases[int(draw.integers(len(cases)))]
        changed = mutate(data, draw)
        if changed == data:
            continue
        with pytest.raises(Refused):
            decode(changed)
        try:
            got = decode(fixed(changed) if len(changed) > 4 else changed)
        except Refused as reason:
            lines += str(reason).count("\n")
            continue
        passed += 1
        for name, values in (got.params if isinstance(got, Task) else got.delta).items():
            size = math.prod(SHAPES[name]) if isinstance(got, Task) else got.mask.count(name, SHAPES[name])
            assert values.numel() == size
            assert bool(values.isfinite().all())
        assert got.mask.bits.keys() <= SHAPES.keys()
        assert all(
            len(at) <= g.size and (not len(at) or 0 <= at.min() <= at.max() < g.size)
            for g, at in got.mask.channels.items()
        )
    assert lines == 0
    assert 100 < passed < 9_000


# Mistakes of this side


def test_what_cannot_be_written_is_said() -> None:
    codec, task, update = Codec(), task_for(MASKS["half"]), update_for(MASKS["half"])
    with pytest.raises(ValueError, match="not those of the layout"):
        codec.encode_task(replace(task, params={"a": torch.zeros(1)}), LAYOUT)
    with pytest.raises(ValueError, match="float64"):
        codec.encode_task(replace(task, params={k: v.double() for k, v in MODEL.items()}), LAYOUT)
    with pytest.raises(ValueError, match=r"client, version and seed must be in \[0, 2\^64\)"):
        codec.encode_task(replace(task, seed=-1), LAYOUT)
    with pytest.raises(ValueError, match="update of 3, 7"):
        codec.encode_update(update, replace(task, client=1), LAYOUT)
    with pytest.raises(ValueError, match=r"c1.bias: .* got nothing"):
        codec.encode_update(replace(update, delta={}), task, LAYOUT)
    with pytest.raises(ValueError, match=r"fc.weight"):
        codec.encode_update(replace(update, delta={**update.delta, "fc.weight": torch.zeros(3)}), task, LAYOUT)
    with pytest.raises(ValueError, match=r"fc.weight"):
        codec.encode_update(replace(update, signal={"fc.weight": torch.zeros(3)}), task, LAYOUT)


def test_requires_grad_is_no_obstacle() -> None:
    params = {k: v.clone().requires_grad_() for k, v in MODEL.items()}
    back = Codec().decode_task(Codec().encode_task(replace(task_for(DENSE), params=params), LAYOUT), LAYOUT)
    assert same_tree(back.params, MODEL)
