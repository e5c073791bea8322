"""Which part of a model a client holds: everything that moves or averages values is written against `Mask`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING
from weakref import ReferenceType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prfl.types import Group, Tree

if TYPE_CHECKING:
    from prfl.cut import Ranking


@dataclass(frozen=True, eq=False)
class Mask:
    """The kept part of a model: single weights (`bits`), channels of coupled groups (`channels`), the rest whole.

    `bits[entry]`: bool in the entry's shape. `channels[group]`: ascending kept channel indices, int64; groups that lie
    side by side on one axis (a concatenation) are named together. An entry with bits is moved by its bits, even where a
    group runs through it. Kept values are always taken in row-major order of the full entry.
    """

    bits: Tree = field(default_factory=dict)
    channels: Mapping[Group, Tensor] = field(default_factory=dict)
    origin: ReferenceType[Ranking] | None = field(default=None, repr=False)
    _positions: dict[tuple[str, tuple[int, ...]], Tensor] = field(default_factory=dict, init=False, repr=False)
    _sizes: dict[bytes, list[int]] = field(default_factory=dict, init=False, repr=False)

    @property
    def ranking(self) -> Ranking | None:
        """What the mask was cut from, if anything: all masks of one ranking are nested. Masks do not keep it alive."""
        return self.origin() if self.origin else None

    @cached_property
    def dense(self) -> bool:
        """Whether the mask leaves the whole model alone; entries of bits are cut, as far as it can tell."""
        return not self.bits and all(len(kept) == group.size for group, kept in self.channels.items())

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
        if entry not in self.bits:
            return prod(self.shape(entry, shape))
        found = self._positions.get((entry, tuple(shape)))
        return len(found) if found is not None else int(np.count_nonzero(self.bits[entry]))

    def sizes(self, model: bytes, shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
        """Kept values by entry, in the order of `shapes`; counted once for every `model`, which names them."""
        if model not in self._sizes:
            self._sizes[model] = [self.count(k, shape) for k, shape in shapes.items()]
        return self._sizes[model]

    def where(self, entry: str, shape: Sequence[int]) -> Tensor:
        """The entry's mask as booleans in its full shape; not to be edited."""
        if entry in self.bits:
            return self.bits[entry]
        if self.whole(entry):
            return torch.ones(tuple(shape), dtype=torch.bool)
        out = torch.zeros(tuple(shape), dtype=torch.bool)
        out.view(-1).index_fill_(0, self._at(entry, shape), True)
        return out

    def slice(self, entry: str, tensor: Tensor) -> Tensor:
        """The entry cut to its kept channels, as in the physically small model; its bits are left aside."""
        for axis, at in self.sides(entry).items():
            tensor = tensor.index_select(axis, at)
        return tensor

    def gather(self, entry: str, tensor: Tensor) -> Tensor:
        """Kept values of a full tensor, 1-D; a view of it where the mask leaves the entry alone."""
        flat = tensor.reshape(-1)
        return flat if self.whole(entry) else flat.index_select(0, self._at(entry, tensor.shape))

    def scatter(self, entry: str, values: Tensor, into: Tensor) -> Tensor:
        """A copy of `into` with the kept places set to `values`."""
        return values.reshape(into.shape).clone() if self.whole(entry) else self.put(entry, values, into.clone())

    def put(self, entry: str, values: Tensor, into: Tensor) -> Tensor:
        """`into[kept] = values`, in place where `into` is contiguous; it is not to be used any more."""
        flat = into.reshape(-1)
        return flat.scatter_(0, self._at(entry, into.shape), values.reshape(-1)).view(into.shape)

    def add_into(self, entry: str, total: Tensor, values: Tensor, scale: float) -> None:
        """`total[kept] += scale * values`, in place (`total` is contiguous): the one accumulator of every merge."""
        if self.whole(entry):
            total.add_(values.reshape(total.shape), alpha=scale)
        else:
            total.view(-1).index_add_(0, self._at(entry, total.shape), values.reshape(-1), alpha=scale)

    def count_into(self, entry: str, total: Tensor, scale: float) -> None:
        """`total[kept] += scale`, in place."""
        if self.whole(entry):
            total.add_(scale)
        else:
            at = self._at(entry, total.shape)
            total.view(-1).index_add_(0, at, total.new_ones(()).expand(len(at)), alpha=scale)

    def density(self, params: Tree) -> float:
        """Kept share of the prunable weights (entries with two axes or more); 1 where there are none."""
        sizes = {k: v.numel() for k, v in params.items() if prunable(v)}
        return sum(self.count(k, params[k].shape) for k in sizes) / sum(sizes.values()) if any(sizes.values()) else 1.0

    def apply(self, params: Tree) -> Tree:
        """The full model with every weight outside the mask at zero."""
        return {
            k: v if self.whole(k) else self.scatter(k, self.gather(k, v), torch.zeros_like(v))
            for k, v in params.items()
        }

    def found(self, entry: str) -> Tensor | None:
        """Flat positions of an entry's bits, if they are known."""
        return self._positions.get((entry, tuple(self.bits[entry].shape))) if entry in self.bits else None

    def tell(self, entry: str, at: Tensor) -> None:
        """The flat positions of an entry's bits, ascending, from whoever has them already."""
        self._positions[entry, tuple(self.bits[entry].shape)] = at

    def _at(self, entry: str, shape: Sequence[int]) -> Tensor:
        """Flat positions of the kept values, ascending; found once."""
        key = entry, tuple(shape)
        if key not in self._positions:
            if entry in self.bits:
                at = torch.from_numpy(positions(self.bits[entry].numpy()))
            else:
                at = torch.zeros((), dtype=torch.int64)
                for axis, size in enumerate(shape):
                    at = at[..., None] * size + self.sides(entry).get(axis, torch.arange(size))
            self._positions[key] = at.flatten()
        return self._positions[key]


DENSE = Mask()


def prunable(tensor: Tensor) -> bool:
    """Weights of convolutions and linear layers; biases, norms and their statistics are never cut by weight."""
    return tensor.dim() > 1


def positions(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Flat indices of what is set, ascending: `np.flatnonzero`, which is slow below one in ten and so sees fewer zeros.

    Of eight flags that are one byte when packed, at least one is set in every byte that is looked into.
    """
    if 10 * np.count_nonzero(flags) > flags.size:
        return np.flatnonzero(flags)
    packed = np.packbits(flags)
    filled = np.flatnonzero(packed.astype(np.bool_))
    inside = np.flatnonzero(np.unpackbits(packed[filled]).view(np.bool_))
    at: NDArray[np.int64] = filled[inside >> 3] * 8 + (inside & 7)
    return at


def nested(small: Mask, big: Mask, params: Tree) -> bool:
    """Whether `big` holds all that `small` holds."""
    cut = {k: v.shape for k, v in params.items() if not big.whole(k)}
    return all(bool((small.where(k, shape) <= big.where(k, shape)).all()) for k, shape in cut.items())


def coverage(masks: Sequence[Mask], params: Tree) -> Tree:
    """How many of the masks hold each weight, int32 in the entry's shape."""
    out = {k: torch.zeros(v.shape, dtype=torch.int32) for k, v in params.items()}
    for mask in masks:
        for k, total in out.items():
            mask.count_into(k, total, 1)
    return out


def covered(masks: Sequence[Mask], params: Tree) -> float:
    """Share of the prunable weights that at least one of the masks holds."""
    apart = {id(mask): mask for mask in masks}.values()  # many clients may share one
    densest = max((mask.density(params) for mask in apart), default=0.0)
    nested = len({id(mask.ranking) for mask in apart}) == 1 and all(mask.ranking is not None for mask in apart)
    return densest if nested or densest in (0.0, 1.0) else union(list(apart), params).density(params)


def covering(masks: Sequence[Mask], params: Tree) -> int:
    """How many of the masks hold the weight that the fewest hold: the minimum covering index (arXiv 2201.11803).

    Counted over all entries, and whole masks first: of nested masks only these hold the weight that goes first. Of
    others, entry by entry, until one has a weight that no further mask holds.
    """
    apart = [mask for mask in masks if not mask.dense]
    if not apart or (apart[0].origin and all(mask.origin is apart[0].origin for mask in apart)):
        return len(masks) - len(apart)
    least, times = len(masks), Counter(map(id, apart))
    distinct = {id(mask): mask for mask in apart}
    for k in sorted(params, key=lambda k: params[k].numel()):
        cut = {i: mask for i, mask in distinct.items() if not mask.whole(k)}
        whole = len(masks) - sum(times[i] for i in cut)
        if whole < least and params[k].numel():
            held = torch.zeros(params[k].shape, dtype=torch.int32)
            for i, mask in cut.items():
                mask.count_into(k, held, times[i])
            least = min(least, whole + int(held.min()))
        if least == len(masks) - len(apart):
            break
    return least


def distance(a: Mask, b: Mask, params: Tree) -> float:
    """Normalised Hamming distance over the prunable weights, in [0, 1]."""
    shapes = {k: v.shape for k, v in params.items() if prunable(v)}
    cut = {k: shape for k, shape in shapes.items() if not (a.whole(k) and b.whole(k))}
    differ = sum(int((a.where(k, shape) ^ b.where(k, shape)).count_nonzero()) for k, shape in cut.items())
    return differ / max(1, sum(prod(shape) for shape in shapes.values()))


def union(masks: Sequence[Mask], params: Tree) -> Mask:
    """What at least one of the masks holds, as a mask of single weights; nothing at all if there is no mask."""
    cut = {k: v for k, v in params.items() if not any(m.whole(k) for m in masks)}
    return Mask({k: n > 0 for k, n in coverage(masks, cut).items()})
