"""PruneFL: its choice is the best of all choices, its rounds are a textbook's, and one client prunes first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, combinations, pairwise
from math import floor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server import of_kind, played
from world import CLIENTS, PACINGS, World, method

from prfl import models
from prfl.cut import Cut
from prfl.masks import DENSE, Mask
from prfl.reconfiguration import gainful, reconfigured
from prfl.types import Architecture, Arrival, State, Task, Tree, Update, Work
from strategies.pacing import sync
from strategies.pr_fl import seconds
from strategies.prunefl import prunefl
from strategies.reconfigure import Reached


def ratio(kept: Tree, g2: Tree, t: Mapping[str, float], constant: float) -> float:
    """Gamma, weight by weight: biases count in the gain and take no time."""
    gain = sum(float(v) for k, bits in kept.items() for v in g2[k][bits]) + float(g2["bias"].sum())
    return gain / (constant + sum(t[k] * int(bits.sum()) for k, bits in kept.items()))


def choice(params: Tree, mask: Mask, g2: Tree, *more: Any) -> Tree:
    """The mask that comes of it, cut from its ranking as the method does."""
    chosen = reconfigured(params, mask, g2, *more)
    cut = Cut(spread="model").rank(chosen.scores, params).mask(chosen.share)
    return {k: cut.where(k, v.shape) for k, v in params.items() if v.dim() > 1}


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32), part=st.sampled_from([0.0, 0.3, 0.5, 0.9]), constant=st.sampled_from([1e-3, 1.0, 30.0])
)
def test_the_choice_is_the_best_of_all_subsets(seed: int, part: float, constant: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (2, 3), "b": (1, 4), "bias": (2,)}
    params = {k: torch.randn(s, generator=draw) for k, s in shapes.items()}
    g2 = {k: torch.randint(0, 9, s, generator=draw) / 2.0 for k, s in shapes.items()}  # with ties and zeros
    t = {"a": 0.25 + float(torch.rand((), generator=draw)), "b": 1.0}
    held = {k: torch.rand(shapes[k], generator=draw) < 0.6 for k in "ab"}
    for bits in held.values():
        bits.view(-1)[0] = True
    free: list[tuple[str, int]] = []
    sure = {k: bits.clone() for k, bits in held.items()}
    for k, bits in held.items():
        active = sorted((i for i in range(bits.numel()) if bits.view(-1)[i]), key=lambda i: abs(params[k].view(-1)[i]))
        for i in active[: floor(part * len(active) + 1e-9)]:
            sure[k].view(-1)[i] = False
        free += [(k, i) for i in range(bits.numel()) if not sure[k].view(-1)[i]]
    best = 0.0
    for some in chain.from_iterable(combinations(free, n) for n in range(len(free) + 1)):
        kept = {k: v.clone() for k, v in sure.items()}
        for k, i in some:
            kept[k].view(-1)[i] = True
        best = max(best, ratio(kept, g2, t, constant))
    got = choice(params, Mask(held), g2, t, constant, part)
    assert all(bool((sure[k] <= got[k]).all()) for k in sure)
    assert ratio(got, g2, t, constant) == pytest.approx(best, rel=1e-6)


def test_the_choice_by_hand() -> None:
    params = {"w": torch.tensor([[4.0, 3.0, 2.0, 0.0]]), "bias": torch.tensor([1.0])}
    mask = Mask({"w": torch.tensor([[True, True, True, False]])})
    g2 = {"w": torch.tensor([[1.0, 0.0, 1.0, 5.0]]), "bias": torch.tensor([1.0])}
    # sure: 0 and 1, so 2 / 3; weight 3 has 5 >= 2 / 3 and makes it 7 / 4; weight 2 has 1 < 7 / 4
    assert choice(params, mask, g2, {"w": 1.0}, 1.0, 0.34)["w"].tolist() == [[True, True, False, True]]
    slow = reconfigured(params, mask, g2, {"w": 1.0}, 5.0, 0.34)  # 2 / 7, then 7 / 8, and 1 >= 7 / 8
    assert slow.share == 1
    assert reconfigured(params, mask, g2, {"w": 1.0}, 5.0, 0.34, 0.75).share == 0.75
    assert reconfigured(params, mask, g2, {"w": 1.0}, 5.0, 0.0).share == 1
    assert reconfigured(params, mask, {k: 0 * v for k, v in g2.items()}, {"w": 1.0}, 1.0, 0.34).share == 1  # 0 >= 0


def test_equal_to_the_ratio_is_added() -> None:
    assert gainful(torch.tensor([2.0, 1.0, 0.5]), torch.ones(3), 2.0, 1.0) == 1
    assert gainful(torch.tensor([1.9, 1.0]), torch.ones(2), 2.0, 1.0) == 0
    assert gainful(torch.zeros(0), torch.zeros(0), 2.0, 1.0) == 0


def test_a_weight_without_a_time_is_one_line() -> None:
    params = {"w": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=r"^reconfiguration: a weight of w has no time; have v$"):
        reconfigured(params, DENSE, params, {"v": 1.0}, 1.0, 0.3)


def textbook(world: World, rounds: int, every: int, part: float, halving: float, seeds: dict[Any, int]) -> Any:
    """Stage 2 with plain loops: masked SGD, dense gradients summed, then squared times samples; lists, not tensors."""
    work = Work(steps=3, batch=8, lr=0.1)
    server = {k: v.clone() for k, v in world.params.items()}
    mask = {k: torch.ones_like(v) for k, v in server.items()}
    z = {k: torch.zeros_like(v) for k, v in server.items()}
    t, constant = seconds(work)(world.architecture), 1e-3 * work.steps
    masks = []
    for version in range(rounds):
        moves = {k: torch.zeros_like(v) for k, v in server.items()}
        for client in range(CLIENTS):
            w = {k: v * mask[k] for k, v in server.items()}
            total = {k: torch.zeros_like(v) for k, v in w.items()}
            order = torch.randperm(24, generator=torch.Generator().manual_seed(seeds[version, client])).split(8)
            for at in order[: work.steps]:
                x, y = world.data[client].batch(at)
                leaves = {k: v.clone().requires_grad_() for k, v in w.items()}
                hidden = F.relu(F.linear(x.flatten(1), leaves["fc1.weight"], leaves["fc1.bias"]))
                loss = F.cross_entropy(F.linear(hidden, leaves["fc2.weight"], leaves["fc2.bias"]), y)
                for (k, v), g in zip(list(w.items()), torch.autograd.grad(loss, list(leaves.values())), strict=True):
                    total[k] += g
                    w[k] = (v - work.lr * g) * mask[k]
            for k in w:
                moves[k] += (w[k] - server[k] * mask[k]) / CLIENTS
                z[k] += total[k] ** 2 * 24
        server = {k: v + moves[k] for k, v in server.items()}
        if (version + 1) % every == 0:
            sure = {k: m.bool() for k, m in mask.items()}
            for k in ("fc1.weight", "fc2.weight"):
                active = sorted((abs(float(server[k].view(-1)[i])), i) for i in mask[k].view(-1).nonzero().flatten())
                sure[k] = sure[k].clone()
                for _, i in active[: floor(part * 0.5 ** ((version + 1) / halving) * len(active))]:
                    sure[k].view(-1)[i] = False
            gain = sum(float(z[k][sure[k]].sum()) for k in z)
            time = constant + sum(t[k] * int(sure[k].sum()) for k in t)
            free = [(k, int(i)) for k in t for i in (~sure[k]).view(-1).nonzero().flatten()]
            for k, i in sorted(free, key=lambda p: -float(z[p[0]].view(-1)[p[1]]) / t[p[0]]):
                if float(z[k].view(-1)[i]) / t[k] < gain / time:
                    break
                sure[k].view(-1)[i] = True
                gain, time = gain + float(z[k].view(-1)[i]), time + t[k]
            mask = {k: v.float() for k, v in sure.items()}
            z = {k: torch.zeros_like(v) for k, v in z.items()}
        masks.append({k: mask[k].bool() for k in t})
    return {k: v * mask[k] for k, v in server.items()}, masks


def test_stage_two_is_the_textbooks() -> None:
    world = World()
    m = prunefl(initial=0, every=2, halving=4, overhead=1e-3, listen=0, work=Work(steps=3, batch=8, lr=0.1))
    seen: list[State] = []
    state, _ = played(world, m, sync(CLIENTS), versions=8, keep=seen.append)
    want, masks = textbook(world, 8, 2, 0.3, 4, {(t.version, t.client): t.seed for t in world.tasks})
    for s, expected in zip(seen, masks, strict=True):
        got = s.rank.mask(s.density.keep)
        assert all(torch.equal(got.where(k, v.shape), v) for k, v in expected.items())
    assert masks[1]["fc1.weight"].float().mean() < 1
    assert any(bool((b[k] & ~a[k]).any()) for a, b in pairwise(masks) for k in a)  # some came back
    for k, v in want.items():
        torch.testing.assert_close(state.params[k], v, rtol=0, atol=2e-6)


def test_a_weight_that_comes_back_has_the_value_it_had() -> None:
    params = {"w": torch.tensor([[4.0, 3.0, 2.0, 1.0]]), "b": torch.tensor([1.0])}
    m = prunefl(initial=0, every=1, part=0.5, halving=1e9, overhead=1.0)

    def told(state: State, g2: list[float]) -> State:
        mask = state.rank.mask(state.density.keep)
        task = Task(0, state.version, state.params, mask, replace(m.work, report="gradient2"), 0)
        delta = {k: torch.zeros(mask.count(k, v.shape)) for k, v in params.items()}
        signal = {"w": torch.tensor(g2), "b": torch.zeros(1)}
        return m.step(state, [Arrival(task, 0, 1, 1, 1, Update(0, state.version, delta, mask, 1.0, {}, signal))])

    state = m.init(params, Architecture(macs={"w": 1.0}))
    state = told(state, [9.0, 9.0, 0.0, 0.0])
    assert state.params["w"].tolist() == [[4.0, 3.0, 0.0, 0.0]]
    state = told(state, [9.0, 9.0, 0.0, 30.0])
    assert state.params["w"].tolist() == [[4.0, 3.0, 0.0, 1.0]]
    state = told(state, [0.0, 9.0, 30.0, 30.0])  # w[3] and w[0]: half of three held, rounded down, may go
    assert state.params["w"].tolist() == [[4.0, 3.0, 2.0, 1.0]]


@pytest.mark.parametrize("pacing", PACINGS)
def test_one_client_prunes_first_and_alone(pacing: str) -> None:
    m = method("prunefl", first=4, initial=3, begin=0.0)
    seen: list[State] = []
    state, events = played(World(), m, PACINGS[pacing], versions=6, keep=seen.append)
    sends = of_kind(events, "send")
    assert [e["client"] for e in sends if e["version"] < 3] == [4, 4, 4]
    assert len({e["client"] for e in sends}) > 2
    assert [s.density.alone for s in seen] == [True, True, False, False, False, False]
    assert seen[0].density.keep < 1
    assert all(bool((v == 0).any()) for k, v in state.params.items() if k.endswith("weight"))


def test_stage_one_waits_for_its_accuracy_and_ends_when_it_is_calm() -> None:
    def memories(**more: Any) -> list[Reached]:
        seen: list[State] = []
        played(World(), method("prunefl", initial=12, **more), sync(2), versions=12, keep=seen.append)
        return [s.density for s in seen]

    late = memories(begin=0.99)
    assert next(m.keep for m in late if not m.begun) == 1
    calm = memories(begin=0.0, part=0.0)
    assert [m.alone for m in calm] == [True] * 4 + [False] * 8
    assert {m.keep for m in calm} == {1.0}


def test_the_first_client_may_be_one_of_a_device_class() -> None:
    world = World()
    for name in set(world.classes.values()):
        _, events = played(world, method("prunefl", first=name, initial=2, begin=0.0), sync(3), versions=3)
        wanted = min(c for c, known in world.classes.items() if known == name)
        assert [e["client"] for e in of_kind(events, "send")][:2] == [wanted, wanted]


def test_the_first_client_may_be_away() -> None:
    world = World()
    fleet = [replace(d, availability=((1e6, 2e6),), period=1e9) if c == 0 else d for c, d in enumerate(world.fleet)]
    _, events = played(world, method("prunefl", initial=2, begin=0.0), sync(3), versions=4, fleet=fleet)
    assert [e["client"] for e in of_kind(events, "send")][:2] == [1, 1]


def test_reports_come_before_a_decision_only() -> None:
    world = World()
    played(world, method("prunefl", initial=1, every=4, listen=1), sync(CLIENTS), versions=9)
    assert {t.version for t in world.tasks if t.work.report} == {0, 3, 7}
    assert {t.work.epochs for t in world.tasks if t.version == 0} == {1}


def test_it_learns_something() -> None:
    _, events = played(World(), method("prunefl"), sync(CLIENTS), versions=12)
    losses = [e["loss"] for e in of_kind(events, "arrival")]
    assert losses[-1] < 0.5 * losses[0]
    assert of_kind(events, "send")[-1]["density"] < 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": 1.0}, r"part must be in \[0, 1\)"),
        ({"every": 0}, "every must be above 0"),
        ({"densest": 0.0}, "densest must be in"),
        ({"initial": -1}, "initial must be 0 or more"),
        ({"overhead": -1.0}, "overhead must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        prunefl(**options)
    assert "\n" not in str(error.value)


def test_dense_and_never_deciding_it_is_fedavg() -> None:
    world = World()
    state, _ = played(world, method("prunefl", initial=0, every=99), sync(CLIENTS))
    plain, _ = played(World(), method("fedavg"), sync(CLIENTS))
    for k, v in plain.params.items():
        torch.testing.assert_close(state.params[k], v, rtol=0, atol=1e-6)
    assert models.values(world.model).keys() == state.params.keys()
