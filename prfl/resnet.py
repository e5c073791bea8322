"""ResNet-18 as a plain module that can be shrunk."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from prfl.checks import positive


@dataclass(frozen=True)
class resnet18:
    """ResNet-18 (He et al. 2016) with torchvision's entry names; convolutions start Kaiming-normal over fan-out.

    stem: "imagenet", 7x7 stride 2 and max pool (as published, PR-FL), or "cifar", 3x3 stride 1 without pool.
    """

    stem: Literal["imagenet", "cifar"] = "imagenet"
    width: int = 64

    def __post_init__(self) -> None:
        positive("model resnet18", "width", self.width)
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"model resnet18: no stem {self.stem!r}; have imagenet, cifar")

    def __call__(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        w, large = self.width, self.stem == "imagenet"
        kernel, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        first = nn.Conv2d(shape[0], w, kernel, stride=stride, padding=padding, bias=False)
        layers: list[tuple[str, nn.Module]] = [("conv1", first), ("bn1", nn.BatchNorm2d(w)), ("relu", nn.ReLU())]
        layers += [("maxpool", nn.MaxPool2d(3, stride=2, padding=1))] if large else []
        for i, (a, b) in enumerate(pairwise((w, w, 2 * w, 4 * w, 8 * w)), 1):
            layers.append((f"layer{i}", nn.Sequential(_Block(a, b, stride=1 if i == 1 else 2), _Block(b, b, stride=1))))
        layers += [("avgpool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(8 * w, classes))]
        model = nn.Sequential(OrderedDict(layers))
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return model


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.relu1(self.bn1(self.conv1(x)))
        out: Tensor = self.relu2(self.bn2(self.conv2(inner)) + self.downsample(x))
        return out
