"""Evaluation: golden scores, no trace in the model, BatchNorm statistics taken anew."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prfl import models
from prfl.data import Samples
from prfl.evaluate import evaluate
from prfl.masks import Mask


def samples(count: int, classes: int = 3, seed: int = 5) -> Samples:
    g = torch.Generator().manual_seed(seed)
    return Samples(torch.randn(count, 1, 4, 4, generator=g), torch.randint(classes, (count,), generator=g))


def normed() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)
        )


def identity(classes: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model whose logits are its inputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(classes, classes, bias=False)), {"1.weight": torch.eye(classes)}


def test_scores_by_hand() -> None:
    model, params = identity(2)
    data = Samples(
        torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]]).view(3, 2, 1, 1), torch.tensor([0, 0, 0])
    )
    scores = evaluate(params, model, data)
    assert scores == pytest.approx(
        {"loss": (math.log(2) + math.log(4 / 3) + math.log(4)) / 3, "accuracy": 2 / 3, "samples": 3}
    )


def test_top5_needs_more_than_five_classes() -> None:
    model, params = identity(7)
    data = Samples(torch.arange(7.0).repeat(7, 1).view(7, 7, 1, 1), torch.arange(7))
    scores = evaluate(params, model, data)
    assert (scores["accuracy"], scores["top5"]) == (pytest.approx(1 / 7), pytest.approx(5 / 7))
    model, params = identity(5)
    assert "top5" not in evaluate(params, model, Samples(torch.zeros(1, 5, 1, 1), torch.tensor([0])))


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_the_batch_size_does_not_matter(batch: int) -> None:
    model, data = normed(), samples(20)
    params = models.values(model)
    assert evaluate(params, model, data, batch) == pytest.approx(evaluate(params, model, data, 20), rel=1e-5)


@pytest.mark.parametrize("calibrate", [None, samples(9)], ids=["plain", "calibrated"])
def test_the_model_is_left_as_it_was(calibrate: Samples | None) -> None:
    model = normed().train()
    model[1].eval()
    before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    params = {k: v + 0.5 for k, v in models.values(model).items()}
    given = {k: v.clone() for k, v in params.items()}
    evaluate(params, model, samples(20), 8, calibrate)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, given[k]) for k, v in params.items())
    assert [m.training for m in model] == [True, False, True, True, True, True]
    assert model[1].momentum == 0.1
    assert torch.equal(torch.get_rng_state(), generator)


def test_scores_depend_on_params_not_on_the_skeleton() -> None:
    model, data = normed(), samples(20)
    params = models.values(model)
    nn.init.ones_(model[5].weight)
    assert evaluate(params, model, data) == evaluate(params, normed(), data)
    assert evaluate(params, model, data) != evaluate(models.values(model), model, data)


def test_calibration_takes_the_mean_over_batches() -> None:
    model, data, other = normed(), samples(20), samples(9, seed=6)
    model[1].num_batches_tracked += 5
    params = models.values(model)
    maps = [F.conv2d(x, params["0.weight"], params["0.bias"]) for x in (other.x[:4], other.x[4:])]
    mean = sum(m.mean(dim=(0, 2, 3)) for m in maps) / 2
    var = sum(m.var(dim=(0, 2, 3)) for m in maps) / 2
    right = evaluate(params | {"1.running_mean": mean, "1.running_var": var}, model, data)
    assert evaluate(params, model, data, 4, other) == pytest.approx(right, rel=1e-5)
    assert evaluate(params, model, data, 4)["loss"] != pytest.approx(right["loss"], rel=1e-3)


def test_calibration_leaves_a_model_without_batch_norm_alone() -> None:
    model, data = models.build("mlp", (1, 4, 4), 3, 0), samples(20)
    params = models.values(model)
    assert evaluate(params, model, data, calibrate=samples(9)) == evaluate(params, model, data)


def test_a_clients_part_is_evaluated_by_its_mask() -> None:
    model, data = models.build("mlp", (1, 4, 4), 3, 0, {"hidden": (8,)}), samples(20)
    params, gone = models.values(model), torch.zeros(3, 8, dtype=torch.bool)
    scores = evaluate(Mask({"fc2.weight": gone}).apply(params) | {"fc2.bias": torch.zeros(3)}, model, data)
    assert scores["loss"] == pytest.approx(math.log(3))


def test_bad_input_is_refused() -> None:
    model = normed()
    with pytest.raises(ValueError, match="no samples"):
        evaluate(models.values(model), model, samples(0))
    with pytest.raises(ValueError, match=r"1\.weight"):
        evaluate({k: v for k, v in models.values(model).items() if k != "1.weight"}, model, samples(3))
