"""Reports: equal to what torch.autograd gives by hand, for every kind, window and scope."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.statistics import normalised
from clients.train import train
from prfl import models
from prfl.data import Samples
from prfl.masks import DENSE, Mask
from prfl.types import Group, Member, Task, Tree, Update, Work

HIDDEN = Group(8, (Member("fc1.weight", 0), Member("fc1.bias", 0), Member("fc2.weight", 1)))
G = torch.Generator().manual_seed(2)
DATA = Samples(torch.randn(10, 1, 3, 3, generator=G), torch.randint(3, (10,), generator=G))
MASKS = {
    "dense": DENSE,
    "weights": Mask(
        {"fc1.weight": torch.rand(8, 9, generator=G) < 0.5, "fc2.weight": torch.rand(3, 8, generator=G) < 0.5}
    ),
    "channels": Mask(channels={HIDDEN: torch.tensor([1, 2, 6])}),
}
LR = 0.5


def mlp() -> nn.Module:
    return models.build("mlp", (1, 3, 3), 3, 0, {"hidden": (8,)})


def run(work: Work, mask: Mask = DENSE) -> Update:
    return train(Task(0, 0, models.values(mlp()), mask, replace(work, lr=LR, batch=4), seed=4), mlp(), DATA)


def by_hand(mask: Mask, steps: int) -> tuple[list[dict[str, Tensor]], Tree, int]:
    """The dense gradient of every step at the masked weights, the change of the weights, and the samples seen."""
    start = mask.apply(models.values(mlp()))
    w, found, seen = dict(start), [], 0
    g = torch.Generator().manual_seed(4)
    order = [at for _ in range(steps) for at in torch.randperm(10, generator=g).split(4)][:steps]
    for at in order:
        x, y = DATA.batch(at)
        w = {k: v.detach().requires_grad_() for k, v in w.items()}
        hidden = (x.flatten(1) @ w["fc1.weight"].T + w["fc1.bias"]).relu()
        loss = F.cross_entropy(hidden @ w["fc2.weight"].T + w["fc2.bias"], y)
        found.append(dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True)))
        w = {k: v.detach() - LR * found[-1][k] * mask.where(k, v.shape) for k, v in w.items()}
        seen += len(at)
    return found, {k: w[k] - start[k] for k in w}, seen


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scope", ["kept", "all"])
@pytest.mark.parametrize("window", ["last", "all"])
@pytest.mark.parametrize("report", ["gradient", "gradient2", "change"])
def test_equals_autograd_by_hand(report: str, window: str, scope: str, mask: Mask) -> None:
    gradients, change, seen = by_hand(mask, steps=5)
    assert seen == 4 + 4 + 2 + 4 + 4
    whole = {k: sum(g[k] for g in (gradients if window == "all" else gradients[-1:])) for k in change}
    expected = {"gradient": whole, "gradient2": {k: v**2 * seen for k, v in whole.items()}}.get(
        report, {k: v.abs() for k, v in change.items()}
    )
    update = run(Work(steps=5, report=report, window=window, scope=scope), mask)
    assert list(update.signal) == list(expected)
    for k, got in update.signal.items():
        right = expected[k].flatten() if scope == "all" else mask.gather(k, expected[k])
        torch.testing.assert_close(got, right, atol=1e-5, rtol=1e-4, msg=k)
        assert got.dtype == torch.float32


def test_pruned_weights_have_a_gradient_where_their_neighbours_live() -> None:
    signal = run(Work(report="gradient2", scope="all"), MASKS["weights"]).signal
    outside = ~MASKS["weights"].bits["fc1.weight"].flatten()
    assert (signal["fc1.weight"][outside] > 0).float().mean() > 0.5


@pytest.mark.parametrize("report", ["gradient", "gradient2", "change"])
def test_the_report_changes_nothing_else(report: str) -> None:
    for name, mask in MASKS.items():
        work = Work(
            steps=5, clip=1e9
        )  # clips nothing; without it this network would be trained stacked, to another rounding
        plain, told = run(work, mask), run(replace(work, report=report, scope="all"), mask)
        assert plain.signal is None
        for k in plain.delta:
            if name == "channels":
                torch.testing.assert_close(told.delta[k], plain.delta[k], atol=1e-6, rtol=1e-4)
            else:
                assert torch.equal(told.delta[k], plain.delta[k])


@pytest.mark.parametrize("option", [{"proximal": 3.0}, {"clip": 1e-3}, {"weight_decay": 0.9}, {"momentum": 0.9}])
def test_gradients_are_those_of_the_loss_alone(option: dict[str, float]) -> None:
    gradients, _, _ = by_hand(DENSE, steps=1)
    signal = run(replace(Work(steps=1, report="gradient"), **option)).signal
    for k, got in signal.items():
        torch.testing.assert_close(got, gradients[0][k].flatten(), msg=k)


@pytest.mark.parametrize("report", ["gradient", "gradient2", "change"])
def test_running_statistics_are_not_reported(report: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    signal = train(Task(0, 0, models.values(model), DENSE, Work(report=report), seed=0), model, DATA).signal
    assert list(signal) == [k for k, _ in model.named_parameters()]
    assert len(signal["0.weight"]) == 8


def test_values_are_in_row_major_order_for_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3))
    data = Samples(torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)
    update = train(Task(0, 0, models.values(model), DENSE, Work(steps=1, report="gradient", lr=0.5), 0), model, data)
    F.cross_entropy(model(data.x), data.y).backward()
    torch.testing.assert_close(update.signal["0.weight"], model[0].weight.grad.flatten())
    torch.testing.assert_close(update.delta["0.weight"], -0.5 * model[0].weight.grad.flatten())


def test_normalised_is_joint_over_the_model() -> None:
    got = normalised({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([5.0]), "none": torch.zeros(0)})
    assert {k: v.tolist() for k, v in got.items()} == {"a": [0.0, 0.5], "b": [1.0], "none": []}
    assert normalised({"a": torch.full((3,), 7.0)})["a"].tolist() == [0, 0, 0]
    assert normalised({}) == {}


@pytest.mark.parametrize("report", ["gradient2", "change"])
def test_a_normalised_report_is_scaled_from_least_to_largest(report: str) -> None:
    raw, scaled = (run(Work(report=report, normalise=n), MASKS["weights"]).signal for n in (False, True))
    assert (min(v.min() for v in scaled.values()), max(v.max() for v in scaled.values())) == (0, 1)
    flat = torch.cat(list(raw.values()))
    torch.testing.assert_close(torch.cat(list(scaled.values())), (flat - flat.min()) / (flat.max() - flat.min()))
