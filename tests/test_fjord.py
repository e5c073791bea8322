"""FjORD: nested widths by hand, every step a textbook's on slices, the server's rings, honest costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import ceil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_server import of_kind, played
from torch import nn
from world import CLIENTS, WORK, World, method

from clients.train import train
from prfl import cost, models
from prfl.cut import Cut
from prfl.groups import architecture
from prfl.masks import DENSE, Mask
from prfl.overlap import nested
from prfl.samples import Samples
from prfl.types import Arrival, Group, Member, Task, Tree, Update, Work
from prfl.widths import ladder, leading
from strategies.fjord import fjord
from strategies.pacing import sync

HIDDEN = Group(8, (Member("fc1.weight", 0), Member("fc1.bias", 0), Member("fc2.weight", 1)))


def test_ladders_by_hand() -> None:
    assert ladder(1.0, 5) == (0.2, 0.4, 0.6, 0.8, 1.0)
    assert ladder(0.6, 5) == (0.2, 0.4, 0.6)
    assert ladder(0.2, 5) == (0.2,)
    assert ladder(0.5, 4) == (0.25, 0.5)
    assert ladder(0.3, 5) == (0.2, 0.3)  # a limit of memory between two rungs
    assert ladder(0.1, 5) == (0.1,)


@pytest.mark.parametrize("own", [1.0, 0.8, 0.6, 0.4, 0.2])
def test_a_narrower_width_is_the_mask_of_that_width(own: float) -> None:
    world = World()
    scores = {k: -torch.arange(v.numel(), dtype=torch.float32).view(v.shape) for k, v in world.params.items()}
    rank = Cut("channels", width="linear", named=True).rank(scores, world.params, world.architecture.groups)
    masks = [leading(rank.mask(own), width, own) for width in ladder(own, 5)]
    for mask, width in zip(masks, ladder(own, 5), strict=True):
        (kept,) = mask.channels.values()
        assert kept.tolist() == list(range(ceil(width * 8 - 1e-9)))
        assert kept.equal(*rank.mask(width).channels.values())
    assert all(nested(a, b, world.params) for a, b in pairwise(masks))


def test_groups_that_are_never_cut_stay_whole() -> None:
    mask = Mask(channels={HIDDEN: torch.arange(8)})
    assert len(leading(mask, 0.2, 0.6).channels[HIDDEN]) == 8
    assert len(leading(mask, 0.2, 1.0).channels[HIDDEN]) == 2


def samples(count: int = 20) -> Samples:
    g = torch.Generator().manual_seed(5)
    return Samples(torch.randn(count, 1, 3, 3, generator=g), torch.randint(3, (count,), generator=g))


def mlp() -> nn.Module:
    return models.build("mlp", (1, 3, 3), 3, 0, {"hidden": (8,)})


def textbook(job: Task, data: Samples) -> Tree:
    """The client's loop on explicit slices of the full weights."""
    work, own = job.work, job.density
    w = {k: v.clone().requires_grad_() for k, v in job.params.items()}
    optimiser = torch.optim.SGD(w.values(), work.lr, momentum=work.momentum, weight_decay=work.weight_decay)
    widths = [k / 5 for k in range(1, 6) if k / 5 <= own]
    draws = torch.randint(len(widths), (work.steps,), generator=torch.Generator().manual_seed(job.seed + 1))
    g = torch.Generator().manual_seed(job.seed)
    order = [at for _ in range(20) for at in torch.randperm(len(data), generator=g).split(work.batch)]

    def net(x: torch.Tensor, p: float) -> torch.Tensor:
        n = ceil(p * 8)
        hidden = F.relu(F.linear(x.flatten(1), w["fc1.weight"][:n], w["fc1.bias"][:n]))
        return F.linear(hidden, w["fc2.weight"][:, :n], w["fc2.bias"])

    for at, i in zip(order, draws.tolist(), strict=False):
        x, y = data.batch(at)
        optimiser.zero_grad()
        if work.distil:
            teacher = net(x, own)
            F.cross_entropy(teacher, y).backward()
            F.cross_entropy(net(x, widths[i]), teacher.detach().softmax(1)).backward()
        else:
            F.cross_entropy(net(x, widths[i]), y).backward()
        optimiser.step()
    return {k: v.detach() for k, v in w.items()}


@pytest.mark.parametrize("own", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("distil", [False, True])
@pytest.mark.parametrize("more", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=["plain", "momentum"])
def test_every_step_is_the_textbooks(own: float, distil: bool, more: dict[str, float]) -> None:
    """The drawn width that is the own one distils nothing: CE(softmax(f), f) has no gradient."""
    kept = torch.arange(ceil(own * 8))
    work = Work(steps=12, batch=6, lr=0.2, rungs=5, distil=distil, **more)
    job = Task(0, 0, models.values(mlp()), Mask(channels={HIDDEN: kept}), work, 11, own)
    update, want = train(job, mlp(), samples()), textbook(job, samples())
    for k, v in update.delta.items():
        torch.testing.assert_close(v, job.mask.gather(k, want[k] - job.params[k]), rtol=1e-4, atol=1e-5, msg=k)
    assert update.mask is job.mask


def test_the_lowest_tier_trains_plainly() -> None:
    mask = Mask(channels={HIDDEN: torch.arange(2)})
    plain = Task(0, 0, models.values(mlp()), mask, Work(steps=5, batch=6, clip=1e9), 3, 0.2)  # not stacked
    one, other = (train(replace(plain, work=w), mlp(), samples()) for w in (plain.work, replace(plain.work, rungs=5)))
    assert all(torch.equal(one.delta[k], other.delta[k]) for k in one.delta)


def test_widths_of_convolutions_with_batch_norm() -> None:
    model = models.build("conv2_mnist", (1, 16, 16), 3, 0, {"channels": (5, 10), "hidden": 10})
    data = Samples(torch.randn(12, 1, 16, 16), torch.arange(12) % 3)
    known = architecture(model, data.x[:1])
    rank = fjord().cut.rank(models.values(model), models.values(model), known.groups)
    work = Work(steps=6, batch=6, rungs=5, distil=True, statistics="static")
    job = Task(0, 0, models.values(model), rank.mask(1.0), work, 1, 1.0)
    update = train(job, model, data)
    assert all(len(v) == job.params[k].numel() for k, v in update.delta.items())
    assert not update.delta["bn1.running_mean"].any()
    assert update.delta["conv1.weight"].any()
    assert model.bn1.track_running_stats


@pytest.mark.parametrize(
    "job",
    [Task(0, 0, {}, DENSE, Work(rungs=5), 0),
     Task(0, 0, {}, Mask(channels={HIDDEN: torch.arange(4)}), Work(rungs=5, report="gradient", scope="all"), 0)],
    ids=["no names", "report"],
)  # fmt: skip
def test_masks_that_do_not_do_are_one_line(job: Task) -> None:
    with pytest.raises(ValueError, match=r"^work: rungs need a mask that names its channels"):
        train(replace(job, params=models.values(mlp())), mlp(), samples())


def test_the_server_averages_rings() -> None:
    """The reference's way: from wide to narrow, overwrite the slice with the mean of those that own it."""
    world, m = World(), method("fjord")
    state = m.init(world.params, world.architecture, world.classes)
    arrivals, local = [], []
    for client in range(CLIENTS - 1):
        share = (0.8, 0.6, 0.4, 0.2, 0.2)[client]
        task = Task(client, 0, state.params, state.rank.mask(share), WORK, client, share)
        draw = torch.Generator().manual_seed(client)
        new = {k: torch.randn(v.shape, generator=draw) for k, v in world.params.items()}
        delta = {k: task.mask.gather(k, new[k] - v) for k, v in world.params.items()}
        arrivals.append(Arrival(task, 0, 1, 1, 1, Update(client, 0, delta, task.mask, 1.0 + client)))
        local.append((share, 1.0 + client, new))
    want = {k: v.clone() for k, v in world.params.items()}
    for p in (1.0, 0.8, 0.6, 0.4, 0.2):
        own = [(n, w) for share, n, w in local if share >= p]
        if own:
            width, total = ceil(p * 8), sum(n for n, _ in own)
            mean = {k: sum(n * w[k] for n, w in own) / total for k in want}
            want["fc1.weight"][:width], want["fc1.bias"][:width] = mean["fc1.weight"][:width], mean["fc1.bias"][:width]
            want["fc2.weight"][:, :width], want["fc2.bias"] = mean["fc2.weight"][:, :width], mean["fc2.bias"]
    got = m.step(state, arrivals).params
    for k, v in want.items():
        torch.testing.assert_close(got[k], v, rtol=0, atol=1e-6)
    assert torch.equal(got["fc1.weight"][7], world.params["fc1.weight"][7])  # nobody owns it


def test_a_step_costs_what_it_runs() -> None:
    world = World()
    scores = {k: -torch.arange(v.numel(), dtype=torch.float32).view(v.shape) for k, v in world.params.items()}
    rank = fjord().cut.rank(scores, world.params, world.architecture.groups)
    job = Task(0, 0, world.params, rank.mask(0.6), replace(WORK, rungs=5), 0, 0.6)
    unit = 2.0 * (16 + 3)  # of one hidden unit: 16 inputs, 3 outputs
    widths = [2, 4, 5]
    assert cost.step(job, world.architecture)["linear"] == pytest.approx(unit * sum(widths) / 3)
    both = replace(job, work=replace(job.work, distil=True))
    assert cost.step(both, world.architecture)["linear"] == pytest.approx(unit * (5 + (2 + 4) / 3))
    plain = replace(job, work=WORK)
    assert cost.step(plain, world.architecture) == cost.flops_by_kind(world.params, job.mask, world.architecture)


def test_clients_get_their_tiers_and_learn() -> None:
    world = World()
    _, events = played(world, method("fjord", levels={"d0": 1.0, "d1": 0.6, "d2": 0.2}), sync(CLIENTS), versions=10)
    by_class = {(world.classes[e["client"]], e["density"]) for e in of_kind(events, "send")}
    assert by_class == {("d0", 1.0), ("d1", 0.6), ("d2", 0.2)}
    sizes = {world.classes[e["client"]]: e["bytes_up"] for e in of_kind(events, "arrival")}
    assert sizes["d0"] > sizes["d1"] > sizes["d2"]
    losses = [e["loss"] for e in of_kind(events, "arrival") if e["client"] == 0]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("options", [{"rungs": 0}, {"levels": (1.0, 0.0)}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rungs must be 1 or more|levels must be in"):
        fjord(**options)
