"""AutoFLIP: scores and masks by hand, a textbook beside the whole method, exploration that costs, and its ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_server import of_kind, played
from world import CLIENTS, PACINGS, WORK, World, method

from clients.train import train
from prfl import guidance, models
from prfl.exploration import Exploration, explored
from prfl.masks import DENSE
from prfl.merge import masked_mean
from prfl.types import Group, Member, Task, Tree, Work
from strategies import table
from strategies.pacing import buffered, sync

T = torch.tensor


def auto(**options: Any) -> Any:
    return method("autoflip", **options)


def masks_of(world: World) -> list[Task]:
    return [t for t in world.tasks if not t.work.patience]


# Scores and masks


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_quantile_is_torchs(size: int, share: float) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert guidance.quantile(values, share) == pytest.approx(float(torch.quantile(values, share)), abs=1e-6)
    below = guidance.quantile(values, share, interpolate=False)
    assert torch.equal(values > below, values.double() > np.quantile(values.double().numpy(), share))


def test_the_quantile_takes_more_than_2_to_24_values() -> None:
    values = torch.arange(2**24 + 5, dtype=torch.float32).flip(0)
    assert guidance.quantile(values, 0.5, interpolate=False) == pytest.approx(2**23 + 2)


def test_scores_by_hand() -> None:
    total = {"w": T([0.0, 2.0, 4.0, 8.0]), "b": T([3.0]), "flat": T([5.0, 5.0]), "n.running_mean": T([1.0])}
    count = {k: torch.full_like(v, 2.0) for k, v in total.items()}
    scores = guidance.guidance(total, count, "minmax")
    assert {k: v.tolist() for k, v in scores.items()} == {"w": [0.0, 0.25, 0.5, 1.0], "b": [0.0], "flat": [0.0, 0.0]}
    robust = guidance.guidance(total, count, "robust")["w"]  # median 1.5, quartiles 0.75 and 2.5
    assert robust.tolist() == pytest.approx([-1.5 / 1.75, -0.5 / 1.75, 0.5 / 1.75, 2.5 / 1.75])


def test_what_nobody_held_is_the_least_and_nothing_is_nan() -> None:
    total, count = {"w": T([0.0, 2.0, 4.0]), "none": T([0.0])}, {"w": T([0.0, 1.0, 1.0]), "none": T([0.0])}
    for scaling in ("minmax", "robust"):
        scores = guidance.guidance(total, count, scaling)  # type: ignore[arg-type]
        assert all(bool(v.isfinite().all()) for v in scores.values())
        assert scores["w"][0] == scores["w"][1] < scores["w"][2]


def test_masks_are_cut_over_all_tensors_and_strictly_above() -> None:
    scores = {"w": T([[0.0, 0.1, 0.2], [0.3, 0.9, 1.0]]), "b": T([0.2, 0.2, 0.5])}
    mask = guidance.cut(scores, 0.3, "weights", "mean")  # sorted: 0 .1 .2 .2 .2 .3 .5 .9 1; quantile .3 is .2
    assert mask.bits["w"].tolist() == [[False, False, False], [True, True, True]]
    assert mask.bits["b"].tolist() == [False, False, True]
    assert guidance.cut(scores, 0.0, "weights", "mean") is DENSE


def test_no_tensor_vanishes() -> None:
    scores = {"w": torch.linspace(0, 1, 10), "flat": T([0.0, 0.0, 0.0])}
    assert guidance.cut(scores, 0.5, "weights", "mean").bits["flat"].tolist() == [True, False, False]


@pytest.mark.parametrize(("rule", "kept"), [("mean", [2]), ("dead", [1, 2])])
def test_units_by_hand(rule: Any, kept: list[int]) -> None:
    """Three neurons with weights and bias; the next layer's columns say nothing of them, but go with them."""
    scores = {"a.weight": T([[0.0, 0.1], [0.0, 0.9], [0.8, 1.0]]), "a.bias": T([0.0, 0.0, 1.0]),
              "b.weight": T([[1.0, 0.05, 0.9], [1.0, 0.05, 0.9]])}  # fmt: skip
    group = Group(3, (Member("a.weight", 0), Member("a.bias", 0), Member("b.weight", 1)))
    assert guidance.cut(scores, 0.95, "channels", rule, (group,)).channels[group].tolist() == [2]  # the best stays
    mask = guidance.cut(scores, 0.5, "hybrid", rule, (group,))  # the median of 15 scores is 0.8
    assert mask.channels[group].tolist() == kept
    assert not mask.bits["a.weight"][0].any()
    assert not mask.bits["b.weight"][:, 0].any()
    assert all(bool((bits <= mask.where(k, bits.shape)).all()) for k, bits in mask.bits.items())


def test_units_need_groups() -> None:
    with pytest.raises(ValueError, match="explored: unit 'hybrid' needs a model with channel groups"):
        guidance.cut({"w": T([1.0, 2.0])}, 0.5, "hybrid", "mean")


# The whole method


def textbook(
    world: World, rounds: int, options: dict[str, Any], tasks: dict[tuple[int, int], Task]
) -> tuple[Tree, Tree]:
    """Explore from deep copies, mask, FedAvg with an averaging momentum; torch's SGD, masks as factors."""

    def sgd(start: Tree, keep: Tree, client: int, task: Task, epochs: int, steps: int) -> Tree:
        models.load(world.model, start)
        optimiser, data = torch.optim.SGD(world.model.parameters(), task.work.lr), world.data[client]
        draw, batches = torch.Generator().manual_seed(task.seed), []
        for _ in range(epochs or steps):
            batches += torch.randperm(len(data), generator=draw).split(task.work.batch)
        for at in batches[: steps or None]:
            x, y = data.batch(at)
            optimiser.zero_grad()
            F.cross_entropy(world.model(x), y).backward()
            optimiser.step()
            with torch.no_grad():
                for k, p in world.model.named_parameters():
                    p.mul_(keep[k])
        return models.values(world.model)

    first = {k: v.clone() for k, v in world.params.items()}
    ones = {k: torch.ones_like(v) for k, v in first.items()}
    ends = [sgd(first, ones, c, tasks[0, c], options["epochs"], 0) for c in range(CLIENTS)]
    spread = {k: torch.stack([(e[k] - v) ** 2 for e in ends]).mean(0) for k, v in first.items()}
    scaled = {k: (v - v.min()) / (v.max() - v.min()) for k, v in spread.items()}
    tau = np.quantile(torch.cat([v.flatten() for v in scaled.values()]).double().numpy(), options["prune"])
    keep = {k: (v > tau).float() for k, v in scaled.items()}
    server = {k: v * keep[k] for k, v in first.items()}
    momentum = {k: torch.zeros_like(v) for k, v in first.items()}
    for version in range(1, rounds):
        ends = [sgd(server, keep, c, tasks[version, c], 0, WORK.steps) for c in range(CLIENTS)]
        sizes = [len(d) for d in world.data]
        for k, v in server.items():
            step = sum(n * (v - e[k]) for n, e in zip(sizes, ends, strict=True)) / sum(sizes)
            momentum[k] = options["beta"] * momentum[k] + (1 - options["beta"]) * step
            server[k] = (v - momentum[k]) * keep[k]
    return server, keep


def test_it_is_the_textbooks() -> None:
    world = World()
    world.data = [d.subset(torch.arange(24 - 2 * c)) for c, d in enumerate(world.data)]  # unequal sizes
    options = {"prune": 0.4, "beta": 0.5, "epochs": 2, "patience": 0, "explorers": 1.0}
    state, _ = played(world, auto(**options), sync(CLIENTS), versions=4)
    want, keep = textbook(world, 4, options, {(t.version, t.client): t for t in world.tasks})
    for k, v in state.params.items():
        torch.testing.assert_close(v, want[k], rtol=0, atol=2e-6)
        assert torch.equal(state.merge.mask.where(k, v.shape), keep[k].bool())
        assert not v[keep[k] == 0].any()
    pruned = 1 - sum(float(v.sum()) for v in keep.values()) / sum(v.numel() for v in keep.values())
    assert pruned == pytest.approx(0.4, abs=1 / sum(v.numel() for v in keep.values()))


def test_with_beta_nine_tenths_the_first_step_is_a_tenth_of_the_mean() -> None:
    ends = [played(World(), auto(beta=beta, explorers=1.0), sync(CLIENTS), versions=2)[0].params for beta in (0.9, 0.0)]
    start = played(World(), auto(explorers=1.0), sync(CLIENTS), versions=1)[0].params
    for k, v in start.items():
        torch.testing.assert_close(ends[0][k] - v, 0.1 * (ends[1][k] - v), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pacing", PACINGS)
def test_as_many_explore_as_asked_and_nobody_twice(pacing: str) -> None:
    world = World()
    state, events = played(world, auto(explorers=0.5), PACINGS[pacing], versions=6)
    explorers = [t.client for t in world.tasks if t.work.patience]
    assert len(explorers) == len(set(explorers)) == 3
    assert sorted(state.merge.clients) == sorted(explorers)
    began = state.merge.began
    assert all((e["version"] < began) == (e["density"] == 1.0) for e in of_kind(events, "send"))
    cost = {e["version"] < began: e["bytes_up"] for e in of_kind(events, "arrival") if e["used"]}
    assert cost[True] > cost[False] > 0  # exploration goes over the wire, whole


def test_everybody_explores_in_rounds_of_two() -> None:
    world = World()
    state, events = played(world, auto(explorers=1.0), sync(2), versions=5)
    assert state.merge.began == 3
    assert len({t.client for t in world.tasks if t.work.patience}) == CLIENTS
    assert {e["covering"] for e in of_kind(events, "merge") if e["version"] <= 3} == {2}
    assert {e["covering"] for e in of_kind(events, "merge") if e["version"] > 3} == {0}  # what is pruned nobody holds


def test_failing_explorers_are_replaced() -> None:
    state, events = played(World(failure=0.4), auto(explorers=1.0), buffered(4, 2), versions=8)
    assert any(not e["used"] for e in of_kind(events, "arrival"))
    assert len(state.merge.clients) == CLIENTS


def test_an_explorer_that_always_fails_is_gone_without() -> None:
    world = World()
    world.fleet[2] = replace(world.fleet[2], failure=1.0)
    state, events = played(world, auto(explorers=1.0), sync(2), versions=10)
    assert state.merge.began is not None
    assert sorted(state.merge.clients) == [c for c in range(CLIENTS) if c != 2]
    explored = [t.client for t in world.tasks if t.work.patience]
    assert len(explored) == CLIENTS  # the five, and one of them again, to end the phase
    assert sum(e["version"] < state.merge.began for e in of_kind(events, "send")) <= 2 * CLIENTS + 1


def test_explorers_that_are_away_for_good_are_not_waited_for() -> None:
    world = World()
    world.fleet[4] = replace(world.fleet[4], availability=((1e8, 1e9),), period=1e9)
    state, _ = played(world, auto(explorers=1.0), sync(2), versions=10)
    assert state.merge.began == 4
    assert 4 not in state.merge.clients


def test_the_start_is_the_first_model_or_with_warm_the_explorers_mean() -> None:
    world = World()
    cold, warm = (played(world, auto(warm=w, prune=0.0, explorers=1.0), sync(CLIENTS), versions=1)[0] for w in (0, 1))
    assert all(torch.equal(v, world.params[k]) for k, v in cold.params.items())
    ends = [world.run(replace(t, params=world.params)) for t in world.tasks[:CLIENTS]]
    for k, v in warm.params.items():
        mean = world.params[k] + sum(u.delta[k].view(v.shape) for u in ends) / CLIENTS
        torch.testing.assert_close(v, mean, rtol=0, atol=1e-6)
    assert not cold.merge.mask.bits


@pytest.mark.parametrize("unit", ["channels", "hybrid"])
@pytest.mark.parametrize("scaling", ["minmax", "robust"])
def test_channels_shrink_the_model(unit: str, scaling: str) -> None:
    world = World()
    state, _ = played(world, auto(unit=unit, scaling=scaling, prune=0.5, explorers=1.0), sync(CLIENTS), versions=4)
    mask = state.merge.mask
    assert any(len(kept) < group.size for group, kept in mask.channels.items())
    assert bool(mask.bits) == (unit == "hybrid")
    assert mask.density(world.params) < 1
    assert all(not v[~mask.where(k, v.shape)].any() for k, v in state.params.items())


def test_masks_by_participants_follow_who_took_part() -> None:
    world = World()
    state, _ = played(world, auto(participants=True, explorers=1.0, prune=0.5), sync(2), versions=8)
    assert set(state.merge.each) == set(range(CLIENTS))
    masks = {t.version: t.mask for t in masks_of(world)}
    assert len({id(m) for m in masks.values()}) == len(masks)
    last = {t.client for t in world.tasks if t.version == 7}
    trees = [state.merge.each[c] for c in sorted(last)]
    mean = {k: torch.stack([t[k] for t in trees]).mean(0) for k in trees[0]}
    scaled = {k: (v - v.min()) / (v.max() - v.min()) for k, v in mean.items()}
    tau = np.quantile(torch.cat([v.flatten() for v in scaled.values()]).double().numpy(), 0.5)
    for k, v in scaled.items():
        assert float((state.merge.mask.where(k, v.shape) == (v > tau)).float().mean()) > 0.97  # but for rounding


def test_agreement_lets_weights_come_back() -> None:
    world = World()
    part = {"name": "votes", "rate": 0.9, "every": 1}
    state, _ = played(world, auto(agreement=part, explorers=1.0, beta=0.0), sync(CLIENTS), versions=8)
    before, after = masks_of(world)[0].mask, state.merge.mask
    assert any(bool((after.where(k, v.shape) & ~before.where(k, v.shape)).any()) for k, v in world.params.items())
    assert after.density(world.params) == pytest.approx(before.density(world.params), abs=0.05)


def test_votes_by_hand() -> None:
    scores = {"w": T([1.0, 0.5, 0.2])}
    evidence = {0: (3.0, {"w": T([1.0, 0.0, torch.nan])}), 1: (1.0, {"w": T([0.0, 0.0, torch.nan])})}
    again = guidance.votes(rate=0.4, every=5)(scores, evidence, 10)
    assert again["w"].tolist() == pytest.approx([1 - 0.4 * 0.25, 0.5 * 0.6, 0.2])
    assert guidance.votes(rate=0.4, every=5)(scores, evidence, 11) is scores


def test_patience_ends_training_and_only_the_time_that_it_took_is_counted() -> None:
    world = World()
    task = Task(0, 0, world.params, DENSE, Work(epochs=50, batch=8, lr=20.0, patience=2), seed=1)
    update = train(task, world.model, world.data[0])
    each = [
        train(replace(task, work=replace(task.work, epochs=n, patience=0)), world.model, world.data[0]).metrics["loss"]
        * n
        for n in range(1, 12)
    ]
    losses = np.diff([0.0, *each])
    best = np.minimum.accumulate(losses)
    stop = next(n for n in range(3, 12) if min(losses[n - 2 : n]) >= best[n - 3])
    assert update.metrics["steps"] == 3 * stop < 150
    fixed = replace(task, work=replace(task.work, epochs=stop, patience=0))
    arrivals = []
    for one in (task, fixed):
        transport = World().transport()
        transport.send(one)
        arrivals.append(transport.wait())
    lazy, straight = arrivals
    assert lazy is not None
    assert straight is not None
    assert lazy.busy == pytest.approx(straight.busy)


def test_what_is_no_share_is_refused() -> None:
    for options, message in (
        ({"prune": 1.0}, r"prune must be in \[0, 1\)"),
        ({"explorers": 0.0}, r"share must be in \(0, 1\]"),
        ({"scaling": "max"}, "scaling"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            table.method({"name": "autoflip", **options}, WORK)


def test_late_explorations_are_left_out() -> None:
    part = explored(masked_mean(), share=0.1)
    world = World()
    state = replace(auto().init(world.params, world.architecture, world.classes, 3), version=5)
    state = replace(state, merge=replace(Exploration(), began=4, inner=None))
    transport = world.transport()
    transport.send(Task(0, 2, world.params, DENSE, WORK, seed=1))
    arrival = transport.wait()
    assert arrival is not None
    params, memory = part(state, [arrival])
    assert params is state.params
    assert memory is state.merge
