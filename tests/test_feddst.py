"""FedDST: masks that move by hand, votes by hand, rounds like a textbook's, and bytes that are counted."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, cos, pi
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_server import of_kind, played
from world import CLIENTS, WORK, World, method

from clients.regrow import regrown
from clients.train import train
from prfl.bitstream import encode_mask
from prfl.codec import Codec
from prfl.cut import Cut, erk
from prfl.masks import DENSE, Mask
from prfl.types import Architecture, Arrival, Group, Member, State, Task, Tree, Update, Work
from prfl.votes import voted
from strategies.feddst import feddst
from strategies.moves import moving
from strategies.pacing import sync


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def bits(*kept: int) -> torch.Tensor:
    return torch.tensor([kept]).bool()


def test_a_mask_moves_by_hand() -> None:
    held = Mask({"w": bits(1, 1, 1, 1, 0, 0, 0)})
    weights, gradients = {"w": row(4, -1, 2, -3, 0, 0, 0)}, {"w": row(9, 1, 0, 9, -5, 0.5, 3)}

    def moved(share: float) -> list[bool]:
        return regrown(held, weights, gradients, share)[0].bits["w"].flatten().tolist()

    assert moved(0.25) == bits(1, 0, 1, 1, 1, 0, 0).flatten().tolist()
    assert moved(0.5) == bits(1, 0, 0, 1, 1, 0, 1).flatten().tolist()
    assert moved(0.75) == bits(1, 0, 0, 1, 1, 0, 1).flatten().tolist()  # weight 3 goes and comes back
    assert regrown(held, weights, gradients, 0.75)[1]["w"].tolist() == bits(1, 0, 0, 0, 0, 0, 0).tolist()
    assert moved(0.1) == held.bits["w"].flatten().tolist()
    assert all(sum(moved(share / 20)) == 4 for share in range(21))


def test_whole_entries_and_those_without_a_gradient_stay() -> None:
    held = Mask({"w": bits(1, 0), "frozen": bits(1, 0)})
    new, stayed = regrown(held, {"w": row(1, 0)}, {"w": row(0, 1)}, 1.0)
    assert new.bits["w"].tolist() == [[False, True]]
    assert new.bits["frozen"] is held.bits["frozen"]
    assert stayed.keys() == {"w"}


def test_the_rate_falls_like_a_cosine() -> None:
    plan = moving(Work(), 0.4, 5, 20)
    rates = {version: plan(version).regrow for version in range(30)}
    assert {v for v, rate in rates.items() if rate} == {1, 6, 11, 16}
    assert rates[6] == pytest.approx(0.2 * (1 + 0.5877852523))
    assert rates[1] > rates[6] > rates[11] > rates[16] > 0
    assert {v for v in range(30) if moving(Work(), 0.4, 1, 4)(v).regrow} == {1, 2, 3}


HALF = Mask({"fc1.weight": torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.5})


def arrival(client: int, weight: float, given: Mask, came: Mask, start: Tree, local: list[float]) -> Arrival:
    task = Task(client, 0, start, given, Work(), client)
    delta = {"w": came.gather("w", row(*local) - start["w"])}
    return Arrival(task, 0, 1, 1, 1, Update(client, 0, delta, came, weight))


def test_votes_by_hand() -> None:
    start = {"w": row(1, 2, 3, 0, 0)}
    given = Mask({"w": bits(1, 1, 1, 0, 0)})
    came = [
        arrival(0, 1.0, given, Mask({"w": bits(1, 1, 0, 1, 0)}), start, [3, 4, 0, 5, 0]),
        arrival(1, 3.0, given, Mask({"w": bits(1, 0, 0, 1, 1)}), start, [7, 0, 0, 9, 2]),
    ]
    state = State(0, start, Cut().rank(start, start), Architecture())
    merged, alive = voted()(state, came)
    assert merged["w"].tolist() == [[6, 4, 0, 8, 2]]  # (3 + 21) / 4, one holder, given up by all, (5 + 27) / 4, one
    assert alive["w"].tolist() == bits(1, 1, 0, 1, 1).tolist()
    merged, _ = voted(votes=3.0)(state, came)
    assert merged["w"].tolist() == [[6, 0, 0, 8, 2]]
    merged, _ = voted(votes=4.0)(state, came)
    assert merged["w"].tolist() == [[6, 0, 0, 8, 0]]
    assert voted(votes=1e9)(state, came)[0]["w"].tolist() == [[6, 0, 0, 8, 0]]  # what all hold stays


def test_what_an_old_task_did_not_have_keeps_its_value() -> None:
    old, now = {"w": row(1, 2, 0)}, {"w": row(5, 0, 7)}
    came = [arrival(0, 1.0, Mask({"w": bits(1, 1, 0)}), Mask({"w": bits(1, 1, 0)}), old, [2, 3, 0])]
    merged, alive = voted()(State(1, now, Cut().rank(now, now), Architecture()), came)
    assert merged["w"].tolist() == [[2, 3, 7]]
    assert alive["w"].tolist() == bits(1, 1, 0).tolist()


SETTINGS: dict[str, Any] = {"sparsity": 0.6, "rate": 0.5, "every": 2, "end": 6, "at": 0.5}


def textbook(world: World, rounds: int, work: Work, seeds: dict[Any, int]) -> tuple[Tree, list[Tree]]:
    """The published rounds with torch's own SGD and the mask applied after every step."""
    cuts = {k: v for k, v in world.params.items() if v.dim() > 1}
    sizes = {k: round(share * cuts[k].numel()) for k, share in erk(cuts, 0.4).items()}

    def largest(w: torch.Tensor, count: int) -> torch.Tensor:
        return (
            torch.zeros(w.numel())
            .index_fill(0, w.flatten().argsort(descending=True, stable=True)[:count], 1.0)
            .view(w.shape)
        )

    server = {k: v.clone() for k, v in world.params.items()}
    mask, masks = {k: largest(v.abs(), sizes[k]) for k, v in cuts.items()}, []
    for version in range(rounds):
        rate = 0.25 * (1 + cos(version * pi / 6)) if version % 2 and version < 6 else 0.0
        votes, total, n = {k: torch.zeros_like(v) for k, v in server.items()}, {k: 0 * v for k, v in server.items()}, 0
        for client in range(CLIENTS):
            data, m = world.data[client], {k: v.clone() for k, v in mask.items()}
            w = {k: (v * m.get(k, torch.tensor(1.0))).requires_grad_() for k, v in server.items()}
            w = {k: v.detach().requires_grad_() for k, v in w.items()}
            optimiser = torch.optim.SGD(w.values(), work.lr, momentum=work.momentum)
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seeds[version, client]))
            for step, at in enumerate(order.split(work.batch)[: work.steps], 1):
                x, y = data.batch(at)
                optimiser.zero_grad()
                hidden = F.relu(F.linear(x.flatten(1), w["fc1.weight"], w["fc1.bias"]))
                F.cross_entropy(F.linear(hidden, w["fc2.weight"], w["fc2.bias"]), y).backward()
                if rate and step == ceil(0.5 * work.steps):
                    for k in m:
                        count = int(m[k].sum())
                        stay = largest(w[k].detach().abs() - (1 - m[k]), count - round(rate * count))
                        m[k] = stay + largest(w[k].grad.abs() - 1e9 * stay, count - int(stay.sum()))
                        w[k].data *= stay
                for k in m:
                    w[k].grad *= m[k]
                optimiser.step()
                for k in m:
                    w[k].data *= m[k]
            n += len(data)
            for k in server:
                held = m.get(k, torch.ones_like(server[k]))
                votes[k], total[k] = votes[k] + len(data) * held, total[k] + len(data) * w[k].detach() * held
        server = {k: torch.where(votes[k] > 0, total[k] / votes[k].clamp(min=1), 0.0) for k in server}
        if rate:
            union = {k: torch.where(votes[k] > 0, server[k].abs(), -1.0) for k in mask}
            mask = {k: largest(v, sizes[k]) for k, v in union.items()}
        server = {k: v * mask.get(k, torch.tensor(1.0)) for k, v in server.items()}
        masks.append({k: v.bool() for k, v in mask.items()})
    return server, masks


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rounds_are_the_textbooks(momentum: float) -> None:
    world = World()
    world.data = [d.subset(torch.arange(24 - 2 * c)) for c, d in enumerate(world.data)]  # unequal sizes
    work = Work(steps=3, batch=4, lr=0.2, momentum=momentum)
    seen: list[State] = []
    state, _ = played(world, feddst(**SETTINGS, work=work), sync(CLIENTS), versions=7, keep=seen.append)
    want, masks = textbook(world, 7, work, {(t.version, t.client): t.seed for t in world.tasks})
    for s, expected in zip(seen, masks, strict=True):
        assert all(torch.equal(s.rank.mask(0.4).where(k, v.shape), v) for k, v in expected.items())
    assert any(bool((masks[0][k] ^ masks[1][k]).any()) for k in masks[0])
    for k, v in want.items():
        torch.testing.assert_close(state.params[k], v, rtol=0, atol=2e-6)


def test_without_sparsity_it_is_fedavg() -> None:
    runs = [played(World(), method(n, **more), sync(CLIENTS))[0].params
            for n, more in (("feddst", {"sparsity": 0.0}), ("fedavg", {}))]  # fmt: skip
    for k, v in runs[1].items():
        torch.testing.assert_close(runs[0][k], v, rtol=0, atol=1e-6)


def test_the_mask_stays_as_dense_and_the_server_zero_outside() -> None:
    seen: list[State] = []
    _, events = played(World(), method("feddst"), sync(CLIENTS), versions=8, keep=seen.append)
    for s in seen:
        mask = s.rank.mask(0.5)
        assert mask.density(s.params) == pytest.approx(0.5, abs=0.01)
        assert all(not bool(v[~mask.where(k, v.shape)].any()) for k, v in s.params.items())
    losses = [e["loss"] for e in of_kind(events, "arrival")]
    assert losses[-1] < 0.5 * losses[0]


def test_a_moved_mask_goes_up_and_a_new_one_down() -> None:
    world, m = World(), method("feddst")
    state, codec = m.init(world.params, world.architecture, world.classes), Codec()
    for version in range(4):
        task = m.assign(state, 0, np.random.default_rng(version))
        update = world.run(task)
        plain = replace(update, mask=task.mask)
        extra = len(codec.encode_update(update, task, world.layout)[0]) - len(
            codec.encode_update(plain, task, world.layout)[0]
        )
        assert extra == (len(encode_mask(update.mask, world.layout)) if version % 2 else 0)
        new = m.step(state, [Arrival(task, 0, 1, 1, 1, update)])
        assert (m.assign(new, 0, np.random.default_rng(9)).mask is task.mask) == (version % 2 == 0)
        state = new


def test_a_grown_weight_starts_from_zero_and_takes_the_step() -> None:
    world = World()
    task = Task(0, 1, world.params, HALF, replace(WORK, regrow=0.3), 5)
    other = {k: torch.where(task.mask.where(k, v.shape), v, 99.0) for k, v in task.params.items()}
    one, two = (train(replace(task, params=p), world.model, world.data[0]) for p in (task.params, other))
    assert torch.equal(one.mask.bits["fc1.weight"], two.mask.bits["fc1.weight"])
    assert all(
        torch.equal(one.delta[k], two.delta[k]) for k in one.delta
    )  # what the client does not hold plays no part
    new = one.mask.bits["fc1.weight"] & ~task.mask.bits["fc1.weight"]
    moves = torch.zeros(8, 16).masked_scatter(one.mask.bits["fc1.weight"], one.delta["fc1.weight"])
    assert new.any()
    assert bool((moves[new].abs() > 0).all())
    assert float(moves[new].abs().max()) < 1


@pytest.mark.parametrize("report", ["gradient2", "change"])
@pytest.mark.parametrize("scope", ["kept", "all"])
def test_reports_follow_the_new_mask(report: Any, scope: Any) -> None:
    world = World()
    work = replace(WORK, regrow=0.3, report=report, scope=scope)
    task = Task(0, 1, world.params, HALF, work, 5)
    update = train(task, world.model, world.data[0])
    assert update.signal is not None
    assert len(update.signal["fc1.weight"]) == (128 if scope == "all" else int(update.mask.bits["fc1.weight"].sum()))
    if report == "change":
        got, moved = update.signal["fc1.weight"], update.delta["fc1.weight"].abs()
        assert torch.equal(got[got > 0], moved[moved > 0])


def test_masks_of_channels_do_not_regrow() -> None:
    world = World()
    group = Group(8, (Member("fc1.weight", 0), Member("fc1.bias", 0), Member("fc2.weight", 1)))
    task = Task(0, 1, world.params, Mask(channels={group: torch.arange(4)}), replace(WORK, regrow=0.3), 5)
    with pytest.raises(ValueError, match=r"^work: regrow needs a mask of single weights$"):
        train(task, world.model, world.data[0])
    assert train(replace(task, mask=DENSE), world.model, world.data[0]).mask.whole("fc1.weight")


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"rate": 1.0}, {"every": 0}, {"at": 1.5}, {"votes": -1.0}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        feddst(**options)


def test_what_comes_back_at_once_begins_at_zero() -> None:
    """With no learning rate left, all weights that came are zero, and those that stayed are as they were."""
    world = World()
    held = Mask(
        {
            k: torch.rand(v.shape, generator=torch.Generator().manual_seed(1)) < 0.5
            for k, v in world.params.items()
            if v.dim() > 1
        }
    )
    work = Work(steps=2, batch=8, lr=1e-12, regrow=0.6, regrow_at=0.5)
    task = Task(0, 0, world.params, held, work, 5)
    update = train(task, world.model, world.data[0])
    for k, before in held.bits.items():
        old = world.params[k]
        local = update.mask.scatter(
            k, update.mask.gather(k, held.apply(world.params)[k]) + update.delta[k], torch.zeros_like(old)
        )
        count = int(before.sum())
        least = old.abs().masked_fill(~before, torch.inf).flatten().argsort()[: round(0.6 * count)]
        gone = torch.zeros_like(before).view(-1).index_fill_(0, least, True).view(before.shape)
        back = gone & update.mask.bits[k]
        assert back.any()
        assert local[back].abs().max() < 1e-6
        torch.testing.assert_close(local[before & ~gone], old[before & ~gone], rtol=0, atol=1e-6)
