"""Increments of nested sub-models: joined they are the sub-model to the bit, together they weigh little more."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from xxhash import xxh3_64_digest

from prfl import residual
from prfl.bitstream import Layout, Refused
from prfl.codec import Codec, Values
from prfl.cut import Cut
from prfl.masks import DENSE, Mask
from prfl.residual import Increment
from prfl.types import Group, Member, Task, Tree, Work

GROUPS = (
    Group(16, (Member("c1.weight", 0), Member("c1.bias", 0), Member("c2.weight", 1))),
    Group(12, (Member("c2.weight", 0), Member("c2.bias", 0), Member("fc.weight", 1, repeat=4))),
)
SHAPES = {
    "c1.weight": (16, 3, 3, 3),
    "c1.bias": (16,),
    "c2.weight": (12, 16, 3, 3),
    "c2.bias": (12,),
    "fc.weight": (10, 48),
}
SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)


def tree(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=draw) for k, shape in SHAPES.items()}


PARAMS = tree(0)
LAYOUT = Layout.of(PARAMS, GROUPS)


def ranked(unit: str, shares: tuple[float, ...] = SHARES, params: Tree = PARAMS) -> list[Mask]:
    cut = Cut(unit="channels") if unit == "channels" else Cut(spread=unit)
    ranking = cut.rank({k: v.abs() for k, v in params.items()}, params, GROUPS)
    return [ranking.mask(share) for share in shares]


SEQUENCES = {
    "layer": ranked("layer"),
    "erk": ranked("erk"),
    "model": ranked("model"),
    "channels": ranked("channels"),
    "one": ranked("layer", (0.2,)),
    "equal": ranked("layer", (0.2, 0.2)),
    "mixed": [
        Mask(
            {"fc.weight": torch.rand(10, 48, generator=torch.Generator().manual_seed(1)) < 0.3},
            {GROUPS[0]: torch.tensor([3, 7])},
        ),
        Mask({"fc.weight": torch.ones(10, 48, dtype=torch.bool)}, {GROUPS[0]: torch.tensor([3, 4, 7])}),
        DENSE,
    ],
}
every_sequence = pytest.mark.parametrize("masks", SEQUENCES.values(), ids=SEQUENCES.keys())


def sub_model(mask: Mask, params: Tree = PARAMS) -> Tree:
    return {k: mask.scatter(k, mask.gather(k, v), torch.zeros(v.shape)) for k, v in params.items()}


def bitwise(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a)


def over_the_wire(increments: list[Increment], values: Values = "float32") -> list[Increment]:
    out: list[Increment] = []
    for i in increments:
        out.append(residual.decode(residual.encode(i, LAYOUT, values), LAYOUT, out[-1].mask if out else None))
    return out


@every_sequence
def test_joined_increments_are_the_sub_model_of_every_rank(masks: list[Mask]) -> None:
    increments = residual.split(PARAMS, masks, version=4)
    received = over_the_wire(increments)
    for rank, mask in enumerate(masks, 1):
        for have in (increments[:rank], received[:rank]):
            params, joined = residual.join(have, LAYOUT)
            assert bitwise(params, sub_model(mask))
            assert joined.bits.keys() == mask.bits.keys()
            assert joined.channels.keys() == mask.channels.keys()
            assert all(torch.equal(joined.where(k, s), mask.where(k, s)) for k, s in SHAPES.items())


def test_a_hand_made_split() -> None:
    params = {"w": torch.tensor([[1.0, 2.0], [3.0, -0.0]]), "b": torch.tensor([5.0])}
    masks = [
        Mask({"w": torch.tensor(at).view(2, 2)}) for at in ([True, False, False, False], [True, False, True, True])
    ]
    first, second = residual.split(params, masks)
    assert [first.values[k].tolist() for k in ("w", "b")] == [[1.0], [5.0]]
    assert [second.values[k].tolist() for k in ("w", "b")] == [[3.0, -0.0], []]
    joined, _ = residual.join([first, second], Layout.of(params))
    assert joined["w"].tolist() == [[1.0, 0.0], [3.0, 0.0]]
    assert math.copysign(1, joined["w"][1, 1].item()) == -1


def message(params: Tree, mask: Mask, layout: Layout) -> int:
    return len(Codec().encode_task(Task(0, 0, params, mask, Work(), 0), layout))


@every_sequence
def test_all_increments_weigh_little_more_than_the_largest_sub_model(masks: list[Mask]) -> None:
    increments = residual.split(PARAMS, masks)
    total = sum(len(residual.encode(i, LAYOUT)) for i in increments)
    overhead = 0.0
    for before, mask in zip([None, *masks], masks, strict=False):
        lacks = sum(math.prod(SHAPES[k]) - (before.count(k, SHAPES[k]) if before else 0) for k in mask.bits)
        overhead += 80 + 8 * len(SHAPES) + lacks / 8
    assert total <= message(PARAMS, masks[-1], LAYOUT) + overhead


@pytest.mark.parametrize(("unit", "most"), [("layer", 1.06), ("model", 1.06), ("channels", 1.001)])
def test_a_large_model_costs_few_percent(unit: str, most: float) -> None:
    params = {"a.weight": torch.randn(200, 500), "b.weight": torch.randn(100, 200)}
    groups = (Group(200, (Member("a.weight", 0), Member("b.weight", 1))),)
    layout = Layout.of(params, groups)
    cut = Cut(unit="channels") if unit == "channels" else Cut(spread=unit)
    ranking = cut.rank({k: torch.rand(v.shape) for k, v in params.items()}, params, groups)
    masks = [ranking.mask(share) for share in SHARES]
    total = sum(len(residual.encode(i, layout)) for i in residual.split(params, masks))
    assert total <= most * message(params, masks[-1], layout)


def test_what_all_hold_travels_once() -> None:
    for later in residual.split(PARAMS, SEQUENCES["layer"])[1:]:
        assert all(len(later.values[k]) == 0 for k in ("c1.bias", "c2.bias"))


def test_known_masks_are_only_named() -> None:
    masks = SEQUENCES["layer"][:-1]
    before: Mask | None = None
    for old in residual.split(tree(1), masks, version=2):
        data = residual.encode(old, LAYOUT, known=True)
        assert len(data) < len(residual.encode(old, LAYOUT))
        back = residual.decode(data, LAYOUT, before, held=old.mask)
        assert bitwise(back.values, old.values)
        assert back.mask is old.mask
        with pytest.raises(Refused, match="holds another"):
            residual.decode(data, LAYOUT, before, held=DENSE)
        before = old.mask


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_lossy_increments_are_near(values: Values) -> None:
    params, _ = residual.join(over_the_wire(residual.split(PARAMS, SEQUENCES["layer"]), values), LAYOUT)
    assert all(bool(((params[k] - v).abs() <= v.abs().max() / 126).all()) for k, v in PARAMS.items())


@pytest.mark.parametrize(
    "masks",
    [
        SEQUENCES["layer"][::-1],
        SEQUENCES["channels"][1::-1],
        [SEQUENCES["layer"][1], SEQUENCES["channels"][1]],
        [DENSE, SEQUENCES["layer"][3]],
    ],
)
def test_masks_must_be_nested(masks: list[Mask]) -> None:
    with pytest.raises(ValueError, match="mask 2 lacks weights of mask 1"):
        residual.split(PARAMS, masks)


def test_only_the_first_increments_of_one_version_are_joined() -> None:
    one, two, three = residual.split(PARAMS, SEQUENCES["layer"][:3], version=4)
    for wrong in ([], [two], [one, three], [two, one], [one, replace(two, version=5)], [one, one]):
        with pytest.raises(ValueError, match="ranks 1, 2"):
            residual.join(wrong, LAYOUT)


def test_increments_that_do_not_fit_are_refused() -> None:
    one, two, _ = residual.split(PARAMS, SEQUENCES["layer"][:3])
    data = residual.encode(two, LAYOUT)
    for before in (None, two.mask, DENSE):
        with pytest.raises(Refused, match="builds on another"):
            residual.decode(data, LAYOUT, before)
    with pytest.raises(Refused, match="another model"):
        residual.decode(data, Layout.of(PARAMS), one.mask)
    with pytest.raises(Refused, match="checksum"):
        residual.decode(data[:-20] + bytes(16) + data[-4:], LAYOUT, one.mask)
    with pytest.raises(Refused, match="an increment was expected, not a task"):
        residual.decode(Codec().encode_task(Task(0, 0, PARAMS, DENSE, Work(), 0), LAYOUT), LAYOUT)
    broken = replace(one, values={**one.values, "fc.weight": one.values["fc.weight"] * math.nan})
    with pytest.raises(Refused, match=r"NaN in fc\.weight"):
        residual.decode(residual.encode(broken, LAYOUT), LAYOUT)
    channels, small = SEQUENCES["channels"][1], SEQUENCES["layer"][1]
    new = {k: int((channels.where(k, s) & ~small.where(k, s)).sum()) for k, s in SHAPES.items()}
    swapped = Increment(0, 2, small, channels, {k: torch.zeros(n) for k, n in new.items()})
    with pytest.raises(Refused, match="drops weights"):
        residual.decode(residual.encode(swapped, LAYOUT), LAYOUT, small)


def test_cuts_and_flips_are_refused() -> None:
    draw = torch.Generator().manual_seed(0)
    one, two = residual.split(PARAMS, SEQUENCES["mixed"][:2])
    data, valid = residual.encode(two, LAYOUT), 0
    for at in torch.randint(len(data) - 4, (2000,), generator=draw).tolist():
        for wrong in (data[:at], data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]):
            with pytest.raises(Refused):
                residual.decode(wrong, LAYOUT, one.mask)
            if len(wrong) > 4:  # with the checksum that an attacker would compute: refused, or a sub-model all the same
                with suppress(Refused):
                    got = residual.decode(wrong[:-4] + xxh3_64_digest(wrong[:-4])[-4:], LAYOUT, one.mask)
                    params, mask = residual.join([replace(one, version=got.version), replace(got, rank=2)], LAYOUT)
                    assert bitwise(params, sub_model(mask, params))
                    valid += 1
    assert 100 < valid < 2000
