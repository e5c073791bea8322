"""Masks against a dense textbook, over random models and every kind of mask."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prfl.cut import Cut
from prfl.masks import DENSE, Mask, positions, prunable
from prfl.overlap import coverage, distance, nested, union
from prfl.types import Group, Member, Tree

laws = settings(max_examples=60, deadline=None)


@st.composite
def models(draw: st.DrawFn) -> tuple[Tree, tuple[Group, ...]]:
    """A model of three groups: one on both axes of an entry, two side by side on one axis, one with repeats."""
    a, b, c = (draw(st.integers(1, 4)) for _ in range(3))
    kernel, repeat, free = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(0, 3))
    first = draw(st.booleans())  # which of the two comes first on the shared axis
    shapes = {
        "in": (a, 2, kernel),
        "in.bias": (a,),
        "square": (a, a),
        "side": (b, 3),
        "join": (c, a + b, kernel, 1),
        "fc": (3, c * repeat),
        "fc.bias": (3,),
        "free": (free, 2),
        "none": (0,),
        "scalar": (),
    }
    groups = (
        Group(
            a,
            (
                Member("in", 0),
                Member("in.bias", 0),
                Member("square", 0),
                Member("square", 1),
                Member("join", 1, offset=0 if first else b),
            ),
        ),
        Group(b, (Member("side", 0), Member("join", 1, offset=a if first else 0))),
        Group(c, (Member("join", 0), Member("fc", 1, repeat=repeat))),
    )
    return numbers(draw, shapes), groups


def numbers(draw: st.DrawFn, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}


@st.composite
def masks(draw: st.DrawFn, params: Tree, groups: tuple[Group, ...]) -> Mask:
    """Whole, bits only, channels only (of all groups, or of the last one alone), or both."""
    bits, channels = {}, {}
    if draw(st.booleans()):
        for k in sorted(draw(st.sets(st.sampled_from(sorted(params))))):
            chance, seed = draw(st.sampled_from((0.0, 0.3, 0.7, 1.0))), draw(st.integers(0, 2**31))
            bits[k] = torch.rand(params[k].shape, generator=torch.Generator().manual_seed(seed)) < chance
    for g in draw(st.sampled_from(((), groups, groups[2:]))):
        channels[g] = torch.tensor(sorted(draw(st.sets(st.integers(0, g.size - 1)))), dtype=torch.int64)
    return Mask(bits, channels)


@st.composite
def worlds(draw: st.DrawFn, count: int = 1) -> tuple[Tree, list[Mask]]:
    params, groups = draw(models())
    return params, [draw(masks(params, groups)) for _ in range(count)]


def kept(mask: Mask, entry: str, shape: tuple[int, ...]) -> Tensor:
    """The textbook: weight by weight, is it kept?"""
    if entry in mask.bits:
        return mask.bits[entry].clone()
    out = torch.ones(shape, dtype=torch.bool)
    for at in product(*map(range, shape)):
        for group, channels in mask.channels.items():
            for m in group.members:
                if m.entry == entry:
                    inside = at[m.axis] - m.offset
                    if 0 <= inside < group.size * m.repeat and inside // m.repeat not in channels.tolist():
                        out[at] = False
    return out


def dense(mask: Mask, params: Tree) -> dict[str, Tensor]:
    return {k: kept(mask, k, tuple(v.shape)) for k, v in params.items()}


@laws
@given(worlds())
def test_every_move_agrees_with_the_textbook(world: tuple[Tree, list[Mask]]) -> None:
    params, (mask,) = world
    for k, flags in dense(mask, params).items():
        full, before = params[k], torch.full_like(params[k], 2.0)
        values = mask.gather(k, full)
        assert torch.equal(mask.where(k, full.shape), flags)
        assert mask.count(k, full.shape) == int(flags.sum())
        assert torch.equal(values, full[flags].reshape(-1))  # row-major, as booleans select
        assert torch.equal(mask.scatter(k, values, before), torch.where(flags, full, before))
        assert torch.equal(before, torch.full_like(full, 2.0))
        total, count = before.clone(), before.clone()
        mask.add_into(k, total, values, -0.5)
        mask.count_into(k, count, 0.25)
        assert torch.equal(total, torch.where(flags, before - 0.5 * full, before))
        assert torch.equal(count, torch.where(flags, before + 0.25, before))
        assert torch.equal(mask.apply(params)[k], torch.where(flags, full, torch.zeros(())))
        if mask.whole(k):
            assert bool(flags.all())


@laws
@given(worlds())
def test_the_small_model_has_the_kept_channels(world: tuple[Tree, list[Mask]]) -> None:
    params, (mask,) = world
    cut = Mask(channels=mask.channels)
    for k, full in params.items():
        small = mask.slice(k, full)
        assert tuple(small.shape) == mask.shape(k, full.shape)
        assert torch.equal(small.flatten(), cut.gather(k, full))  # bits do not change the shape
        assert set(mask.sides(k)) <= set(range(full.dim()))


@laws
@given(worlds())
def test_packed_values_survive_a_round_trip(world: tuple[Tree, list[Mask]]) -> None:
    params, (mask,) = world
    for k, full in params.items():
        values = torch.arange(float(mask.count(k, full.shape)))
        placed = mask.scatter(k, values, full)
        assert torch.equal(mask.gather(k, placed), values)
        placed += 1.0  # a copy, whatever the mask
        assert torch.equal(values, torch.arange(float(len(values))))
        assert torch.equal(mask.gather(k, full), mask.gather(k, full.clone()))


@laws
@given(worlds())
def test_density_is_the_kept_share_of_weights_with_two_axes(world: tuple[Tree, list[Mask]]) -> None:
    params, (mask,) = world
    flags = [v for k, v in dense(mask, params).items() if params[k].dim() > 1]
    assert mask.density(params) == sum(int(f.sum()) for f in flags) / sum(f.numel() for f in flags)
    assert DENSE.density(params) == 1.0


@given(worlds())
@laws
def test_places_of_a_whole_model(world: tuple[Tree, list[Mask]]) -> None:
    params, (mask,) = world
    at = mask.places(params)
    if all(mask.whole(k) for k in params):
        assert at is None
        return
    flat = torch.cat([params[k].flatten() for k in sorted(params)])
    want = torch.cat([mask.gather(k, params[k]) for k in sorted(params)])
    assert at is not None
    assert torch.equal(flat[at.long()], want)
    assert at.dtype == torch.int32
    assert mask.places(params) is at
    assert all(list(mask.sides(k)) == sorted(mask.sides(k)) for k in params)  # whole rows are cut first


def test_a_model_without_weights_to_cut_is_whole() -> None:
    assert DENSE.density({"bias": torch.zeros(3), "void": torch.zeros(0, 2)}) == 1.0
    assert [prunable(torch.zeros(s)) for s in ((), (3,), (3, 1), (0, 2))] == [False, False, True, True]


@laws
@given(worlds(3))
def test_coverage_union_and_nesting(world: tuple[Tree, list[Mask]]) -> None:
    params, three = world
    flags = [dense(m, params) for m in three]
    counted, joined = coverage(three, params), union(three, params)
    for k in params:
        assert counted[k].dtype == torch.int32
        assert torch.equal(counted[k], sum(f[k].int() for f in flags))
        assert torch.equal(joined.where(k, params[k].shape), counted[k] > 0)
    assert not joined.channels
    for m, f in zip(three, flags, strict=True):
        assert nested(m, joined, params)
        assert nested(m, m, params)
        assert nested(m, DENSE, params)
        for other, g in zip(three, flags, strict=True):
            assert nested(m, other, params) == all(bool((g[k] | ~f[k]).all()) for k in params)


@laws
@given(worlds(3))
def test_distance_is_a_metric(world: tuple[Tree, list[Mask]]) -> None:
    params, (a, b, c) = world
    flags = [dense(m, params) for m in (a, b)]
    weights = [k for k, v in params.items() if v.dim() > 1]
    differ = sum(int((flags[0][k] != flags[1][k]).sum()) for k in weights)
    assert distance(a, b, params) == differ / sum(params[k].numel() for k in weights)
    assert 0.0 <= distance(a, b, params) == distance(b, a, params) <= 1.0
    assert distance(a, a, params) == 0.0
    assert distance(a, c, params) <= distance(a, b, params) + distance(b, c, params) + 1e-12


def test_unions_of_nothing_and_of_everything() -> None:
    params = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    half = Mask({"w": torch.tensor([[True, False], [False, True]])})
    assert coverage([], params)["w"].sum() == 0
    assert union([], params).count("b", (2,)) == 0
    assert union([half, DENSE], params).whole("w")
    assert distance(half, DENSE, params) == 0.5
    assert distance(half, DENSE, {"b": params["b"]}) == 0.0


def test_golden_bits_channels_and_both() -> None:
    group = Group(3, (Member("w", 1, repeat=2, offset=1), Member("b", 0)))
    rest = Group(1, (Member("w", 1),))
    w, b = torch.arange(14.0).view(2, 7), torch.arange(3.0)
    cut = Mask(channels={group: torch.tensor([0, 2]), rest: torch.tensor([0])})
    assert cut.sides("w")[1].tolist() == [0, 1, 2, 5, 6]  # rest lies before the group
    assert cut.gather("w", w).tolist() == [0, 1, 2, 5, 6, 7, 8, 9, 12, 13]
    assert cut.gather("b", b).tolist() == [0, 2]
    assert cut.shape("w", (2, 7)) == (2, 5)
    single = Mask({"w": w % 6 == 1}, cut.channels)  # an entry with bits is moved by its bits
    assert single.gather("w", w).tolist() == [1, 7, 13]
    assert (single.count("w", (2, 7)), single.shape("w", (2, 7))) == (3, (2, 5))
    assert single.gather("b", b).tolist() == [0, 2]
    assert single.density({"w": w, "b": b}) == 3 / 14


def test_what_is_cut_is_zero_whatever_it_was() -> None:
    wild = torch.tensor([[torch.nan, torch.inf], [-3.0, 4.0]])
    left = Mask({"w": torch.tensor([[False, False], [False, True]])}).apply({"w": wild})["w"]
    assert left.tolist() == [[0.0, 0.0], [0.0, 4.0]]
    assert not torch.signbit(left).any()  # no -0.0, which would be another model hash


@pytest.mark.parametrize("mask", [
    DENSE,
    Mask({"w": torch.tensor([[True, False, True], [False, True, True]])}),
    Mask(channels={Group(3, (Member("w", 1),)): torch.tensor([0, 2])}),
], ids=["whole", "bits", "channels"])  # fmt: skip
def test_order_is_row_major_even_in_transposed_memory(mask: Mask) -> None:
    plain = torch.arange(6.0).view(2, 3)
    turned = plain.t().contiguous().t()
    assert torch.equal(mask.gather("w", turned), mask.gather("w", plain))
    values = mask.gather("w", plain) + 10
    assert torch.equal(mask.scatter("w", values, turned), mask.scatter("w", values, plain))


def test_bits_in_transposed_memory() -> None:
    bits = torch.tensor([[True, False], [True, True], [False, True]])
    turned = Mask({"w": bits.t()})
    assert turned.gather("w", torch.arange(6.0).view(2, 3)).tolist() == [0, 1, 4, 5]
    assert turned.count("w", (2, 3)) == 4


def test_totals_may_be_wider_than_values_and_whole_numbers() -> None:
    mask, total = Mask({"w": torch.tensor([[True, False]])}), torch.zeros(1, 2, dtype=torch.float64)
    mask.add_into("w", total, torch.tensor([0.1], dtype=torch.float64), 1.0)
    assert total.tolist() == [[0.1, 0.0]]
    count = torch.zeros(1, 2, dtype=torch.int32)
    mask.count_into("w", count, 3)
    assert count.tolist() == [[3, 0]]


def test_a_mask_knows_its_ranking_but_does_not_keep_it() -> None:
    params = {"w": torch.arange(4.0).view(2, 2)}
    ranking = Cut().rank(params, params)
    half, whole = ranking.mask(0.5), ranking.mask(1)
    assert half.ranking is ranking
    assert whole.ranking is ranking
    assert DENSE.ranking is None
    gc.disable()  # masks lie in caches for long; no collector is needed to free what they were cut from
    try:
        del ranking
        assert half.ranking is None
    finally:
        gc.enable()
    assert half.gather("w", params["w"]).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 4099])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.05, 0.09, 0.11, 0.5, 1.0])
def test_positions_are_those_of_what_is_set(size: int, share: float) -> None:
    flags = np.random.default_rng(size).random(size) < share
    at = positions(flags)
    assert at.dtype == np.int64
    assert at.tolist() == [i for i, flag in enumerate(flags.tolist()) if flag]


def test_positions_follow_rows_in_transposed_memory() -> None:
    flags = np.zeros((40, 8), np.bool_).T
    flags[3, 5] = flags[1, 30] = True
    assert positions(flags).tolist() == [70, 125]
