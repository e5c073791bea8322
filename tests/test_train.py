"""Local training: equal to a textbook loop, masked where it should be, and the same to the bit every time."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clients import asked
from clients.outcome import Diverged
from clients.shrink import shrink
from clients.train import train
from prfl import models
from prfl.data import Samples
from prfl.masks import DENSE, Mask
from prfl.types import Group, Member, Task, Tree, Work


def samples(count: int, *shape: int, classes: int = 3, seed: int = 5) -> Samples:
    g = torch.Generator().manual_seed(seed)
    return Samples(torch.randn(count, *shape, generator=g), torch.randint(classes, (count,), generator=g))


def mlp(seed: int = 0) -> nn.Module:
    return models.build("mlp", (1, 3, 3), 3, seed, {"hidden": (8,)})


def cnn(norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))


HIDDEN = Group(8, (Member("fc1.weight", 0), Member("fc1.bias", 0), Member("fc2.weight", 1)))
FILTERS = Group(4, (Member("0.weight", 0), Member("0.bias", 0), Member("5.weight", 1, repeat=4)))
UNITS = Group(6, (Member("5.weight", 0), Member("5.bias", 0), Member("7.weight", 1)))
NARROW = Mask(channels={FILTERS: torch.tensor([0, 2, 3]), UNITS: torch.tensor([1, 4])})


def task(model: nn.Module, work: Work, mask: Mask = DENSE, seed: int = 11) -> Task:
    return Task(client=3, version=7, params=models.values(model), mask=mask, work=work, seed=seed)


def sparse(model: nn.Module, share: float = 0.5) -> Mask:
    g = torch.Generator().manual_seed(1)
    return Mask({k: torch.rand(v.shape, generator=g) < share for k, v in models.values(model).items() if v.dim() > 1})


def bits(mask: Mask, params: Tree) -> Mask:
    """The same kept weights, one by one."""
    return Mask({k: mask.where(k, v.shape) for k, v in params.items() if not mask.whole(k)})


def textbook(job: Task, model: nn.Module, data: Samples) -> Tree:
    """Full local weights by torch.optim, autograd and the plain formulas, single-weight masks reapplied every step."""
    work, start = job.work, job.mask.apply(job.params)
    models.load(model, start)
    model.train()
    weights = dict(model.named_parameters())
    optimiser = torch.optim.SGD(weights.values(), lr=work.lr, momentum=work.momentum, weight_decay=work.weight_decay)
    g = torch.Generator().manual_seed(job.seed)
    order = [at for _ in range(20) for at in torch.randperm(len(data), generator=g).split(work.batch)]
    for at in order[: work.steps or work.epochs * math.ceil(len(data) / work.batch)]:
        x, y = data.batch(at)
        logits = model(x)
        if work.loss == "bce":
            loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(y, logits.shape[1]).float())
        else:
            loss = F.cross_entropy(logits, y)
        loss = loss + work.proximal / 2 * sum((w - start[k]).square().sum() for k, w in weights.items())
        optimiser.zero_grad()
        loss.backward()
        for k, held in job.mask.bits.items():
            weights[k].grad *= held
        if work.clip:
            nn.utils.clip_grad_norm_(weights.values(), work.clip)
        optimiser.step()
        with torch.no_grad():
            for k, held in job.mask.bits.items():
                weights[k] *= held
    return models.values(model)


def close(delta: Tree, job: Task, local: Tree, tolerance: float = 1e-6) -> None:
    start = job.mask.apply(job.params)
    assert list(delta) == list(local)
    for k, got in delta.items():
        torch.testing.assert_close(got, job.mask.gather(k, local[k] - start[k]), atol=tolerance, rtol=1e-4, msg=k)


def same(a: Tree, b: Tree) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


OPTIONS = {
    "epochs": Work(epochs=3, batch=4),
    "steps": Work(steps=7, batch=4),
    "batch": Work(epochs=2, batch=100),
    "momentum": Work(steps=9, batch=4, momentum=0.9),
    "weight_decay": Work(steps=9, batch=4, weight_decay=0.1),
    "proximal": Work(steps=9, batch=4, proximal=0.7),
    "clip": Work(steps=9, batch=4, clip=0.3),
    "bce": Work(steps=9, batch=4, loss="bce"),
    "all": Work(steps=9, batch=4, momentum=0.5, weight_decay=0.1, proximal=0.7, clip=0.3, loss="bce"),
}


@pytest.mark.parametrize("work", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_equals_a_textbook_loop(work: Work, share: float) -> None:
    job = task(mlp(), work, DENSE if share == 1 else sparse(mlp(), share))
    data = samples(10, 1, 3, 3)
    close(train(job, mlp(seed=9), data).delta, job, textbook(job, mlp(), data))


@pytest.mark.parametrize("option", ["momentum", "all"])
def test_convolutions_equal_the_textbook_loop(option: str) -> None:
    model, data = cnn(norm=True), samples(12, 1, 6, 6)
    job = task(model, OPTIONS[option], sparse(model))
    close(train(job, cnn(norm=True), data).delta, job, textbook(job, cnn(norm=True), data), 1e-5)


@pytest.mark.parametrize("option", ["epochs", "steps", "batch", "momentum", "weight_decay"])
@pytest.mark.parametrize("build", [mlp, cnn, lambda: cnn(norm=True)], ids=["mlp", "cnn", "norm"])
def test_without_fast_it_is_the_textbook_loop_to_the_bit(option: str, build: Callable[[], nn.Module]) -> None:
    shape = (1, 3, 3) if build is mlp else (1, 6, 6)
    data, job = samples(12, *shape), task(build(), replace(OPTIONS[option], fast=False))
    wanted = textbook(job, build(), data)
    assert same(train(job, build(), data).delta, {k: (v - job.params[k]).flatten() for k, v in wanted.items()})


@pytest.mark.parametrize("name", ["mlp", "two_cnn", "conv2_mnist", "lenet5"])
def test_fast_rounds_otherwise_and_no_more(name: str) -> None:
    model, data = models.build(name, (1, 28, 28), 10, seed=0), samples(40, 1, 28, 28, classes=10)
    quick = train(task(model, Work(lr=0.05)), model, data)
    plain = train(task(model, Work(lr=0.05, fast=False)), model, data)
    # what BatchNorm takes away again moves by rounding alone
    noise = {"conv1.bias", "bn1.bias", "conv2.bias"} if name == "conv2_mnist" else set()
    for k in plain.delta.keys() - noise:
        v = plain.delta[k]
        torch.testing.assert_close(quick.delta[k], v, rtol=0, atol=1e-4 * float(v.abs().max()), msg=k)
    assert quick.metrics == pytest.approx(plain.metrics, rel=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_small_model_trains_like_the_masked_large_one(option: str) -> None:
    data, job = samples(12, 1, 6, 6), task(cnn(), OPTIONS[option], NARROW)
    masked = replace(job, mask=bits(NARROW, job.params))
    small, large = train(job, cnn(), data).delta, train(masked, cnn(), data).delta
    assert sum(map(len, small.values())) == 27 + 3 + 2 * 12 + 2 + 3 * 2 + 3
    for k in small:
        torch.testing.assert_close(small[k], large[k], atol=1e-5, rtol=1e-4, msg=k)


def test_the_small_skeleton_is_made_once_a_mask_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Mask] = []
    monkeypatch.setattr(asked, "shrink", lambda model, mask: made.append(mask) or shrink(model, mask))
    model, data = cnn(), samples(12, 1, 6, 6)
    mask = Mask(channels=dict(NARROW.channels))
    first, other = task(cnn(), OPTIONS["all"], mask), task(cnn(), OPTIONS["all"], mask, seed=4)
    job = replace(first, params=models.values(model))
    alone = train(job, cnn(), data)
    made.clear()
    train(other, model, data)
    again = train(job, model, data)
    assert len(made) == 1
    assert all(torch.equal(again.delta[k], v) for k, v in alone.delta.items())
    assert list(asked._SMALL[model]) == [mask]
    del mask, first, other, job, alone, again
    made.clear()
    gc.collect()
    assert not asked._SMALL[model]


def test_integers_that_a_model_holds_stay_in_the_small_one() -> None:
    class Turned(nn.Sequential):
        def __init__(self, *layers: nn.Module):
            super().__init__(*layers)
            self.register_buffer("order", torch.arange(5, -1, -1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[..., self.order])

    model, data = Turned(*cnn()), samples(12, 1, 6, 6)
    job = task(model, OPTIONS["all"], NARROW)
    plain = train(job, cnn(), replace(data, x=data.x.flip(-1)))
    turned = train(job, model, data)
    assert all(torch.equal(turned.delta[k], v) for k, v in plain.delta.items())


def test_channels_and_weights_can_be_masked_together() -> None:
    model, data = cnn(), samples(12, 1, 6, 6)
    single = {"5.weight": NARROW.where("5.weight", (6, 16)) & sparse(model).bits["5.weight"]}
    job = task(model, OPTIONS["all"], Mask(single, NARROW.channels))
    masked = replace(job, mask=bits(job.mask, job.params))
    small, large = train(job, cnn(), data).delta, train(masked, cnn(), data).delta
    assert 0 < len(small["5.weight"]) < 24
    for k in small:
        torch.testing.assert_close(small[k], large[k], atol=1e-5, rtol=1e-4, msg=k)


@pytest.mark.parametrize("mask", [sparse(cnn()), NARROW], ids=["weights", "channels"])
def test_what_the_client_does_not_hold_plays_no_part(mask: Mask) -> None:
    data, job = samples(12, 1, 6, 6), task(cnn(), OPTIONS["all"], mask)
    other = {k: torch.where(mask.where(k, v.shape), v, 99.0) for k, v in job.params.items()}
    assert same(train(job, cnn(), data).delta, train(replace(job, params=other), cnn(), data).delta)


def test_the_same_task_gives_the_same_bits() -> None:
    model = nn.Sequential(*cnn(norm=True), nn.Dropout(0.3))
    data = samples(13, 1, 6, 6)
    jobs = [
        task(model, replace(OPTIONS["all"], report=report), mask, seed)
        for report in ("", "gradient2")
        for mask in (DENSE, sparse(model))
        for seed in (1, 2)
    ]
    first = [train(job, model, data) for job in jobs]
    for job, update in reversed(list(zip(jobs, first, strict=True))):
        torch.rand(1)
        again = train(job, model, data)
        assert same(again.delta, update.delta)
        assert again.metrics == update.metrics
    fresh = nn.Sequential(*cnn(norm=True), nn.Dropout(0.3))
    nn.init.ones_(fresh[0].weight)
    assert same(train(jobs[0], fresh, data).delta, first[0].delta)
    assert not same(first[0].delta, first[1].delta)


@pytest.mark.parametrize("mask", [DENSE, sparse(cnn()), NARROW], ids=["dense", "weights", "channels"])
@pytest.mark.parametrize("lr", [0.1, 1e30])
@pytest.mark.parametrize("report", ["", "gradient"])
def test_model_task_and_torch_are_left_as_they_were(mask: Mask, lr: float, report: str) -> None:
    model = nn.Sequential(*cnn(), nn.Dropout(0.3)).eval()
    model[7].train()
    before, generator, modes = models.values(model), torch.get_rng_state(), [m.training for m in model.modules()]
    job = task(model, Work(steps=5, lr=lr, scaler=True, momentum=0.9, report=report, scope="all"), mask)
    params = {k: v.clone() for k, v in job.params.items()}
    try:
        train(job, model, samples(20, 1, 6, 6))
    except Diverged:
        assert lr == 1e30
    assert same(models.values(model), before)
    assert same(job.params, params)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_metrics_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    data = Samples(torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1, 1), torch.tensor([1, 1, 0]))
    update = train(task(model, Work(steps=1, batch=3, lr=1.0)), model, data)
    expected = {"loss": math.log(2), "loss_first": math.log(2), "loss_last": math.log(2), "accuracy": 1 / 3}
    assert update.metrics == pytest.approx(expected | {"samples": 3, "steps": 1})
    torch.testing.assert_close(update.delta["1.weight"], torch.tensor([-1 / 6, 1 / 6]))
    assert (update.client, update.version, update.weight, update.signal) == (3, 7, 3.0, None)


def test_losses_are_means_over_the_samples_seen() -> None:
    metrics = train(task(mlp(), Work(epochs=2, batch=4, lr=0.3)), mlp(), samples(5, 1, 3, 3)).metrics
    assert (metrics["samples"], metrics["steps"]) == (10, 4)
    still = train(task(mlp(), Work(batch=4, lr=0.0)), mlp(), samples(5, 1, 3, 3)).metrics
    data = samples(5, 1, 3, 3)
    assert still["loss"] == pytest.approx(F.cross_entropy(mlp()(data.x), data.y).item())
    one = train(task(mlp(), Work(steps=1, batch=4)), mlp(), samples(5, 1, 3, 3)).metrics
    assert one["loss"] == one["loss_first"] == one["loss_last"] == metrics["loss_first"]


def test_logits_of_absent_classes_are_zero() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 3, bias=False))
    model[1].weight.data = torch.tensor([[0.0], [0.0], [5.0]])
    data = Samples(torch.ones(2, 1, 1, 1), torch.tensor([0, 1]))
    update = train(task(model, Work(batch=2, lr=1.0, absent="zero")), model, data)
    torch.testing.assert_close(update.delta["1.weight"], torch.tensor([1 / 6, 1 / 6, 0.0]))
    assert update.metrics["loss"] == pytest.approx(math.log(3))
    assert {k: v for k, v in update.metrics.items() if k.startswith("class/")} == {"class/0": 1.0, "class/1": 1.0}
    plain = train(task(model, Work(batch=2, lr=1.0)), model, data)
    assert plain.delta["1.weight"][2] < -0.9
    assert not any(k.startswith("class/") for k in plain.metrics)


@pytest.mark.parametrize("report", ["", "gradient"])
def test_scaler_divides_by_the_share_kept(report: str) -> None:
    model, data = mlp(), samples(6, 1, 3, 3)
    kept = torch.tensor([1, 6])
    work = Work(batch=6, lr=1.0, scaler=True, report=report, scope="all")
    job = task(model, work, Mask(channels={HIDDEN: kept}))
    w = {k: v.clone().requires_grad_() for k, v in job.params.items()}
    hidden = (data.x.flatten(1) @ w["fc1.weight"][kept].T + w["fc1.bias"][kept]) / 0.25
    loss = F.cross_entropy(hidden.relu() @ w["fc2.weight"][:, kept].T + w["fc2.bias"], data.y)
    gradients = torch.autograd.grad(loss, list(w.values()))
    update = train(job, model, data)
    for (k, got), g in zip(update.delta.items(), gradients, strict=True):
        torch.testing.assert_close(got, -job.mask.gather(k, g), msg=k)
    assert update.metrics["loss"] == pytest.approx(loss.item())


def test_scaler_leaves_a_whole_model_alone() -> None:
    data = samples(6, 1, 6, 6)
    plain, scaled = (train(task(cnn(), Work(scaler=s)), cnn(), data).delta for s in (False, True))
    assert same(plain, scaled)


def test_static_statistics_stay_as_received() -> None:
    model, data = cnn(norm=True), samples(12, 1, 6, 6)
    share, static = (train(task(model, Work(steps=5, statistics=s)), model, data).delta for s in ("share", "static"))
    running = ["1.running_mean", "1.running_var"]
    assert all(share[k].abs().min() > 0 for k in running)
    assert all(not static[k].any() for k in running)
    assert all(torch.equal(share[k], static[k]) for k in share if k not in running)
    assert model[1].track_running_stats
    assert int(model[1].num_batches_tracked) == 0


def test_divergence_names_the_step() -> None:
    data = samples(20, 1, 3, 3)
    with pytest.raises(Diverged, match=r"^loss became (nan|inf) at step [2-5] \(lr 1e\+30\)$"):
        train(task(mlp(), Work(steps=5, batch=4, lr=1e30)), mlp(), data)
    huge = replace(data, x=data.x * 1e20)
    with pytest.raises(Diverged, match=r"^weights became infinite or nan at step 1 \(lr 1e\+30\)$"):
        train(task(mlp(), Work(steps=1, batch=4, lr=1e30)), mlp(), huge)


def test_tiny_clients() -> None:
    assert train(task(mlp(), Work(batch=20)), mlp(), samples(1, 1, 3, 3)).metrics["steps"] == 1
    assert train(task(mlp(), Work(batch=2)), mlp(), samples(5, 1, 3, 3)).metrics["steps"] == 3
    normed = task(cnn(norm=True), Work(batch=2, epochs=2))
    assert train(normed, cnn(norm=True), samples(5, 1, 6, 6)).metrics["steps"] == 4
    with pytest.raises(ValueError, match="client 3: BatchNorm needs batches of two or more, got 1 samples"):
        train(normed, cnn(norm=True), samples(1, 1, 6, 6))
    with pytest.raises(ValueError, match="client 3 has no samples"):
        train(normed, cnn(norm=True), samples(0, 1, 6, 6))


def test_batches_of_one_join_only_before_batch_norm() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    assert train(task(model, Work(steps=7, batch=2)), model, samples(5, 1, 3, 3)).metrics["samples"] == 2 * 4 + 3 * 3


def test_frozen_and_unused_parameters_do_not_move() -> None:
    model = mlp()
    model.fc1.weight.requires_grad_(False)
    model.spare = nn.Identity()
    model.spare.extra = nn.Parameter(torch.ones(2))
    delta = train(task(model, Work(steps=3, momentum=0.9)), model, samples(8, 1, 3, 3)).delta
    assert not delta["fc1.weight"].any()
    assert not delta["spare.extra"].any()
    assert delta["fc2.weight"].any()


@pytest.mark.parametrize("bad", [{"batch": 0}, {"epochs": 0}])
def test_work_without_work_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="need batch and epochs or steps above 0"):
        train(task(mlp(), replace(Work(), **bad)), mlp(), samples(4, 1, 3, 3))


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit the model"):
        train(task(mlp(), Work()), cnn(), samples(4, 1, 6, 6))
