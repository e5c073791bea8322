"""PR-FL's residual split: masks of one ranking are nested, so a version goes out as increments that all can share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

import numpy as np
import torch
from torch import Tensor

from prfl.bitstream import Layout, Refused, decode_mask, digest, encode_mask, name_mask
from prfl.envelope import INCREMENT, Values, open_values, seal, seal_values, unseal
from prfl.masks import Mask
from prfl.overlap import nested
from prfl.types import Tree

_FIELDS = Struct("<QQ8s")  # version, rank, digest of the mask before
_NOTHING = bytes(8)


@dataclass(frozen=True)
class Increment:
    """What the sub-model of rank `rank` (from 1) holds beyond the one before it.

    `values[entry]`: 1-D, the new weights in row-major order. `before`: the mask of the rank before, None for rank 1.
    """

    version: int
    rank: int
    before: Mask | None
    mask: Mask
    values: Tree


def split(params: Tree, masks: Sequence[Mask], version: int = 0) -> list[Increment]:
    """One increment by mask (PR-FL, section "residual split": w_1, w_2 - w_1, ...); ValueError unless they are nested.

    Densest last. Entries that the first mask leaves whole, such as biases, travel in the first increment only.
    """
    out: list[Increment] = []
    for before, mask in zip([None, *masks], masks, strict=False):
        if before is not None and not nested(before, mask, params):
            raise ValueError(f"residual: mask {len(out) + 1} lacks weights of mask {len(out)}; give nested ones")
        values = {k: v.reshape(-1).index_select(0, _new(mask, before, k, v.shape)) for k, v in params.items()}
        out.append(Increment(version, len(out) + 1, before, mask, values))
    return out


def join(increments: Sequence[Increment], layout: Layout) -> tuple[Tree, Mask]:
    """The sub-model of the last increment, bit for bit: params in full shape, zero outside its mask, and that mask.

    ValueError unless these are the increments 1, 2, ... of one version.
    """
    have = [(i.version, i.rank) for i in increments]
    if not have or have != [(have[0][0], rank + 1) for rank in range(len(have))]:
        raise ValueError(f"residual: ranks 1, 2, ... of one version needed, got (version, rank) {have}")
    params = {k: torch.zeros(shape) for k, shape in layout.shapes.items()}
    for i in increments:
        for k, flat in params.items():
            flat.view(-1)[_new(i.mask, i.before, k, flat.shape)] = i.values[k]
    return params, increments[-1].mask


def encode(increment: Increment, layout: Layout, values: Values = "float32", *, known: bool = False) -> bytes:
    """One message, the same for every client. `known`: they hold the mask of this rank since an earlier version.

    All increments together weigh what the largest sub-model weighs, and besides for each: some 80 bytes, 8 bytes an
    entry, and at most one bit a weight that the ranks before lack. That is what it costs to tell the ranks apart.
    """
    fields = _FIELDS.pack(increment.version, increment.rank, _digest(increment.before))
    new = [increment.values[k].detach().contiguous() for k in layout.shapes]
    return seal(
        INCREMENT,
        layout,
        [fields],
        [name_mask(increment.mask) if known else encode_mask(increment.mask, layout, increment.before)],
        seal_values(values, new, (INCREMENT, increment.version, increment.rank)),
    )


def decode(data: bytes, layout: Layout, before: Mask | None = None, held: Mask | None = None) -> Increment:
    """The increment on top of the mask `before`; Refused when it builds on another one or is none.

    `held`: the mask of this rank that the client kept from an earlier version.
    """
    fields, mask_bytes, values = unseal(data, INCREMENT, layout, 3)
    if len(fields.data) != _FIELDS.size:
        raise Refused(f"fields of {len(fields.data)} bytes instead of {_FIELDS.size}")
    version, rank, base = _FIELDS.unpack(fields.data)
    if base != _digest(before):
        raise Refused(f"mask: increment {rank} builds on another one")
    mask = decode_mask(mask_bytes, layout, before, held)
    sizes = [len(_new(mask, before, k, shape)) for k, shape in layout.shapes.items()]
    if before is not None and sum(sizes) != sum(layout.sizes(mask)) - sum(layout.sizes(before)):
        raise Refused(f"mask: increment {rank} drops weights of the one before")
    return Increment(version, rank, before, mask, open_values(values, list(layout.shapes), sizes))


def _new(mask: Mask, before: Mask | None, entry: str, shape: Sequence[int]) -> Tensor:
    """Flat positions that `mask` holds and `before` does not."""
    flags = mask.where(entry, shape)
    if before is not None:
        flags = flags & ~before.where(entry, shape)
    return torch.from_numpy(np.flatnonzero(flags.numpy()))


def _digest(mask: Mask | None) -> bytes:
    return _NOTHING if mask is None else digest(mask)
