"""Arbitrary masks: the minimum covering index against counting, regions by hand, region-wise means as a textbook."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run import events, small
from test_server import of_kind, played
from world import CLIENTS, WORK, World, method

from prfl import models
from prfl.cut import Cut
from prfl.masks import DENSE, Mask
from prfl.overlap import coverage, covering
from prfl.regions import QUARTERS
from prfl.types import Group, Member, Tree
from sim.run import simulate
from strategies.pacing import buffered, sync

PARAMS: Tree = {"w": torch.arange(1.0, 9.0).view(2, 4), "v": torch.arange(1.0, 5.0).view(4, 1), "b": torch.zeros(2)}


def counted(masks: list[Mask], params: Tree) -> int:
    """The definition: the least of the numbers of holders."""
    return min(int(n.min()) for n in coverage(masks, params).values())


def missing(*regions: int) -> Mask:
    """Holds all of four regions but these."""
    held = torch.tensor([r not in regions for r in (1, 2, 3, 4)])
    return Mask({"v": held.view(4, 1)})


@pytest.mark.parametrize(
    ("masks", "index"),
    [
        ([DENSE] * 4 + [missing(4)] * 6, 4),
        ([DENSE] * 6 + [missing(4), missing(3), missing(3, 4), missing(3, 4)], 7),
        ([DENSE] * 4 + [missing(4)] * 2 + [missing(3)] * 2 + [missing(2)] * 2, 8),
        ([DENSE], 1),
        ([], 0),
        ([missing(1)], 0),
    ],
)
def test_the_examples_of_the_paper(masks: list[Mask], index: int) -> None:
    """Ten clients and four regions, as the paper draws them; then the least there can be."""
    assert covering(masks, PARAMS) == index


RANKS = [Cut(spread=spread).rank(tree, PARAMS) for spread, tree in
         (("layer", PARAMS), ("model", PARAMS), ("layer", {k: -v for k, v in PARAMS.items()}))]  # fmt: skip
GROUP = Group(4, (Member("w", 1), Member("v", 0)))
CHANNELS = Cut(unit="channels", width="linear").rank(PARAMS, PARAMS, (GROUP,))
POOL = [DENSE, Mask(channels={GROUP: torch.arange(4)}), missing(), missing(2)]
POOL += [r.mask(s) for r, s in itertools.product([*RANKS, CHANNELS], (0.2, 0.5, 0.9, 1.0))]
POOL += [RANKS[0].regions(kept) for kept in QUARTERS.values()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(range(len(POOL))), min_size=1, max_size=7))
def test_the_index_is_the_least_number_of_holders(chosen: list[int]) -> None:
    masks = [POOL[i] for i in chosen]
    assert covering(masks, PARAMS) == counted(masks, PARAMS)


def test_nested_masks_need_no_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [RANKS[0].mask(s) for s in (0.2, 0.5, 1.0, 1.0)]

    def never(*given: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(Mask, "count_into", never)
    assert covering(masks, PARAMS) == 2


# Regions


def test_regions_by_hand() -> None:
    rank = Cut().rank(PARAMS, PARAMS)
    held = {kind: rank.regions(QUARTERS[kind]) for kind in QUARTERS}
    assert held["1"].dense
    assert held["2"].bits["w"].flatten().tolist() == [True] * 4 + [False] * 2 + [True] * 2  # not the second quarter
    assert held["3"].bits["w"].flatten().tolist() == [True] * 2 + [False] * 2 + [True] * 4
    assert held["4"].bits["w"].flatten().tolist() == [False] * 2 + [True] * 6  # not the smallest
    assert held["4"].bits["v"].flatten().tolist() == [False, True, True, True]
    assert [held[kind].density(PARAMS) for kind in "4567"] == [0.75, 0.5, 0.5, 0.5]
    assert held["2"] is rank.regions(QUARTERS["2"])
    assert held["2"].ranking is None


def test_the_best_unit_of_every_layer_stays_and_channels_have_regions_too() -> None:
    rank = Cut(unit="channels").rank(PARAMS, PARAMS, (GROUP,))
    assert rank.regions((False, True, False, False)).channels[GROUP].tolist() == [2, 3]
    assert rank.regions((True, False, False, True)).channels[GROUP].tolist() == [0, 3]


# The method


def textbook(world: World, rounds: int, setting: str, asked: list[list[int]]) -> Tree:
    """Masks of |w| by true ranks, masked SGD, then for every weight the plain mean over who holds it."""
    server = {k: v.clone() for k, v in world.params.items()}
    tasks = {(t.version, t.client): t for t in world.tasks}
    for version in range(rounds):
        total, count = ({k: torch.zeros_like(v) for k, v in server.items()} for _ in range(2))
        quarter = {
            k: (v.abs().flatten().argsort(descending=True, stable=True).argsort() * 4 // v.numel()).view(v.shape)
            for k, v in server.items()
            if v.dim() > 1
        }
        for place, client in enumerate(asked[version]):
            task = tasks[version, client]
            held = torch.tensor(QUARTERS[setting[(version * CLIENTS + place) % len(setting)]])
            keep = {k: held[quarter[k]].float() if k in quarter else torch.ones_like(v) for k, v in server.items()}
            models.load(world.model, {k: v * keep[k] for k, v in server.items()})
            optimiser, data = torch.optim.SGD(world.model.parameters(), WORK.lr), world.data[client]
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(task.seed))
            for at in order.split(WORK.batch)[: WORK.steps]:
                x, y = data.batch(at)
                optimiser.zero_grad()
                F.cross_entropy(world.model(x), y).backward()
                for k, p in world.model.named_parameters():
                    p.grad = p.grad * keep[k]  # type: ignore[operator]
                optimiser.step()
            for k, v in models.values(world.model).items():
                total[k] += v * keep[k]
                count[k] += keep[k]
        server = {k: torch.where(count[k] > 0, total[k] / count[k].clamp(min=1), v) for k, v in server.items()}
    return server


@pytest.mark.parametrize("setting", ["1111223344", "777777", "1234567"])
def test_it_is_the_textbooks(setting: str) -> None:
    world = World()
    m = method("unified", masks={"name": "quarters", "setting": setting})
    state, happened = played(world, m, sync(CLIENTS), versions=3)
    asked = [[e["client"] for e in of_kind(happened, "send") if e["version"] == version] for version in range(3)]
    want = textbook(world, 3, setting, asked)
    for k, v in state.params.items():
        torch.testing.assert_close(v, want[k], rtol=0, atol=1e-6)


def test_every_merge_says_how_many_hold_the_rarest_weight() -> None:
    world = World()
    m = method("unified", masks={"name": "quarters", "setting": "112234"})
    _, happened = played(world, m, sync(CLIENTS), versions=3)
    assert [e["covering"] for e in of_kind(happened, "merge")] == [4, 4, 4]  # of six, two lack the second quarter


def test_every_kind_of_mask_runs() -> None:
    for options in (
        {"unit": "channels"},
        {"fixed": True},
        {"masks": {"name": "scattered", "keep": 0.3}},
        {"skip": ["fc2"]},
    ):
        world = World()
        state, happened = played(world, method("unified", **options), buffered(4, 2), versions=6)
        assert state.version == 6
        densities = {e["density"] for e in of_kind(happened, "send")}
        assert min(densities) < 1
        held = [(t.mask, t.density) for t in world.tasks]
        assert all(mask.density(world.params) == pytest.approx(density) for mask, density in held)


def test_fixed_masks_stay_and_others_follow_the_weights() -> None:
    for fixed in (True, False):
        world = World()
        played(world, method("unified", fixed=fixed, masks={"name": "quarters", "setting": "7"}), sync(6), versions=3)
        assert len({id(t.mask) for t in world.tasks}) == (1 if fixed else 3)


def test_a_setting_of_other_types_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quarters: setting must be made of 1234567, got '18'"):
        method("unified", masks={"name": "quarters", "setting": "18"})


def test_the_summary_tells_the_least_and_the_mean_index(tmp_path: Path) -> None:
    result = simulate(small("method={name: unified, masks: {name: quarters, setting: '11234'}}"), tmp_path)
    found = [e["covering"] for e in events(tmp_path, "merge")]
    assert len(set(found)) > 1
    assert result["least_covering_index"] == min(found)
    assert result["mean_covering_index"] == pytest.approx(sum(found) / len(found))
