"""Which part of a model a client holds: everything that moves or averages values is written against `Mask`."""

from __future__ import annotations

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
        return {  # ascending axes: whole rows are cut first, which is cheap
            entry: {
                axis: torch.cat([at for _, at in sorted(parts, key=lambda p: p[0])])
                for axis, parts in sorted(axes.items())
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

    def places(self, params: Tree) -> Tensor | None:
        """Where kept values lie in the whole model flattened, entries by name, int32, found once; None: it is whole."""
        if all(self.whole(k) for k in params):
            return None
        names = sorted(params)
        sizes = [params[k].numel() for k in names]
        key = "", tuple(sizes)
        if key not in self._positions:
            parts = torch.split(torch.arange(sum(sizes), dtype=torch.int32), sizes)
            kept = [self.gather(k, part.view(params[k].shape)) for k, part in zip(names, parts, strict=True)]
            self._positions[key] = torch.cat(kept)
        return self._positions[key]

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
