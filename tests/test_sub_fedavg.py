"""Sub-FedAvg: a client's steps and gates by hand, hybrid pruning, rounds like a textbook's, masks that are kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_server import of_kind, played
from torch import nn
from world import CLIENTS, WORK, World, method

from clients.personal import apart, pruned
from clients.train import train
from prfl import models
from prfl.codec import Codec, Layout
from prfl.groups import architecture
from prfl.masks import DENSE, Mask
from prfl.overlap import nested
from prfl.samples import Samples
from prfl.types import Arrival, State, Task, Tree, Update, Work
from sim.transport import Downlink
from strategies.pacing import sync
from strategies.sub_fedavg import sub_fedavg

EASY = Samples(torch.ones(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64))
GATES: dict[str, Any] = {"prune": 0.25, "prune_to": 0.1, "prune_accuracy": 0.5}


def step(first: list[float], last: list[float], held: Samples = EASY, mask: Mask = DENSE, **more: Any) -> Update:
    """A client of one layer, 1 x 4 weights, whose values were `first` and `last`."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[1].weight.zero_()
    start = models.values(model)
    task = Task(0, 0, start, mask, Work(**{**GATES, **more}), 0)
    update = Update(0, 0, {"1.weight": torch.tensor(last)}, mask, 1.0, {"loss": 1.0})
    return pruned(
        update, task, model, replace(held, x=torch.ones(len(held), 1, 2, 2)), {"1.weight": torch.tensor(first)}
    )


def kept(update: Update) -> list[int]:
    return update.mask.where("1.weight", (1, 4)).int().flatten().tolist()


def test_the_least_weights_go_when_the_masks_have_moved() -> None:
    update = step([1, 2, 3, 4], [4, -3, 2, 1])  # the first pass would take weight 0, the last one takes weight 3
    assert kept(update) == [1, 1, 1, 0]
    assert update.delta["1.weight"].tolist() == [4, -3, 2]
    assert update.metrics == {"loss": 1.0, "held_out": 1.0}


def test_every_gate_can_stay_shut() -> None:
    moved = [1, 2, 3, 4], [4, 3, 2, 1]
    assert kept(step([4, 3, 2, 1], [8, 7, 6, 5])) == [1, 1, 1, 1]  # both passes agree
    assert kept(step(*moved, prune_apart=0.49)) == [1, 1, 1, 0]  # two of four differ
    assert kept(step(*moved, prune_apart=0.5)) == [1, 1, 1, 1]
    assert kept(step(*moved, prune_to=1.0)) == [1, 1, 1, 1]
    assert kept(step(*moved, prune_accuracy=1.0)) == [1, 1, 1, 1]  # more than that is wanted
    unjudged = step(*moved, held=EASY.subset(torch.arange(0)))
    assert kept(unjudged) == [1, 1, 1, 1]
    assert "held_out" not in unjudged.metrics
    assert step(*moved, prune_to=1.0).delta["1.weight"].tolist() == [4, 3, 2, 1]


def test_the_last_step_ends_at_the_target() -> None:
    """Of 100 weights 98 live; towards the target a step takes (0.98 - target) / 0.98 of them, 5 % at most."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 1, bias=False))
    alive = Mask({"1.weight": (torch.arange(100) < 98).view(1, 100)})
    values = torch.arange(1.0, 99.0)

    def left(prune_to: float) -> int:
        task = Task(0, 0, {"1.weight": torch.zeros(1, 100)}, alive, Work(**{**GATES, "prune_to": prune_to}), 0)
        update = Update(0, 0, {"1.weight": values.flip(0)}, alive, 1.0)
        held = Samples(torch.ones(2, 1, 10, 10), torch.zeros(2, dtype=torch.int64))
        return pruned(update, task, model, held, {"1.weight": values}).mask.count("1.weight", (1, 100))

    assert left(0.5) == 98 - 25  # the quantile lies at 24.25
    assert left(0.95) == 98 - 3
    assert left(0.8) == 98 - 5  # 18 missing, which is less than a step: 5 % of 98
    assert left(0.98) == 98


def test_the_held_out_share_is_the_same_in_every_task() -> None:
    data = Samples(torch.arange(40.0).view(40, 1, 1, 1), torch.arange(40) % 4)
    job = Task(3, 0, {}, DENSE, Work(holdout=0.25), 0)
    (rest, held), (again, same) = apart(job, data), apart(replace(job, seed=9, version=4), data)
    assert torch.equal(held.x, same.x)
    assert torch.equal(rest.x, again.x)
    assert (len(rest), len(held)) == (30, 10)
    assert sorted([*rest.x.flatten().tolist(), *held.x.flatten().tolist()]) == list(range(40))
    assert apart(replace(job, work=Work()), data) == (data, data)


def normed() -> nn.Module:
    return models.build("conv2_mnist", (1, 16, 16), 3, 0, {"channels": (6, 8), "hidden": 10})


def hybrid_task(**more: Any) -> Task:
    model = normed()
    params = models.values(model)
    m = sub_fedavg(hybrid=True, work=Work(epochs=3, batch=6, lr=0.1))
    rank = m.cut.rank(params, params, architecture(model, torch.zeros(1, 1, 16, 16)).groups)
    work = replace(m.work, holdout=0.25, prune_accuracy=0.0, **more)  # type: ignore[type-var]
    return Task(0, 0, params, rank.mask(1.0), work, 5)


def data(count: int = 24) -> Samples:
    g = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 3
    return Samples(torch.randn(count, 1, 16, 16, generator=g) + 2.0 * y.view(-1, 1, 1, 1), y)


def test_hybrid_takes_channels_by_scale_and_single_weights_of_dense_layers() -> None:
    task = hybrid_task(channels_apart=-1.0, prune_apart=-1.0)
    update = train(task, normed(), data())
    sizes = {g.scale: len(c) for g, c in update.mask.channels.items() if g.scale}
    assert sizes == {"bn1.weight": 3, "bn2.weight": 4}  # of 6 and 8: 45 % are gone, but never less than half stays
    (first,) = [g for g in update.mask.channels if g.scale == "bn1.weight"]
    dense = train(replace(task, work=replace(task.work, prune=0.0, prune_channels=0.0)), normed(), data())
    scale = dense.delta["bn1.weight"] + task.params["bn1.weight"]
    assert update.mask.channels[first].tolist() == scale.abs().topk(3).indices.sort().values.tolist()
    assert set(update.mask.bits) == {"fc1.weight", "fc2.weight"}
    narrow = Mask(channels=update.mask.channels)
    fc1 = update.mask.bits["fc1.weight"]
    assert bool((fc1 <= narrow.where("fc1.weight", fc1.shape)).all())
    assert 0 < int(fc1.sum()) < int(narrow.where("fc1.weight", fc1.shape).sum())
    assert nested(update.mask, task.mask, task.params)
    layout = Layout.of(task.params, tuple(task.mask.channels))
    back = Codec().decode_update(Codec().encode_update(update, task, layout)[0], task, layout)
    assert all(torch.equal(back.delta[k], update.delta[k]) for k in update.delta)


def test_hybrid_goes_on_from_what_it_has_pruned() -> None:
    task = hybrid_task(channels_apart=-1.0, prune_apart=-1.0, channels_to=0.25)
    sizes = []
    for seed in range(4):
        update = train(replace(task, seed=seed), normed(), data())
        assert nested(update.mask, task.mask, task.params)
        assert all(len(v) == update.mask.count(k, task.params[k].shape) for k, v in update.delta.items())
        sizes.append(sorted(len(c) for g, c in update.mask.channels.items() if g.scale))
        task = replace(task, mask=update.mask)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == [2, 2]


def test_a_report_follows_the_mask() -> None:
    world = World()
    work = Work(
        epochs=2, batch=8, lr=0.1, report="gradient2", prune=0.3, prune_to=0.1, prune_accuracy=0.0, prune_apart=-1
    )
    update = train(Task(0, 0, world.params, DENSE, work, 1), world.model, world.data[0])
    assert update.signal is not None
    assert update.mask.count("fc1.weight", (8, 16)) == 128 - 39
    assert all(len(update.signal[k]) == len(update.delta[k]) for k in update.signal)


def textbook(world: World, rounds: int, m: Any, seeds: dict[Any, int]) -> tuple[Tree, list[dict[str, np.ndarray]]]:
    """The published rounds, unstructured, with numpy's percentiles and torch's SGD."""
    work: Work = m.work
    server = {k: v.clone() for k, v in world.params.items()}
    names = ["fc1.weight", "fc2.weight"]
    masks = [{k: np.ones(world.params[k].shape, bool) for k in names} for _ in range(CLIENTS)]

    def candidate(w: Tree, mask: dict[str, np.ndarray], p: float) -> dict[str, np.ndarray]:
        size = {k: np.abs(w[k].detach().numpy()) for k in names}
        return {k: np.where(size[k] < np.percentile(size[k][mask[k]], p), False, mask[k]) for k in names}

    def accuracy(w: Tree, mask: dict[str, np.ndarray], held: Samples) -> float:
        x, y = held.batch(torch.arange(len(held)))
        v = {k: t.detach() * torch.from_numpy(mask[k]) if k in mask else t.detach() for k, t in w.items()}
        hidden = F.relu(F.linear(x.flatten(1), v["fc1.weight"], v["fc1.bias"]))
        return float((F.linear(hidden, v["fc2.weight"], v["fc2.bias"]).argmax(1) == y).float().mean())

    for version in range(rounds):
        local = []
        for client in range(CLIENTS):
            mask = masks[client]
            data, held = apart(Task(client, 0, {}, DENSE, work, 0), world.data[client])
            w = {k: v * torch.from_numpy(mask[k]) if k in mask else v.clone() for k, v in server.items()}
            g = torch.Generator().manual_seed(seeds[version, client])
            for epoch in range(work.epochs):
                for at in torch.randperm(len(data), generator=g).split(work.batch):
                    x, y = data.batch(at)
                    leaves = {k: v.detach().requires_grad_() for k, v in w.items()}
                    hidden = F.relu(F.linear(x.flatten(1), leaves["fc1.weight"], leaves["fc1.bias"]))
                    loss = F.cross_entropy(F.linear(hidden, leaves["fc2.weight"], leaves["fc2.bias"]), y)
                    for (k, v), grad in zip(
                        leaves.items(), torch.autograd.grad(loss, list(leaves.values())), strict=True
                    ):
                        w[k] = v.detach() - work.lr * grad * (torch.from_numpy(mask[k]) if k in mask else 1.0)
                if epoch == 0:
                    fe = candidate(w, mask, 100 * work.prune)
            le = candidate(w, mask, 100 * work.prune)
            apartness = np.mean([np.mean(fe[k] != le[k]) for k in names])
            total = sum(mask[k].size for k in names)
            gone = 100 * (1 - sum(mask[k].sum() for k in names) / total)
            target = 100 * (1 - work.prune_to)
            if apartness > work.prune_apart and gone < target - 1e-4:
                if target - gone < 100 * work.prune:
                    le = candidate(w, mask, min(5.0, 100 * (target - gone) / (100 - gone)))
                if accuracy(w, le, held) > work.prune_accuracy:
                    mask = masks[client] = le
            local.append((w, {k: torch.from_numpy(v) for k, v in mask.items()}))
        for k, old in server.items():
            if k in names:
                count = sum(mask[k].float() for _, mask in local)
                total_w = sum(w[k].detach() * mask[k] for w, mask in local)
                server[k] = torch.where(count > 0, total_w / count.clamp(min=1), old)
            else:
                server[k] = sum(w[k].detach() for w, _ in local) / len(local)
    return server, masks


def test_rounds_are_the_textbooks() -> None:
    world = World()
    m = sub_fedavg(step=0.2, target=0.5, accuracy=0.5, work=Work(epochs=3, batch=6, lr=0.2))
    state, _ = played(world, m, sync(CLIENTS), versions=7)
    want, masks = textbook(world, 7, m, {(t.version, t.client): t.seed for t in world.tasks})
    shares = set()
    for client, mask in enumerate(masks):
        for k, bits in mask.items():
            assert np.array_equal(state.density[client].where(k, bits.shape).numpy(), bits), (client, k)
            shares.add(round(bits.mean(), 2))
    assert len(shares) > 3
    for k, v in want.items():
        torch.testing.assert_close(state.params[k], v, rtol=0, atol=2e-6)


def test_personal_masks_shrink_to_the_target_and_are_named_by_eight_bytes() -> None:
    world = World()
    seen: list[State] = []
    state, events = played(world, method("sub_fedavg"), sync(CLIENTS), versions=12, keep=seen.append)
    for client in range(CLIENTS):
        masks = [s.density[client] for s in seen]
        assert all(nested(b, a, world.params) for a, b in pairwise(masks))
        assert 0.45 < masks[-1].density(world.params) < 1
    downs = {(e["client"], e["version"]): e["bytes_down"] for e in of_kind(events, "arrival")}
    task = method("sub_fedavg").assign(state, 0, np.random.default_rng(0))
    assert task.mask is state.density[0]
    size = dict(Downlink(Codec(), world.layout)(task, True))
    assert downs[0, 11] == pytest.approx(next(iter(size.values())), abs=2)  # the lengths of numbers


def test_a_mask_that_is_not_a_smaller_one_is_not_taken() -> None:
    world, m = World(), method("sub_fedavg")
    state = m.init(world.params, world.architecture, world.classes)
    half = Mask({"fc1.weight": torch.arange(128).view(8, 16) < 64})
    nothing = Mask({"fc1.weight": torch.zeros(8, 16, dtype=torch.bool)})

    def told(state: State, mask: Mask) -> State:
        task = m.assign(state, 0, np.random.default_rng(0))
        delta = {k: torch.zeros(mask.count(k, v.shape)) for k, v in world.params.items()}
        return m.step(state, [Arrival(task, 0, 1, 1, 1, Update(0, state.version, delta, mask, 1.0))])

    state = told(state, half)
    assert state.density[0] is half
    assert told(state, nothing).density[0] is half
    assert told(state, Mask({"fc1.weight": ~half.bits["fc1.weight"]})).density[0] is half
    assert told(state, half).density[0] is half
    limited = replace(state, limits={0: 0.25})
    assert m.assign(limited, 0, np.random.default_rng(0)).density == 0.25


def test_it_learns_something() -> None:
    _, events = played(World(), method("sub_fedavg"), sync(CLIENTS), versions=10)
    losses = [e["loss"] for e in of_kind(events, "arrival")]
    assert losses[-1] < 0.5 * losses[0]


def test_hybrid_without_batch_norm_is_one_line() -> None:
    world, m = World(), sub_fedavg(hybrid=True, work=WORK)
    state = m.init(world.params, world.architecture, world.classes)
    with pytest.raises(ValueError, match=r"^sub_fedavg: hybrid prunes channels by BatchNorm's scale, and this model"):
        m.assign(state, 0, np.random.default_rng(0))


@pytest.mark.parametrize(
    "options", [{"step": 1.0}, {"target": 1.0}, {"holdout": -0.1}, {"apart": -1.0}, {"channels_to": 0.0}]
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        sub_fedavg(**options)
