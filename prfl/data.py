"""Data sets by name: the table, and the small sets that need no reader of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from prfl.archives import DataError, arrays, checked, dataset, labels, place
from prfl.leaf import femnist
from prfl.pictures import IMAGENET, celeba, tiny_imagenet
from prfl.samples import Dataset, Samples, split_validation, stratified
from prfl.vision import cifar10, cifar100, emnist, fashion_mnist, mnist, mnist_by_writer

__all__ = ["TABLE", "DataError", "Dataset", "Samples", "Source", "load", "split_validation"]


class Source(Protocol):
    """A row of the table, made: a set with its options.

    `folder/NAME` holds its files (or `folder`, in torchvision's own layout); `download` fetches what is missing.
    """

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset: ...


def load(
    name: str, options: Mapping[str, Any] | None = None, folder: Path | None = None, download: bool = False
) -> Dataset:
    """A data set of the table. ValueError: no such name or option, or (DataError) files missing or damaged."""
    if name not in TABLE:
        raise ValueError(f"data: no {name!r}; have {', '.join(sorted(TABLE))}")
    known = list(getattr(TABLE[name], "__dataclass_fields__", {}))
    if unknown := [option for option in options or {} if option not in known]:
        raise ValueError(f"data set {name}: no option {unknown[0]!r}; have {', '.join(known) or 'none'}")
    return TABLE[name](**(options or {})).load(folder, download)


@dataclass(frozen=True)
class digits:
    """scikit-learn's 1,797 handwritten digits, 8x8, values 0 to 16; needs no folder."""

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """1,438 + 359 samples: a fifth of every class is the test split (ours), always the same (seed 0)."""
        from sklearn.datasets import load_digits

        given = load_digits()
        x, y = torch.tensor(given.images, dtype=torch.uint8)[:, None], labels(given.target)
        every = Samples(x, y, (4.884,), (6.017,))
        train, test = stratified(y, 0.2, seed=0)
        return Dataset("digits", every.subset(train), every.subset(test), 10)


@dataclass(frozen=True)
class synthetic:
    """Gaussian classes (ours): standard normal centres, samples around them with deviation `spread`; no folder."""

    classes: int = 10
    shape: tuple[int, int, int] = (1, 8, 8)
    samples: int = 2000
    test: int = 500
    spread: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2 or min(self.samples, self.test) < self.classes:
            raise ValueError("synthetic: classes must be 2 or more, samples and test no fewer than classes")
        if min(self.shape) < 1 or self.spread < 0 or self.seed < 0:
            raise ValueError("synthetic: sides of the shape must be positive, spread and seed not negative")

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """`samples` + `test` float32 samples, as many of each class."""
        rng = np.random.default_rng(self.seed)
        y = np.concatenate([rng.permutation(n) % self.classes for n in (self.samples, self.test)])
        centres = rng.standard_normal((self.classes, *self.shape), dtype=np.float32)
        x = centres[y] + np.float32(self.spread) * rng.standard_normal((len(y), *self.shape), dtype=np.float32)
        every = Samples(torch.from_numpy(x), labels(y), (0.0,), ((1 + self.spread**2) ** 0.5,))
        train, test = torch.arange(self.samples), torch.arange(self.samples, len(y))
        return Dataset("synthetic", every.subset(train), every.subset(test), self.classes)


@dataclass(frozen=True)
class tiny_imagenet32:
    """Twenty classes of Tiny-ImageNet, 200 + 50 photographs each, 3x32x32, in one file."""

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `tiny_imagenet32_20c.npz`: `train_images`, `val_images` uint8 (N, 32, 32, 3), `*_labels`, `wnids`."""
        name, file = "tiny_imagenet32", "tiny_imagenet32_20c.npz"
        path = place(name, folder, [file], None) / file
        x, y, x_test, y_test = arrays(name, path, ["train_images", "train_labels", "val_images", "val_labels"])
        classes = len(arrays(name, path, ["wnids"])[0])
        train, test = (
            checked(name, torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(), labels(b), classes)
            for a, b in ((x, y), (x_test, y_test))
        )
        return dataset(name, (train, test), classes, IMAGENET)


@dataclass(frozen=True)
class fsdd:
    """Free Spoken Digit Dataset as log-mel pictures, 1x40x64: 10 digits by 6 speakers; takes 0 to 4 are the test."""

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `fsdd_logmel.npz`: `features` uint8 (N, 40, 64), `labels`, `speaker_ids`, `take`."""
        path = place("fsdd", folder, ["fsdd_logmel.npz"], None) / "fsdd_logmel.npz"
        x, y, speakers, take = arrays("fsdd", path, ["features", "labels", "speaker_ids", "take"])
        if not len(x) == len(y) == len(speakers) == len(take):
            raise DataError(f"data set fsdd: the arrays of {path} are not of one length; fetch it anew")
        train, test = (
            checked("fsdd", torch.from_numpy(x[at])[:, None], labels(y[at]), 10) for at in (take > 4, take < 5)
        )
        return dataset("fsdd", (train, test), 10, ((0.222,), (0.301,)), labels(speakers[take > 4]))


TABLE: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "synthetic": synthetic,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "emnist": emnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist_by_writer": mnist_by_writer,
    "femnist": femnist,
    "tiny_imagenet": tiny_imagenet,
    "tiny_imagenet32": tiny_imagenet32,
    "celeba": celeba,
    "fsdd": fsdd,
}
