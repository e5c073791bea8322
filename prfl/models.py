"""The model zoo: plain modules that can be shrunk, built from a name, an input shape, classes and a seed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from prfl.checks import choice
from prfl.resnet import resnet18
from prfl.types import Tree

Shape = tuple[int, int, int]
"""Channels, height, width."""

Model = Callable[[Shape, int], nn.Module]
"""From an input shape and a number of classes to a module that maps (batch, *shape) to logits (batch, classes)."""

Layers = list[tuple[str, nn.Module]]


def build(name: str, shape: Shape, classes: int, seed: int, options: Mapping[str, object] | None = None) -> nn.Module:
    """The model called `name` in `TABLE`, initialised from `seed` alone; torch's global generator is left as it was.

    ValueError: unknown name or option, a size that is not positive, an input too small for the model.

    >>> build("mlp", (1, 8, 8), classes=10, seed=0, options={"hidden": (16,)})[-1]
    Linear(in_features=16, out_features=10, bias=True)
    """
    if name not in TABLE:
        raise ValueError(f"model: no {name!r}; have {', '.join(TABLE)}")
    known = signature(TABLE[name]).parameters
    for option in options or {}:
        if option not in known:
            raise ValueError(f"model {name}: no option {option!r}; have {', '.join(known)}")
    if len(shape) != 3 or min(*shape, classes) < 1:
        raise ValueError(f"model {name}: need channels, height, width and classes above 0, got {shape} and {classes}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return TABLE[name](**(options or {}))(shape, classes)


def entries(model: nn.Module) -> dict[str, Tensor]:
    """The live entries of a model, detached: all parameters and float buffers, in the model's order."""
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def values(model: nn.Module) -> Tree:
    """A snapshot of a model's entries."""
    return {k: v.clone(memory_format=torch.contiguous_format) for k, v in entries(model).items()}


def load(model: nn.Module, params: Tree) -> None:
    """Set all entries of a model; integer buffers stay. ValueError: entries missing, unknown or of another shape."""
    own = entries(model)
    if odd := own.keys() ^ params.keys():
        raise ValueError(f"load: entries {sorted(odd)} are in only one of model and params")
    for k, tensor in own.items():
        if tensor.shape != params[k].shape:
            raise ValueError(f"load: {k} is {tuple(tensor.shape)} in the model, got {tuple(params[k].shape)}")
    for k, tensor in own.items():
        tensor.copy_(params[k])


@dataclass(frozen=True)
class mlp:
    """Fully connected with ReLU; as published with two hidden layers of 200 (FedAvg, McMahan et al. 2017, "2NN")."""

    hidden: tuple[int, ...] = (200, 200)

    def __post_init__(self) -> None:
        _positive("mlp", "hidden", *self.hidden)

    def __call__(self, shape: Shape, classes: int) -> nn.Module:
        return _network("mlp", shape, classes, [], self.hidden)


@dataclass(frozen=True)
class conv2:
    """FEMNIST's Conv2, as published (PR-FL): two padded 5x5 convolutions, each ReLU and pool, and one hidden layer.

    start: "torch", torch's own; "fan_out", Kaiming-uniform over fan-out for fully connected layers, as published: large
    weights that its binary cross-entropy bears and cross-entropy does not.
    """

    hidden: int = 2048
    channels: tuple[int, int] = (32, 64)
    start: Literal["torch", "fan_out"] = "torch"

    def __post_init__(self) -> None:
        _positive("conv2", "hidden and channels", self.hidden, *self.channels)
        choice("model conv2", "start", self.start, ("torch", "fan_out"))

    def __call__(self, shape: Shape, classes: int) -> nn.Module:
        model = _network("conv2", shape, classes, _convs(shape, self.channels), (self.hidden,))
        for layer in _linears(model) if self.start == "fan_out" else ():
            nn.init.kaiming_uniform_(layer.weight, mode="fan_out")
        return model


@dataclass(frozen=True)
class two_cnn:
    """FedAvg's CNN, as published (McMahan et al. 2017): 5x5x32, pool, 5x5x64, pool, fc 512; torch's own start."""

    hidden: int = 512
    channels: tuple[int, int] = (32, 64)

    def __post_init__(self) -> None:
        _positive("two_cnn", "hidden and channels", self.hidden, *self.channels)

    def __call__(self, shape: Shape, classes: int) -> nn.Module:
        return _network("two_cnn", shape, classes, _convs(shape, self.channels), (self.hidden,))


@dataclass(frozen=True)
class conv2_mnist:
    """MNIST's Conv2, as published (PR-FL): 5x5 convolutions with BatchNorm and pool but no ReLU, one hidden layer."""

    hidden: int = 50
    channels: tuple[int, int] = (10, 20)

    def __post_init__(self) -> None:
        _positive("conv2_mnist", "hidden and channels", self.hidden, *self.channels)

    def __call__(self, shape: Shape, classes: int) -> nn.Module:
        layers = _convs(shape, self.channels, padding=(0, 0), norm=True)
        return _network("conv2_mnist", shape, classes, layers, (self.hidden,))


@dataclass(frozen=True)
class lenet5:
    """LeNet-5's sizes (LeCun et al. 1998) with ReLU and max pool, *ours*; `padding` 2 is for 28x28, 0 for 32x32."""

    channels: tuple[int, int] = (6, 16)
    hidden: tuple[int, ...] = (120, 84)
    padding: int = 2

    def __post_init__(self) -> None:
        _positive("lenet5", "channels and hidden", *self.channels, *self.hidden)
        if self.padding < 0:
            raise ValueError(f"model lenet5: padding must be 0 or more, got {self.padding}")

    def __call__(self, shape: Shape, classes: int) -> nn.Module:
        return _network("lenet5", shape, classes, _convs(shape, self.channels, (self.padding, 0)), self.hidden)


@dataclass(frozen=True)
class vgg11:
    """VGG11 without BatchNorm, as published (PR-FL, CIFAR-10): eight 3x3 convolutions, two hidden layers of 512.

    Pools round up, so that inputs below 32x32 pass; at 32x32 that changes nothing. `width` scales all layers.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        _positive("vgg11", "width", self.width)

    def __call__(self, shape: Shape, classes: int) -> nn.Module:
        layers: Layers = []
        inputs = shape[0]
        for i, (size, pool) in enumerate(_VGG11, 1):
            outputs = max(1, round(size * self.width))
            layers += [(f"conv{i}", nn.Conv2d(inputs, outputs, 3, padding=1)), (f"relu{i}", nn.ReLU())]
            layers += [(f"pool{i}", nn.MaxPool2d(2, ceil_mode=True))] if pool else []
            inputs = outputs
        model = _network("vgg11", shape, classes, layers, (inputs, inputs))
        *hidden, last = _linears(model)
        for layer in hidden:
            nn.init.kaiming_uniform_(layer.weight, a=0)
        nn.init.kaiming_uniform_(last.weight, a=1.5, mode="fan_out")
        return model


_VGG11 = ((64, True), (128, True), (256, False), (256, True), (512, False), (512, True), (512, False), (512, True))


def _convs(shape: Shape, channels: tuple[int, int], padding: tuple[int, int] = (2, 2), norm: bool = False) -> Layers:
    """5x5 convolutions, each followed by ReLU (or BatchNorm) and a pool that halves the size."""
    layers: Layers = []
    for i, (a, b, pad) in enumerate(zip((shape[0], channels[0]), channels, padding, strict=True), 1):
        middle: tuple[str, nn.Module] = (f"bn{i}", nn.BatchNorm2d(b)) if norm else (f"relu{i}", nn.ReLU())
        layers += [(f"conv{i}", nn.Conv2d(a, b, 5, padding=pad)), middle, (f"pool{i}", nn.MaxPool2d(2))]
    return layers


def _network(name: str, shape: Shape, classes: int, features: Layers, hidden: tuple[int, ...]) -> nn.Module:
    """Features, then fully connected layers with ReLU between them."""
    sizes = (_flat(name, shape, features), *hidden, classes)
    layers = [*features, ("flatten", nn.Flatten())]
    for i, (a, b) in enumerate(pairwise(sizes), 1):
        layers.append((f"fc{i}", nn.Linear(a, b)))
        layers += [(f"fc{i}_relu", nn.ReLU())] if i <= len(hidden) else []
    return nn.Sequential(OrderedDict(layers))


def _flat(name: str, shape: Shape, features: Layers) -> int:
    """Values per sample that come out of the features."""
    x = torch.zeros(1, *shape)
    try:
        with torch.no_grad():
            for _, layer in features:
                x = x if isinstance(layer, nn.BatchNorm2d) else layer(x)
    except RuntimeError as error:
        raise ValueError(f"model {name}: an input of {'x'.join(map(str, shape))} is too small for it") from error
    return prod(x.shape)


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def _positive(model: str, what: str, *sizes: float) -> None:
    if not all(size > 0 for size in sizes):
        raise ValueError(f"model {model}: {what} must be above 0, got {', '.join(map(str, sizes))}")


TABLE: dict[str, Callable[..., Model]] = {
    part.__name__: part for part in (mlp, conv2, two_cnn, conv2_mnist, lenet5, vgg11, resnet18)
}
