"""The model zoo."""

import pytest
import torch

from prfl import models

SHAPES = {"vgg11": (3, 32, 32), "resnet18": (3, 32, 32)}
SMALL = {"conv2": {"hidden": 30}, "two_cnn": {"hidden": 30}, "vgg11": {"width": 0.125}, "resnet18": {"width": 8}}


def small(name, seed=0):
    return models.build(name, SHAPES.get(name, (1, 28, 28)), 10, seed, SMALL.get(name, {}))


@pytest.mark.parametrize("name", models.TABLE)
def test_logits_come_out_and_every_parameter_learns(name):
    model = small(name)
    out = model(torch.randn(4, *SHAPES.get(name, (1, 28, 28)), generator=torch.Generator().manual_seed(0)))
    assert out.shape == (4, 10)
    out.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", models.TABLE)
def test_the_seed_alone_decides_and_the_global_generator_is_left_alone(name):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = models.values(small(name))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = models.values(small(name)), models.values(small(name, seed=1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "weights", "rest"),
    [
        ("mlp", (1, 28, 28), 10, 198_800, 410),
        ("conv2", (1, 28, 28), 62, 6_601_504, 2_206),
        ("two_cnn", (1, 28, 28), 10, 1_662_752, 618),
        ("conv2_mnist", (1, 28, 28), 10, 21_750, 90 + 60),
        ("lenet5", (1, 28, 28), 10, 61_470, 236),
        ("vgg11", (3, 32, 32), 10, 9_747_136, 3_786),
        ("resnet18", (3, 64, 64), 200, 10_994_880 + 102_400 + 172_032, 9_800),
    ],
)
def test_sizes_are_those_of_the_papers(name, shape, classes, weights, rest):
    sizes = [(p.dim(), p.numel()) for p in models.build(name, shape, classes, seed=0).parameters()]
    assert sum(n for dim, n in sizes if dim > 1) == weights
    assert sum(n for dim, n in sizes if dim == 1) == rest


def test_resnet18_is_torchvisions():
    import torchvision  # here, because it loads slowly

    theirs = torchvision.models.resnet18(num_classes=7).eval()
    ours = models.build("resnet18", (3, 64, 64), 7, seed=0).eval()
    models.load(ours, models.values(theirs))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_resnet18_stems():
    x = torch.zeros(1, 3, 32, 32)
    cifar = models.build("resnet18", (3, 32, 32), 10, 0, {"stem": "cifar", "width": 8})
    imagenet = models.build("resnet18", (3, 32, 32), 10, 0, {"stem": "imagenet", "width": 8})
    assert cifar.eval().layer4(cifar.layer3(cifar.layer2(cifar.layer1(cifar.conv1(x))))).shape[-1] == 4
    assert imagenet.eval().layer4(
        imagenet.layer3(imagenet.layer2(imagenet.layer1(imagenet.maxpool(imagenet.conv1(x)))))
    ).shape == (1, 64, 1, 1)


def test_first_weights_follow_the_paper():
    conv2 = models.build("conv2", (1, 28, 28), 62, seed=0, options={"start": "fan_out"})
    assert float(conv2.fc1.weight.detach().abs().max()) == pytest.approx((6 / 2048) ** 0.5, rel=1e-3)
    vgg = models.build("vgg11", (3, 32, 32), 10, seed=0)
    assert float(vgg.fc1.weight.detach().abs().max()) == pytest.approx((6 / 512) ** 0.5, rel=1e-3)
    assert float(vgg.fc3.weight.detach().abs().max()) == pytest.approx((6 / (1 + 1.5**2) / 10) ** 0.5, rel=1e-2)
    resnet = models.build("resnet18", (3, 64, 64), 10, seed=0)
    assert float(resnet.layer4[1].conv2.weight.detach().std()) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("name", ["mlp", "conv2", "two_cnn", "vgg11", "resnet18"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (2, 11, 9)])
def test_other_input_sizes(name, shape):
    model = models.build(name, shape, 5, 0, SMALL.get(name, {}))
    assert model(torch.zeros(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize(("name", "shape"), [("lenet5", (1, 8, 8)), ("conv2_mnist", (1, 8, 8)), ("conv2", (1, 3, 28))])
def test_an_input_too_small_is_refused(name, shape):
    with pytest.raises(ValueError, match=rf"model {name}: an input of {'x'.join(map(str, shape))} is too small"):
        models.build(name, shape, 10, seed=0)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "options", "message"),
    [
        ("conv3", (1, 28, 28), 10, {}, "no 'conv3'; have mlp, conv2,"),
        ("conv2", (1, 28, 28), 10, {"hiden": 3}, "model conv2: no option 'hiden'; have hidden, channels"),
        ("conv2", (1, 28, 28), 10, {"hidden": 0}, "above 0, got 0, 32, 64"),
        ("mlp", (1, 28, 28), 0, {}, "classes above 0"),
        ("mlp", (28, 28), 10, {}, "need channels, height, width"),
        ("resnet18", (3, 32, 32), 10, {"stem": "tiny"}, "no stem 'tiny'; have imagenet, cifar"),
        ("lenet5", (1, 28, 28), 10, {"padding": -1}, "padding must be 0 or more, got -1"),
    ],
)
def test_bad_requests_say_what_exists(name, shape, classes, options, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, shape, classes, 0, options)


def test_values_are_a_snapshot_of_parameters_and_float_buffers():
    model = small("conv2_mnist")
    snapshot = models.values(model)
    assert {"bn1.running_mean", "bn1.running_var", "conv1.weight"} <= snapshot.keys()
    assert "bn1.num_batches_tracked" not in snapshot
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert snapshot["conv1.weight"].abs().sum() > 0
    assert not any(v.requires_grad for v in snapshot.values())


def test_load_sets_everything_and_keeps_the_values_apart():
    model, other = small("conv2_mnist"), models.values(small("conv2_mnist", seed=1))
    models.load(model, other)
    assert all(torch.equal(v, other[k]) for k, v in models.entries(model).items())
    with torch.no_grad():
        model.fc1.weight.zero_()
    assert other["fc1.weight"].abs().sum() > 0


def test_load_refuses_trees_that_do_not_fit_and_changes_nothing():
    model = small("mlp")
    before = models.values(model)
    with pytest.raises(ValueError, match=r"\['fc1.bias'\] are in only one"):
        models.load(model, {k: v + 1 for k, v in before.items() if k != "fc1.bias"})
    with pytest.raises(ValueError, match=r"fc3.bias is \(10,\) in the model, got \(11,\)"):
        models.load(model, {k: v + 1 for k, v in before.items()} | {"fc3.bias": torch.zeros(11)})
    assert all(torch.equal(v, before[k]) for k, v in models.entries(model).items())
