"""The physically small model behaves as the masked one."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zoo import ZOO

from clients.shrink import packed, shrink, sliced_bits
from prfl import models
from prfl.cut import Cut
from prfl.groups import architecture
from prfl.masks import DENSE, Mask
from prfl.types import Group, Member

SHARES = (0.1, 0.25, 0.5, 0.9)
BATCH = 16


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def random_cut(model, shape, seed=1):
    """A ranking by random scores over the model's groups."""
    params = models.values(model)
    scores = {k: torch.rand(v.shape, generator=draws(seed)) for k, v in params.items()}
    return Cut(unit="channels").rank(scores, params, architecture(model, torch.zeros(1, *shape)).groups)


def trained_like(model):
    """Statistics and norms away from their first values, or the laws would hold too easily."""
    draw = draws(2)
    for k, v in models.entries(model).items():
        if v.dim() == 1:
            v.copy_(torch.rand(v.shape, generator=draw) + 0.5 if "var" in k else torch.randn(v.shape, generator=draw))
    return model


def pair(model, mask):
    """The masked model in full size, and the small one."""
    dense = deepcopy(model)
    models.load(dense, mask.apply(models.values(model)))
    return dense, shrink(model, mask)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("name", "shape", "options"), ZOO)
def test_outputs_are_those_of_the_masked_model(name, shape, options, share):
    model = trained_like(models.build(name, shape, 10, 0, options))
    mask = random_cut(model, shape).mask(share)
    dense, small = pair(model, mask)
    x = torch.randn(BATCH, *shape, generator=draws())
    assert close(small.eval()(x), dense.eval()(x))
    assert close(small.train()(x), dense.train()(x))
    after, small_after = models.values(dense), models.values(small)
    for k in after:
        assert close(small_after[k].flatten(), mask.gather(k, after[k])), k


@pytest.mark.parametrize(("name", "shape", "options"), ZOO)
def test_gradients_are_those_of_the_masked_model(name, shape, options):
    # in double precision: normalising over few values magnifies rounding beyond any honest tolerance
    model = trained_like(models.build(name, shape, 10, 0, options))
    mask = random_cut(model, shape).mask(0.25)
    dense, small = pair(model.double(), mask)
    x = torch.randn(BATCH, *shape, generator=draws(), dtype=torch.float64)
    y = torch.arange(BATCH) % 10
    for m in (dense, small):
        F.cross_entropy(m(x), y).backward()
    full = {k: p.grad for k, p in dense.named_parameters()}
    for k, p in small.named_parameters():
        assert torch.allclose(p.grad.flatten(), mask.gather(k, full[k]), rtol=1e-7, atol=1e-12), k


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("name", "shape", "options"), ZOO)
def test_values_are_in_mask_order_and_the_model_is_untouched(name, shape, options, share):
    model = models.build(name, shape, 10, 0, options)
    before, x = models.values(model), torch.randn(BATCH, *shape, generator=draws())
    mask = random_cut(model, shape).mask(share)
    small = shrink(model, mask)
    values = packed(small, mask)
    assert values.keys() == before.keys()
    for k, full in before.items():
        assert torch.equal(models.entries(small)[k].flatten(), mask.gather(k, full))
        assert torch.equal(values[k], mask.gather(k, full))
        assert models.entries(small)[k].shape == mask.shape(k, full.shape)
    small(x).sum().backward()
    torch.optim.SGD(small.parameters(), lr=1.0).step()
    assert all(torch.equal(v, before[k]) for k, v in models.entries(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_sizes_written_on_the_layers_follow():
    model = models.build("conv2_mnist", (1, 28, 28), 10, seed=0)
    small = shrink(model, random_cut(model, (1, 28, 28)).mask(0.25))
    assert (small.conv1.out_channels, small.bn1.num_features, small.conv2.in_channels) == (5, 5, 5)
    assert (small.fc1.in_features, small.fc1.out_features, small.fc2.out_features) == (160, 25, 10)
    assert (model.conv1.out_channels, model.fc1.in_features) == (10, 320)


def test_the_dense_mask_copies():
    model = models.build("conv2_mnist", (1, 28, 28), 10, seed=0)
    small = shrink(model, DENSE)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), model.parameters(), strict=True))
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert not own & {t.data_ptr() for t in small.state_dict().values()}


def test_values_can_come_from_elsewhere():
    model, other = (models.build("resnet18", (3, 16, 16), 10, seed, {"width": 4}) for seed in (0, 1))
    mask = random_cut(model, (3, 16, 16)).mask(0.5)
    x = torch.randn(2, 3, 16, 16, generator=draws())
    assert torch.equal(shrink(model, mask, models.values(other)).eval()(x), shrink(other, mask).eval()(x))


def test_frozen_parameters_and_mode_stay():
    model = models.build("mlp", (1, 8, 8), 10, seed=0).eval()
    model.fc1.weight.requires_grad_(False)
    small = shrink(model, random_cut(model, (1, 8, 8)).mask(0.5))
    assert not small.training
    assert not small.fc1.weight.requires_grad
    assert small.fc2.weight.requires_grad


def test_single_weights_are_sliced_with_the_channels():
    model = models.build("lenet5", (1, 28, 28), 10, seed=0)
    channels = random_cut(model, (1, 28, 28)).mask(0.5)
    full = models.values(model)["fc2.weight"]
    keep = torch.rand(full.shape, generator=draws()) < 0.5
    mask = Mask({"fc2.weight": channels.where("fc2.weight", full.shape) & keep}, channels.channels)
    dense, small = pair(model, mask)
    bits = sliced_bits(mask, "fc2.weight")
    assert bits.shape == small.fc2.weight.shape
    assert torch.equal(small.fc2.weight[bits], mask.gather("fc2.weight", full))
    assert torch.equal(packed(small, mask)["fc2.weight"], mask.gather("fc2.weight", full))
    assert not small.fc2.weight[~bits].any()
    assert sliced_bits(mask, "fc1.weight") is None
    x = torch.randn(4, 1, 28, 28, generator=draws())
    assert close(small(x), dense(x))


def test_single_weights_alone_keep_the_size():
    model = models.build("mlp", (1, 8, 8), 10, seed=0)
    mask = Mask({"fc1.weight": torch.rand(200, 64, generator=draws()) < 0.1})
    dense, small = pair(model, mask)
    x = torch.randn(4, 1, 8, 8, generator=draws())
    assert torch.equal(small(x), dense(x))
    assert small.fc1.weight.shape == (200, 64)


def test_single_weights_of_cut_channels_are_refused():
    model = models.build("mlp", (1, 8, 8), 10, seed=0)
    channels = random_cut(model, (1, 8, 8)).mask(0.5)
    mask = Mask({"fc1.weight": torch.ones(200, 64, dtype=torch.bool)}, channels.channels)
    with pytest.raises(ValueError, match=r"keeps single weights of fc1.weight in channels that it cuts"):
        shrink(model, mask)


def test_depthwise_convolutions_shrink():
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1), nn.Flatten()
    )
    mask = random_cut(model, (1, 8, 8)).mask(0.25)
    dense, small = pair(model, mask)
    assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (3, 3, 3)
    x = torch.randn(4, 1, 8, 8, generator=draws())
    assert close(small(x), dense(x))


def test_concatenated_branches_shrink():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 6, 3)
            self.norm, self.fc = nn.BatchNorm2d(10), nn.Linear(40, 3)

        def forward(self, x):
            return self.fc(self.norm(torch.cat([self.a(x).relu(), self.b(x)], 1)).flatten(1))

    model = trained_like(Two())
    mask = random_cut(model, (1, 4, 4)).mask(0.25)
    dense, small = pair(model, mask)
    assert small.fc.in_features == 4 * (2 + 3)
    x = torch.randn(4, 1, 4, 4, generator=draws())
    assert close(small.eval()(x), dense.eval()(x))


@pytest.mark.parametrize(
    ("layer", "size", "message"),
    [
        (nn.LayerNorm(4), 4, "0 is a LayerNorm, which cannot be cut"),
        (nn.Conv2d(4, 4, 1, groups=2), 4, "0 is a grouped convolution, which cannot be cut"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(layer, size, message):
    mask = Mask(channels={Group(size, (Member("0.weight", 0), Member("0.bias", 0))): torch.tensor([1])})
    with pytest.raises(ValueError, match=message):
        shrink(nn.Sequential(layer), mask)
