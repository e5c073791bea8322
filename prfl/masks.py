"""Which part of a model a client holds: everything that moves or averages values is written against `Mask`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from prfl.types import Group, Tree

if TYPE_CHECKING:
    from prfl.cut import Ranking


@dataclass(frozen=True, eq=False)
class Mask:
    """The kept part of a model: single weights (`bits`), channels of coupled groups (`channels`), the rest whole.

    `bits[entry]`: bool in the entry's shape. `channels[group]`: ascending kept channel indices, int64.
    An entry with bits is moved by its bits, even where a group runs through it. `ranking`: what the mask was cut from,
    if anything; all masks of one ranking are nested.
    """

    bits: Tree = field(default_factory=dict)
    channels: Mapping[Group, Tensor] = field(default_factory=dict)
    ranking: Ranking | None = field(default=None, repr=False)

    @cached_property
    def _flat(self) -> dict[str, Tensor]:
        return {k: torch.from_numpy(np.flatnonzero(bits.numpy())) for k, bits in self.bits.items()}

    @cached_property
    def _sides(self) -> dict[str, dict[int, Tensor]]:
        sides: dict[str, dict[int, list[tuple[int, Tensor]]]] = {}
        for group, kept in self.channels.items():
            for m in group.members:
                at = (kept[:, None] * m.repeat + torch.arange(m.repeat)).flatten() + m.offset
                sides.setdefault(m.entry, {}).setdefault(m.axis, []).append((m.offset, at))
        return {
            entry: {
                axis: torch.cat([at for _, at in sorted(parts, key=lambda p: p[0])]) for axis, parts in axes.items()
            }
            for entry, axes in sides.items()
        }

    def sides(self, entry: str) -> Mapping[int, Tensor]:
        """Kept indices per cut axis of an entry; axes not named are whole."""
        return self._sides.get(entry, {})

    def whole(self, entry: str) -> bool:
        """Whether the mask leaves the entry alone."""
        return entry not in self.bits and entry not in self._sides

    def shape(self, entry: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The entry's shape in the physically small model."""
        sides = self.sides(entry)
        return tuple(len(sides[axis]) if axis in sides else size for axis, size in enumerate(shape))

    def count(self, entry: str, shape: Sequence[int]) -> int:
        """Kept values of an entry of this shape."""
        return len(self._flat[entry]) if entry in self.bits else prod(self.shape(entry, shape))

    def where(self, entry: str, shape: Sequence[int]) -> Tensor:
        """The entry's mask as booleans in its full shape."""
        if entry in self.bits:
            return self.bits[entry]
        out = torch.zeros(tuple(shape), dtype=torch.bool)
        out[self._grid(entry, shape)] = True
        return out

    def slice(self, entry: str, tensor: Tensor) -> Tensor:
        """The entry cut to its kept channels, as in the physically small model."""
        for axis, at in self.sides(entry).items():
            tensor = tensor.index_select(axis, at)
        return tensor

    def gather(self, entry: str, tensor: Tensor) -> Tensor:
        """Kept values of a full tensor, 1-D in row-major order."""
        if entry in self.bits:
            return tensor.reshape(-1).index_select(0, self._flat[entry])
        return self.slice(entry, tensor).reshape(-1)

    def scatter(self, entry: str, values: Tensor, into: Tensor) -> Tensor:
        """A copy of `into` with the kept places set to `values`."""
        if self.whole(entry):
            return values.reshape(into.shape).clone()
        out = into.clone()
        if entry in self.bits:
            out.view(-1).index_copy_(0, self._flat[entry], values)
        else:
            out[self._grid(entry, into.shape)] = values.reshape(self.shape(entry, into.shape))
        return out

    def add_into(self, entry: str, total: Tensor, values: Tensor, scale: float) -> None:
        """`total[kept] += scale * values`, in place: the one accumulator of every merge."""
        if self.whole(entry):
            total.add_(values.reshape(total.shape), alpha=scale)
        elif entry in self.bits:
            total.view(-1).index_add_(0, self._flat[entry], values, alpha=scale)
        else:
            total[self._grid(entry, total.shape)] += scale * values.reshape(self.shape(entry, total.shape))

    def count_into(self, entry: str, total: Tensor, scale: float) -> None:
        """`total[kept] += scale`, in place."""
        if self.whole(entry):
            total.add_(scale)
        elif entry in self.bits:
            total.add_(self.bits[entry], alpha=scale)
        else:
            total[self._grid(entry, total.shape)] += scale

    def density(self, params: Tree) -> float:
        """Kept share of the prunable weights (entries with two axes or more)."""
        names = [k for k, v in params.items() if prunable(v)]
        return sum(self.count(k, params[k].shape) for k in names) / max(1, sum(params[k].numel() for k in names))

    def apply(self, params: Tree) -> Tree:
        """The full model with every weight outside the mask at zero."""
        return {k: v if self.whole(k) else v * self.where(k, v.shape) for k, v in params.items()}

    def _grid(self, entry: str, shape: Sequence[int]) -> tuple[Tensor, ...]:
        sides, dims = self.sides(entry), len(shape)
        return tuple(
            (sides[axis] if axis in sides else torch.arange(size)).view([-1 if a == axis else 1 for a in range(dims)])
            for axis, size in enumerate(shape)
        )


DENSE = Mask()


def prunable(tensor: Tensor) -> bool:
    """Weights of convolutions and linear layers; biases, norms and their statistics are never cut by weight."""
    return tensor.dim() > 1


def nested(small: Mask, big: Mask, params: Tree) -> bool:
    """Whether `big` holds all that `small` holds."""
    return all(
        bool((big.where(k, v.shape) | ~small.where(k, v.shape)).all()) for k, v in params.items() if not big.whole(k)
    )


def coverage(masks: Sequence[Mask], params: Tree) -> Tree:
    """How many of the masks hold each weight, int32 in the entry's shape."""
    out = {k: torch.zeros(v.shape, dtype=torch.int32) for k, v in params.items()}
    for mask in masks:
        for k, total in out.items():
            total += mask.where(k, total.shape)
    return out


def distance(a: Mask, b: Mask, params: Tree) -> float:
    """Normalised Hamming distance over the prunable weights, in [0, 1]."""
    names = [k for k, v in params.items() if prunable(v)]
    differ = sum(int((a.where(k, params[k].shape) ^ b.where(k, params[k].shape)).sum()) for k in names)
    return differ / max(1, sum(params[k].numel() for k in names))


def union(masks: Sequence[Mask], params: Tree) -> Mask:
    """What at least one of the masks holds, as a mask of single weights."""
    return Mask({k: n > 0 for k, n in coverage(masks, params).items() if not all(m.whole(k) for m in masks)})
