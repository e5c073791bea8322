"""Labelled samples in memory: raw and small, normalised a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """`x`: uint8 or float32 (N, C, H, W), raw. `y`: int64 (N,). `mean`, `std`: one a channel, in the units of `x`."""

    x: Tensor
    y: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.x.dim() != 4 or self.y.shape != self.x.shape[:1]:
            x, y = tuple(self.x.shape), tuple(self.y.shape)
            raise ValueError(f"samples: x must be (N, C, H, W) and y (N,), got {x} and {y}")

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `index` (int64) as (x - mean) / std, float32, and their labels."""
        mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (self.mean, self.std))
        rows = self.subset(index.flatten())
        x = rows.x.float().sub_(mean).div_(std)
        return x.view(*index.shape, *x.shape[1:]), rows.y.view(index.shape)

    def subset(self, index: Tensor) -> Samples:
        """The samples at `index` (int64), in its order."""
        x, y = (v.index_select(0, index) for v in (self.x, self.y))  # copies whole rows; indexing goes value by value
        return Samples(x, y, self.mean, self.std)


@dataclass(frozen=True, eq=False)
class Dataset:
    """`natural[i]`: who made training sample i (a writer, a speaker), int64; None where nobody knows."""

    name: str
    train: Samples
    test: Samples
    classes: int
    natural: Tensor | None = None


def split_validation(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Samples]:
    """The data set without `share` of its training samples, and these; every class gives its share, within one."""
    if not 0 < share < 1:
        raise ValueError(f"validation: the share must be in (0, 1), got {share:g}")
    rest, held = stratified(dataset.train.y, share, seed)
    if not len(held) or not len(rest):
        raise ValueError(f"validation: a share of {share:g} of {len(dataset.train)} samples leaves one side empty")
    natural = None if dataset.natural is None else dataset.natural[rest]
    return replace(dataset, train=dataset.train.subset(rest), natural=natural), dataset.train.subset(held)


def stratified(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Ascending indices of the rest and of a random `share` of the samples, every class its share within one.

    Systematic sampling (ours): samples are shuffled, sorted by class, and taken at even steps.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    order = order[y[order].argsort(stable=True)]
    count = round(share * len(y))
    held = torch.zeros(len(y), dtype=torch.bool)
    held[order[((torch.arange(count, dtype=torch.float64) + 0.5) * len(y) / max(1, count)).long()]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def batches(order: Tensor, size: int, whole: bool) -> list[Tensor]:
    """An order of samples in batches of `size`. whole: a last batch of one joins the one before it, for BatchNorm."""
    parts = list(torch.split(order, size))
    if whole and len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
