"""Rankings against a textbook in plain Python; nesting, never empty, exact shares; what PR-FL, ERK and HeteroFL say."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import ceil
from typing import Any
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prfl.cut import Cut, erk, n_of_m
from prfl.masks import Mask
from prfl.overlap import nested
from prfl.saliency import order
from prfl.types import Group, Member, Tree

laws = settings(max_examples=80, deadline=None)
SHAPES = {"a": (3, 4), "b": (2, 3, 2), "bias": (3,), "c": (1, 5), "head": (2, 2), "void": (0, 2), "scale": ()}
SHARES = st.one_of(st.floats(1e-12, 1.0), st.sampled_from((0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0)))
COSTS = st.none() | st.fixed_dictionaries(dict.fromkeys(SHAPES, st.sampled_from((0.25, 1.0, 4.0))))  # exact quotients

WIDE, FLAT = 5, 7  # channels
IN = Group(
    WIDE,
    (
        Member("in", 0),
        Member("in.bias", 0),
        Member("join", 1, offset=1),
        Member("self", 0),
        Member("self", 1),
    ),
)
ONE = Group(1, (Member("side", 0), Member("join", 1)))
OUT = Group(FLAT, (Member("join", 0), Member("fc", 1, repeat=3)))
GROUPS = (IN, ONE, OUT)
NET = {"in": (5, 2), "in.bias": (5,), "self": (5, 5), "side": (1, 2), "join": (7, 6, 2), "fc": (2, 21)}


def tree(shapes: Mapping[str, tuple[int, ...]], seed: int, levels: int) -> dict[str, Tensor]:
    """Whole numbers around zero, few of them, so that many tie; some zeros are -0.0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        sign = 1.0 - 2 * torch.randint(2, shape, generator=generator)
        return sign * torch.randint(levels + 1, shape, generator=generator)

    return {k: draw(shape) for k, shape in shapes.items()}


@st.composite
def trees(draw: st.DrawFn, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Tree, Tree]:
    """Scores and weights."""
    seed, levels = draw(st.integers(0, 2**30)), draw(st.sampled_from((0, 1, 3, 1000)))
    return tree(shapes, seed, levels), tree(shapes, seed + 1, levels)


def cuts(**fixed: Any) -> st.SearchStrategy[Cut]:
    free = {
        "spread": st.sampled_from(("layer", "erk", "model")),
        "floor": st.sampled_from((0.0, 0.07, 0.1, 0.25, 0.5, 1.0)),
        "core": st.sampled_from(("score", "magnitude")),
        "skip": st.sampled_from(((), ("head",), ("a", "head"))),
    }
    return st.builds(Cut, **{**free, **{k: st.just(v) for k, v in fixed.items()}})


channel_cuts = st.builds(
    Cut,
    unit=st.just("channels"),
    floor=st.sampled_from((0.0, 0.1, 0.4, 1.0)),
    core=st.sampled_from(("score", "magnitude")),
    width=st.sampled_from(("linear", "sqrt")),
    skip=st.sampled_from(((), ("side",), ("fc",))),
    multiple=st.sampled_from((1, 1, 2, 3)),
)


def best(keys: list[float], count: int) -> list[int]:
    """Positions of the largest keys; among equals the first."""
    return sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:count]


def up(x: float) -> int:
    return ceil(round(x, 6))


def textbook(
    cut: Cut, scores: Tree, params: Tree, costs: Mapping[str, float] | None, share: float
) -> dict[str, Tensor]:
    """The kept weights of every entry that can be cut, unit by unit."""
    names = [k for k, v in params.items() if v.dim() > 1 and v.numel() and not any(s in k for s in cut.skip)]
    sizes = {k: params[k].numel() for k in names}
    cost = {k: (costs or {}).get(k, 1.0) for k in names}
    score = {k: [s * cost[k] if s < 0 else s / cost[k] for s in scores[k].flatten().tolist()] for k in names}
    by = {k: params[k].abs().flatten().tolist() if cut.core == "magnitude" else score[k] for k in names}
    core = {k: set(best(by[k], max(1, up(cut.floor * sizes[k])))) for k in names}
    if cut.spread == "model":
        pool = [(k, i) for k in names for i in range(sizes[k])]
        keys = [float("inf") if i in core[k] else score[k][i] for k, i in pool]
        total = max(sum(map(len, core.values())), int(share * len(pool) + 1e-6))
        chosen = {pool[at] for at in best(keys, total)}
        kept = {k: {i for name, i in chosen if name == k} for k in names}
    else:
        shares = erk({k: params[k] for k in names}, share) if cut.spread == "erk" else dict.fromkeys(names, share)
        kept = {}
        for k in names:
            keys = [float("inf") if i in core[k] else s for i, s in enumerate(score[k])]
            kept[k] = core[k] | set(best(keys, max(len(core[k]), round(shares[k] * sizes[k]))))
    return {k: torch.tensor([i in kept[k] for i in range(sizes[k])]).view(params[k].shape) for k in names}


def places(mask: Mask, params: Tree) -> dict[str, Tensor]:
    return {k: mask.where(k, v.shape) for k, v in params.items()}


@laws
@given(cuts(), trees(SHAPES), COSTS, SHARES)
def test_weights_are_kept_as_the_textbook_says(
    cut: Cut, both: tuple[Tree, Tree], costs: Mapping[str, float] | None, share: float
) -> None:
    scores, params = both
    mask = cut.rank(scores, params, costs=costs).mask(share)
    wanted = textbook(cut, scores, params, costs, share) if share < 1 else {}
    for k, held in places(mask, params).items():
        assert torch.equal(held, wanted.get(k, torch.ones(SHAPES[k], dtype=torch.bool))), k
    assert set(mask.bits) <= set(wanted)
    assert not any(bool(bits.all()) for bits in mask.bits.values())  # all kept is whole


@laws
@given(cuts(), trees(SHAPES), COSTS, st.lists(SHARES, min_size=2, max_size=5))
def test_masks_of_weights_are_nested_and_never_empty(
    cut: Cut, both: tuple[Tree, Tree], costs: Mapping[str, float] | None, shares: list[float]
) -> None:
    scores, params = both
    ranking = cut.rank(scores, params, costs=costs)
    masks = [ranking.mask(share) for share in shares]  # in any order
    for share, mask in zip(shares, masks, strict=True):
        assert ranking.mask(share) is mask
        for k, v in params.items():
            assert mask.count(k, v.shape) >= min(v.numel(), max(1, up(cut.floor * v.numel())))
    ordered = [mask for _, mask in sorted(zip(shares, masks, strict=True), key=lambda pair: pair[0])]
    for small, big in pairwise(ordered):
        assert nested(small, big, params)
        assert small.density(params) <= big.density(params)


@laws
@given(cuts(spread="model", skip=()), trees(SHAPES), SHARES)
def test_the_share_of_the_model_is_exact_to_a_weight(cut: Cut, both: tuple[Tree, Tree], share: float) -> None:
    scores, params = both
    sizes = [v.numel() for v in params.values() if v.dim() > 1 and v.numel()]
    core = sum(max(1, up(cut.floor * n)) for n in sizes) / sum(sizes)
    got = cut.rank(scores, params).mask(share).density(params)
    assert got == core or got == pytest.approx(share, abs=1 / sum(sizes))
    assert got >= core
    assert got <= max(share, core) + 1e-6


@laws
@given(cuts(spread="layer", skip=(), floor=0.0), trees(SHAPES), SHARES)
def test_the_share_of_a_layer_is_rounded(cut: Cut, both: tuple[Tree, Tree], share: float) -> None:
    scores, params = both
    mask = cut.rank(scores, params).mask(share)
    for k, v in params.items():
        if v.dim() > 1 and v.numel():
            kept = mask.count(k, v.shape)
            assert abs(kept - share * v.numel()) <= 0.5 or kept == 1


@laws
@given(channel_cuts, trees(NET), st.lists(SHARES, min_size=1, max_size=4))
def test_channels_are_kept_as_the_textbook_says(cut: Cut, both: tuple[Tree, Tree], shares: list[float]) -> None:
    scores, params = both
    ranking = cut.rank(scores, params, GROUPS)
    by = {k: v.abs() for k, v in params.items()} if cut.core == "magnitude" else scores
    for share in shares:
        mask = ranking.mask(share)
        assert ranking.mask(share) is mask
        assert set(mask.channels) == (set(GROUPS) if share < 1 else set())
        for g, at in mask.channels.items():
            core = best(sums(g, by), max(1, up(cut.floor * g.size)))
            keys = [float("inf") if c in core else s for c, s in enumerate(sums(g, scores))]
            wide = up((share if cut.width == "linear" else share**0.5) * g.size)
            skipped = any(s in m.entry for s in cut.skip for m in g.members)
            steps = range(0, g.size + cut.multiple, cut.multiple)
            near = min(steps, key=lambda n: (abs(n - wide), -n))
            least = next(n for n in steps if n >= len(core))
            assert at.tolist() == sorted(best(keys, g.size if skipped else max(least, near)))
            assert len(at) >= 1
            assert at.dtype == torch.int64
    ordered = [ranking.mask(share) for share in sorted(shares)]
    assert all(nested(small, big, params) for small, big in pairwise(ordered))


def sums(group: Group, scores: Tree) -> list[float]:
    """Channel by channel, over all weights of all members with two axes or more."""
    out = []
    for c in range(group.size):
        total = 0.0
        for m in group.members:
            if scores[m.entry].dim() > 1:
                for i in range(m.repeat):
                    total += float(scores[m.entry].select(m.axis, m.offset + c * m.repeat + i).sum())
        out.append(total)
    return out


@given(st.integers(1, 300), st.sampled_from((1.0, 0.5, 0.25, 0.125, 0.0625, 0.1, 0.3, 0.7)), st.integers(1, 3))
@laws
def test_heterofl_takes_the_leading_channels(size: int, share: float, repeat: int) -> None:
    group = Group(size, (Member("w", 0), Member("b", 0), Member("next", 1, repeat=repeat, offset=2)))
    params = {"w": torch.zeros(size, 3, 5, 5), "b": torch.zeros(size), "next": torch.zeros(4, 2 + size * repeat)}
    mask = Cut(unit="channels", width="linear").rank(order()(params, None), params, (group,)).mask(share)
    wide = up(share * size)
    kept = mask.channels[group].tolist() if share < 1 else list(range(size))
    assert kept == list(range(wide))


def test_leading_channels_of_a_wide_layer() -> None:
    group = Group(2048, (Member("fc1", 0), Member("fc2", 1)))
    params = {"fc1": torch.zeros(2048, 3136), "fc2": torch.zeros(62, 2048)}
    ranking = Cut(unit="channels", width="linear").rank(order()(params, None), params, (group,))
    assert ranking.mask(0.0625).channels[group].tolist() == list(range(128))


def test_widths_golden() -> None:
    group = Group(10, (Member("w", 0), Member("v", 1)))
    params = {"w": torch.rand(10, 10), "v": torch.rand(10, 10)}
    counts = {
        width: [
            len(Cut("channels", width=width).rank(params, params, (group,)).mask(s).channels[group]) for s in shares
        ]
        for width, shares in (("linear", (0.01, 0.3, 0.31, 0.7)), ("sqrt", (0.0001, 0.09, 0.49, 0.5)))
    }
    assert counts == {"linear": [1, 3, 4, 7], "sqrt": [1, 3, 7, 8]}
    wide = Group(100, (Member("w", 0),))
    mask = Cut("channels", width="linear").rank({"w": torch.zeros(100, 1)}, {}, (wide,)).mask(0.07)
    assert mask.channels[wide].tolist() == [*range(7)]  # 0.07 * 100 is a little above 7


@pytest.mark.parametrize("share", [1e-300, 1e-20, 1e-12])
@pytest.mark.parametrize("width", ["linear", "sqrt"])
def test_the_smallest_share_keeps_a_channel_of_every_group(width: Any, share: float) -> None:
    scores = tree(NET, 0, 3)
    mask = Cut("channels", width=width).rank(scores, scores, GROUPS).mask(share)
    assert [len(mask.channels[g]) for g in GROUPS] == [1, 1, 1]


# PR-FL: the core by magnitude in every layer, then the model's best score per cost, clients by rising density.

LAYERS = {"a": torch.tensor([[4.0, -3.0], [2.0, 1.0]]), "b": torch.tensor([[1.0, 2.0, -3.0], [4.0, 5.0, -6.0]])}
SCORE = {"a": torch.tensor([[0.0, 0.0], [1.0, 8.0]]), "b": torch.tensor([[9.0, 6.0, 2.0], [1.0, 0.0, 0.0]])}
PR_FL = Cut(spread="model", floor=0.25, core="magnitude")
CORE = {("a", 0), ("b", 4), ("b", 5)}  # a quarter of 4 by |w|; of 6 it is 6 - int(0.75 * 6) = 2


def held(mask: Mask, params: Tree = LAYERS) -> set[tuple[str, int]]:
    return {(k, i) for k, v in places(mask, params).items() for i in v.flatten().nonzero().flatten().tolist()}


@pytest.mark.parametrize(
    ("costs", "growth"),
    [
        # a: 0 1 8 at 1, 2, 3 and b: 9/2 6/2 2/2 1/2 at 0, 1, 2, 3; the tie of 1 goes to the first layer
        ({"a": 1.0, "b": 2.0}, [("a", 3), ("b", 0), ("b", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 1)]),
        ({"a": 3e-6, "b": 6e-6}, [("a", 3), ("b", 0), ("b", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 1)]),
        (None, [("b", 0), ("a", 3), ("b", 1), ("b", 2), ("a", 2), ("b", 3), ("a", 1)]),
    ],
    ids=["per cost", "only ratios of costs count", "per weight"],
)
def test_pr_fl_grows_from_the_core(costs: Mapping[str, float] | None, growth: list[tuple[str, int]]) -> None:
    ranking = PR_FL.rank(SCORE, LAYERS, costs=costs)
    for share in (0.05, 0.1, 0.3):  # at or below the core's density
        assert held(ranking.mask(share)) == CORE
    for n in range(4, 11):
        assert held(ranking.mask(n / 10)) == CORE | set(growth[: n - 3])
        assert held(ranking.mask(min(1.0, n / 10 + 0.09))) == CORE | set(growth[: n - 3])  # int(share * 10)


def test_of_scores_below_zero_too_the_dear_weights_come_last() -> None:
    layers = {"dear": torch.zeros(1, 3), "cheap": torch.zeros(1, 3)}
    scores = {"dear": torch.tensor([[-1.0, -2.0, 4.0]]), "cheap": torch.tensor([[-1.0, -2.0, 4.0]])}
    ranking = Cut(spread="model", floor=0.0).rank(scores, layers, costs={"dear": 4.0, "cheap": 1.0})
    order = sorted((p, k, i) for k, v in ranking.places.items() for i, p in enumerate(v.flatten().tolist()))
    later = [(k, i) for _, k, i in order if i != 2]  # a layer's best is its core
    assert later == [("cheap", 0), ("cheap", 1), ("dear", 0), ("dear", 1)]


@pytest.mark.parametrize(
    ("size", "floor", "kept"), [(100, 0.05, 5), (101, 0.05, 6), (19, 0.05, 1), (100, 0.07, 7), (7, 0.2, 2)]
)
def test_the_core_is_what_lies_above_pr_fls_threshold(size: int, floor: float, kept: int) -> None:
    w = torch.arange(1.0, size + 1).view(1, -1)
    mask = Cut(spread="model", floor=floor, core="magnitude").rank({"w": -w}, {"w": w}).mask(1e-9)
    assert held(mask, {"w": w}) == {("w", i) for i in range(size - kept, size)}


def test_a_core_of_equals_is_the_first_of_them() -> None:
    w = torch.tensor([[1.0, -2.0, 2.0, -2.0]])
    ranking = Cut(spread="model", floor=0.5, core="magnitude").rank({"w": torch.zeros(1, 4)}, {"w": w})
    assert held(ranking.mask(0.5), {"w": w}) == {("w", 1), ("w", 2)}


def test_no_layer_of_the_model_starves() -> None:
    params = {"strong": torch.full((2, 5), 9.0), "weak": torch.tensor([[1.0, 3.0]])}
    mask = Cut(spread="model").rank(params, params).mask(0.5)
    assert held(mask, params) == {("strong", i) for i in range(5)} | {("weak", 1)}


def test_layers_golden() -> None:
    scores = {"w": torch.tensor([[3.0, 1.0], [3.0, 2.0]]), "b": torch.zeros(2)}
    ranking = Cut().rank(scores, scores)
    assert [ranking.mask(s).bits["w"].flatten().tolist() for s in (0.1, 0.25, 0.5, 0.75)] == [
        [True, False, False, False],
        [True, False, False, False],
        [True, False, True, False],
        [True, False, True, True],
    ]
    assert ranking.mask(0.9).whole("w")


# Erdos-Renyi-Kernel


def test_erk_golden() -> None:
    layers = {"a": torch.zeros(10, 10), "b": torch.zeros(20, 30)}
    assert erk(layers, 0.2) == pytest.approx({"a": 0.4, "b": 1 / 6})  # 140 weights over 20 + 50
    kernel = {"conv": torch.zeros(4, 2, 3, 3), "fc": torch.zeros(6, 6)}  # sums 12 and 12: as many weights of each
    assert erk(kernel, 0.25) == pytest.approx({"conv": 13.5 / 72, "fc": 13.5 / 36})


def test_erk_caps_and_hands_on() -> None:
    layers = {"tiny": torch.zeros(2, 2), "big": torch.zeros(10, 10)}
    assert erk(layers, 0.5) == pytest.approx({"tiny": 1.0, "big": 0.48})  # 52 weights: 4 and 48
    mask = Cut(spread="erk").rank(layers, layers).mask(0.5)
    assert mask.whole("tiny")
    assert mask.count("big", (10, 10)) == 48


@laws
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=5), SHARES)
def test_erk_adds_up_to_the_share(shapes: list[tuple[int, int, int]], share: float) -> None:
    layers = {str(i): torch.zeros(shape) for i, shape in enumerate(shapes)}
    shares = erk(layers, share)
    total = sum(v.numel() for v in layers.values())
    assert sum(shares[k] * v.numel() for k, v in layers.items()) == pytest.approx(share * total)
    assert all(0 < s <= 1 for s in shares.values())
    free = [k for k, s in shares.items() if s < 1]
    for k, v in layers.items():  # one factor for all that are not capped, and no smaller one for those that are
        for f in free:
            scale = shares[f] * layers[f].numel() / sum(layers[f].shape)
            assert shares[k] == pytest.approx(min(1.0, scale * sum(v.shape) / v.numel()))


# The order


@pytest.mark.parametrize("size", [7, 40_000])  # torch sorts short and long tensors differently
@pytest.mark.parametrize("levels", [0, 2, 10**6])
def test_the_order_is_stable_at_any_length(size: int, levels: int) -> None:
    scores = tree({"w": (1, size)}, 3, levels)
    falling = (scores["w"] + 0.0).flatten().argsort(descending=True, stable=True)
    for spread in ("layer", "model"):
        ranking = Cut(spread=spread).rank(scores, scores)
        for keep in (1, size // 3, size - 1):
            wanted = torch.zeros(size, dtype=torch.bool).index_fill_(0, falling[:keep], True)
            assert torch.equal(ranking.mask(keep / size).where("w", (1, size)).flatten(), wanted)


def test_every_float_has_its_place() -> None:
    falling = [3e38, 1.0, 0.99999994, 1e-45, -0.0, 0.0, -3e-45, -4e-45, -1.0, -3e38]  # both zeros are equal
    at = [4, 9, 0, 8, 7, 5, 3, 6, 1, 2]
    mixed = {"w": torch.tensor([[falling[i] for i in at]])}
    for spread in ("layer", "model"):
        ranking = Cut(spread=spread).rank(mixed, mixed)
        for n in range(1, 10):
            assert held(ranking.mask(n / 10), mixed) == {("w", at.index(i)) for i in range(n)}


def test_cheap_weights_with_huge_scores_stay_in_order() -> None:
    scores = {"a": torch.tensor([[3e38, 2e38, 1e38, 0.0]])}
    ranking = Cut(spread="model").rank(scores, scores, costs={"a": 1e-9})
    assert held(ranking.mask(0.5), scores) == {("a", 0), ("a", 1)}


def test_channels_with_huge_scores_stay_in_order() -> None:
    group = Group(3, (Member("w", 0), Member("v", 1)))
    scores = {"w": torch.tensor([[1e38] * 4, [3e38] * 4, [2e38] * 4]), "v": torch.zeros(1, 3)}
    ranking = Cut("channels", width="linear").rank(scores, scores, (group,))
    assert [ranking.mask(s).channels[group].tolist() for s in (1 / 3, 2 / 3)] == [[1], [1, 2]]


def test_the_same_ranking_comes_out_twice() -> None:
    scores, params = tree(SHAPES, 5, 2), tree(SHAPES, 6, 2)
    one, two = (PR_FL.rank(scores, params).mask(0.4) for _ in range(2))
    assert {k: b.tolist() for k, b in one.bits.items()} == {k: b.tolist() for k, b in two.bits.items()}


@pytest.mark.parametrize("cut", [Cut(), PR_FL, Cut("channels"), Cut("channels", core="magnitude")], ids=str)
def test_a_ranking_forgets_the_model_once_it_is_in_order(cut: Cut) -> None:
    scores, params = tree(NET, 0, 5), tree(NET, 1, 5)
    ranking, gone = cut.rank(scores, params, GROUPS), [ref(t) for both in (scores, params) for t in both.values()]
    del scores, params
    ranking.mask(1.0)  # needs no order
    assert any(tensor() is not None for tensor in gone)
    ranking.mask(0.5)
    assert all(tensor() is None for tensor in gone)
    assert ranking.mask(0.25).channels or ranking.mask(0.25).bits


# What is refused


def test_channels_in_multiples_golden() -> None:
    """Of 64: 3.2 want 8 at least, 10.9, so 11, are nearest to 8, 11.5, so 12, and 19.2, so 20, half of eight above."""
    wide, narrow = Group(64, (Member("w", 0),)), Group(6, (Member("v", 0),))
    scores = {"w": torch.arange(64.0).view(64, 1), "v": torch.rand(6, 1)}
    ranking = Cut("channels", width="linear", multiple=8).rank(scores, scores, (wide, narrow))
    for share, kept in ((0.05, 8), (0.17, 8), (0.18, 16), (0.3, 24), (0.99, 64)):
        channels = ranking.mask(share).channels
        assert channels[wide].tolist() == [*range(64 - kept, 64)]
        assert len(channels[narrow]) == 6  # fewer than eight stay whole


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_shares_outside_0_1_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"^density must be in \(0, 1\], got \S+$"):
        Cut().rank(LAYERS, LAYERS).mask(share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "layers"}, "unit must be one of weights, channels, got 'layers'"),
        ({"spread": "global"}, "spread must be one of layer, erk, model, got 'global'"),
        ({"core": "random"}, "core must be one of score, magnitude, got 'random'"),
        ({"width": "half"}, "width must be one of linear, sqrt, got 'half'"),
        ({"floor": -0.1}, r"floor must be in \[0, 1\], got -0.1"),
        ({"floor": float("nan")}, r"floor must be in \[0, 1\], got nan"),
        ({"unit": "channels", "spread": "erk"}, "channels are spread by layer or model, not 'erk'"),
        ({"multiple": 8}, "multiples are above 0, and of channels by layer; got 8 of weights by layer"),
        (
            {"unit": "channels", "multiple": 0},
            "multiples are above 0, and of channels by layer; got 0 of channels by layer",
        ),
        ({"skip": "head"}, "skip must be a list of parts of names, got 'head'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^cut: {message}$"):
        Cut(**options)


@pytest.mark.parametrize(
    ("scores", "costs", "message"),
    [
        ({"a": SCORE["a"]}, None, r"scores of b must have shape \(2, 3\), got none"),
        ({**SCORE, "b": torch.zeros(3, 2)}, None, r"scores of b must have shape \(2, 3\), got \(3, 2\)"),
        (SCORE, {"a": 1.0}, "the cost of b must be above 0, got none"),
        (SCORE, {"a": 1.0, "b": 0.0}, "the cost of b must be above 0, got 0.0"),
    ],
)
def test_scores_and_costs_are_checked(scores: Tree, costs: Mapping[str, float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^cut: {message}$"):
        Cut().rank(scores, LAYERS, costs=costs)


def test_channels_need_groups() -> None:
    with pytest.raises(
        ValueError, match=r"^cut: unit 'channels' needs a model with channel groups, this one has none$"
    ):
        Cut("channels").rank(LAYERS, LAYERS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cut", [Cut(), PR_FL, Cut("channels")], ids=str)
def test_scores_must_be_finite(cut: Cut, value: float) -> None:
    scores = tree(NET, 0, 3)
    scores["fc"][1, 2] = value
    ranking = cut.rank(scores, tree(NET, 1, 3), GROUPS)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^cut: scores of .* must be finite$"):
            ranking.mask(0.5)


@pytest.mark.parametrize("spread", ["layer", "erk", "model"])
def test_a_model_with_nothing_to_cut_stays_whole(spread: Any) -> None:
    params = {"bias": torch.zeros(3), "void": torch.zeros(0, 4), "head": torch.ones(2, 2)}
    mask = Cut(spread=spread, skip=("head",)).rank(params, params).mask(0.1)
    assert all(mask.whole(k) for k in params)


def test_a_skipped_group_is_whole_beside_others_on_its_axis() -> None:
    scores = tree(NET, 0, 3)
    mask = Cut("channels", skip=("in.bias",)).rank(scores, scores, GROUPS).mask(0.01)
    assert mask.sides("join")[1].tolist() == [0, 1, 2, 3, 4, 5]  # the only channel of `side`, and all of `in`
    assert mask.shape("fc", NET["fc"]) == (2, 3)


# N of M


def test_n_of_m_golden() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0]])
    assert n_of_m(scores, 2, 4).tolist() == [[False, True, False, True, True, True, False, False]]
    assert n_of_m(scores, 1, 2).tolist() == [[False, True, False, True, True, False, True, False]]


@laws
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**30), st.data())
def test_n_of_m_keeps_the_best_of_every_block(rows: int, blocks: int, m: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m))
    scores = tree({"w": (rows, 2, blocks * m)}, seed, 2)["w"]
    kept = n_of_m(scores, n, m)
    assert kept.shape == scores.shape
    for flags, values in zip(kept.reshape(-1, m).tolist(), scores.reshape(-1, m).tolist(), strict=True):
        assert [i for i, flag in enumerate(flags) if flag] == sorted(best(values, n))


@pytest.mark.parametrize(
    ("shape", "n", "m", "message"),
    [
        ((2, 6), 2, 4, r"a last axis divisible by 4, got shape \(2, 6\)"),
        ((), 1, 2, r"a last axis divisible by 2, got shape \(\)"),
        ((4,), 0, 4, "0 < N <= M, got 0:4"),
        ((4,), 5, 4, "0 < N <= M, got 5:4"),
        ((4,), 1, 0, "0 < N <= M, got 1:0"),
    ],
)
def test_n_of_m_refuses(shape: tuple[int, ...], n: int, m: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^N:M needs {message}$"):
        n_of_m(torch.zeros(shape), n, m)
