"""Masks as few bytes: sets of positions, whole masks on top of them, and the layout both sides of a message know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from math import floor, log, log1p, log2, prod
from struct import Struct, calcsize, unpack_from

import numpy as np
import torch
from numpy.typing import NDArray

from prfl.masks import Mask, positions
from prfl.types import Group, Tree

ABSENT, ALL, PREFIX, BITMAP, GAPS, HOLES = range(6)  # the forms of a set
BITS, CHANNELS, NAMED = 1, 2, 255  # the kinds of a mask
_PREFIX = Struct("<BI")  # mode, members
_GAPS = Struct("<BIBI")  # mode, members, remainder bits, bits of the unary stream
_FEW = (3 - 5**0.5) / 2  # above this share Rice codes of a random set are longer than a bitmap


class Refused(ValueError):
    """A message that is not let in; the text says why in one line."""


@dataclass(frozen=True, eq=False)
class Layout:
    """What both sides of a message know and hence no message says: shapes by entry name, channel groups.

    Make it once a model with `Layout.of`: it orders both, so that the order of a tree does not matter.
    """

    shapes: Mapping[str, tuple[int, ...]]
    groups: tuple[Group, ...] = ()

    @classmethod
    def of(cls, model: Tree, groups: Sequence[Group] = ()) -> Layout:
        """The layout of any tree with the model's names and shapes; ValueError for an entry of 2^32 values or more."""
        shapes = {k: tuple(model[k].shape) for k in sorted(model)}
        for k, shape in shapes.items():
            if prod(shape) >= 2**32:
                raise ValueError(f"layout: {k} has {prod(shape)} values, an entry holds fewer than 2^32")
        return cls(shapes, tuple(sorted(groups, key=_places)))

    @cached_property
    def checksum(self) -> bytes:
        """8 bytes that tell models apart."""
        text = repr((sorted(self.shapes.items()), [(g.size, _places(g)) for g in self.groups]))
        return blake2b(text.encode(), digest_size=8).digest()

    def sizes(self, mask: Mask) -> list[int]:
        """Kept values by entry; not to be edited."""
        return mask.sizes(self.checksum, self.shapes)


@dataclass
class Reader:
    """Bytes taken from the front, never more than there are."""

    data: memoryview
    at: int = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise Refused(f"truncated: {size} bytes announced, {len(self.data) - self.at} left")
        self.at += size
        return self.data[self.at - size : self.at]

    def fields(self, form: str) -> tuple[int, ...]:
        return unpack_from(form, self.take(calcsize(form)))

    def bits(self, count: int) -> NDArray[np.uint8]:
        return np.unpackbits(np.frombuffer(self.take((count + 7) // 8), np.uint8), count=count)


def encode_set(flags: NDArray[np.bool_], at: NDArray[np.int64] | None = None) -> bytes:
    """A subset of range(len(flags)) in its shortest form: all, the first n, bitmap, or Rice-coded gaps.

    `at`: the members, where they are known.

    The gaps are those between the members or, when they are the majority, between the others. Quotients (unary) and
    remainders (bit planes) are separate streams, so both sides work on whole arrays. Rice's parameter is the best for
    a random set of this density (Kiely 2004, Selecting the Golomb parameter in Rice coding).
    """
    size, count = len(flags), int(np.count_nonzero(flags)) if at is None else len(at)
    if count == size:
        return bytes([ALL])
    shortest = 1 + (size + 7) // 8
    if shortest > _PREFIX.size and not flags[count:].any():
        return _PREFIX.pack(PREFIX, count)
    rare, few = (flags, count) if 2 * count <= size else (~flags, size - count)
    if 0 < few < _FEW * size:
        k = max(0, 1 + floor(log2(log((5**0.5 - 1) / 2) / log1p(-few / size))))
        gaps = (at if at is not None and rare is flags else positions(rare)).astype(np.uint32)
        gaps[1:] -= gaps[:-1] + 1
        rest = (gaps & (1 << k) - 1).astype(np.min_scalar_type(1 << k))
        gaps >>= k
        gaps += 1
        ones = np.cumsum(gaps, dtype=np.int64)
        ones -= 1
        length = int(ones[-1]) + 1
        if _GAPS.size + (length + 7) // 8 + k * ((few + 7) // 8) < shortest:
            unary = np.zeros(length, np.bool_)
            unary[ones] = True
            planes = [np.packbits(rest & (1 << j)).data for j in range(k)]
            head = _GAPS.pack(GAPS if rare is flags else HOLES, few, k, length)
            return b"".join((head, np.packbits(unary).data, *planes))
    return bytes([BITMAP]) + np.packbits(flags).tobytes()


def decode_set(reader: Reader, size: int) -> NDArray[np.bool_] | None:
    """The flags of `encode_set`, None for ABSENT; Refused unless they are a subset of range(size)."""
    return _set(reader, size)[0]


def _set(reader: Reader, size: int) -> tuple[NDArray[np.bool_] | None, NDArray[np.int64] | None]:
    """And the members, where decoding finds them."""
    (mode,) = reader.fields("<B")
    if mode == ABSENT:
        return None, None
    if mode == ALL:
        return np.ones(size, np.bool_), None
    if mode == BITMAP:
        return reader.bits(size).view(np.bool_), None
    flags = np.zeros(size, np.bool_)
    if mode == PREFIX:
        (count,) = reader.fields("<I")
        if count > size:
            raise Refused(f"mask: the first {count} of {size}")
        flags[:count] = True
        return flags, None
    if mode not in (GAPS, HOLES):
        raise Refused(f"mask: no mode {mode}")
    few, k, length = reader.fields("<IBI")
    if not 0 < few <= size // 2 or 1 << k > size or length > few + (size >> k):
        raise Refused(f"mask: {few} gaps of {k} and {length} bits in {size}")
    at = np.flatnonzero(reader.bits(length).view(np.bool_))
    if len(at) != few:
        raise Refused(f"mask: {len(at)} gaps, {few} announced")
    if k:  # as many quotients come before a one as zeros: the place it has less the ones before it
        rest = np.ones(few, np.min_scalar_type(1 << k))
        for j in range(k):
            rest += np.multiply(reader.bits(few), 1 << j, dtype=rest.dtype)
        at -= np.arange(few)
        at <<= k
        at += np.cumsum(rest, dtype=np.int64)
        at -= 1
    if at[-1] >= size:
        raise Refused(f"mask: position {at[-1]} of {size}")
    flags[at] = True
    return (flags, at) if mode == GAPS else (~flags, None)


def name_mask(mask: Mask) -> bytes:
    """In place of a mask that the reader holds: 9 bytes."""
    return bytes([NAMED]) + digest(mask)


def encode_mask(mask: Mask, layout: Layout, before: Mask | None = None) -> bytes:
    """One byte for a mask that leaves all whole, else a set by entry and a set by group.

    `before`: a mask nested in this one that the reader holds: only positions outside it are coded.
    ValueError for an entry, a shape or a group that the layout lacks.
    """
    parts = [bytes([BITS * bool(mask.bits) | CHANNELS * bool(mask.channels)])]
    if mask.bits:
        for k, bits in mask.bits.items():
            if layout.shapes.get(k) != tuple(bits.shape):
                raise ValueError(f"mask: no entry {k} of shape {tuple(bits.shape)} in the model")
        for k, shape in layout.shapes.items():
            at = mask.found(k)
            parts.append(_encode(_flags(mask, k), _where(before, k, shape), None if at is None else at.numpy()))
    if mask.channels:
        if alien := [g for g in mask.channels if g not in layout.groups]:
            raise ValueError(f"mask: no group {_places(alien[0])} in the model")
        parts += [_encode(_side(mask, g), _side(before, g)) for g in layout.groups]
    return b"".join(parts)


def decode_mask(reader: Reader, layout: Layout, before: Mask | None = None, held: Mask | None = None) -> Mask:
    """The mask of `encode_mask`, within the model by construction, or `held` when it is the one named; else Refused."""
    (kinds,) = reader.fields("<B")
    if kinds == NAMED:
        if held is None or reader.data[reader.at :] != digest(held):
            raise Refused("mask: the reader holds another one")
        return held
    if kinds > BITS | CHANNELS:
        raise Refused(f"mask: no kind {kinds}")
    bits, channels, found = {}, {}, {}
    for k, shape in layout.shapes.items() if kinds & BITS else ():
        flags, at = _decode(reader, prod(shape), _where(before, k, shape))
        if flags is not None:
            bits[k] = torch.from_numpy(flags).view(shape)
        if at is not None:
            found[k] = torch.from_numpy(at)
    for group in layout.groups if kinds & CHANNELS else ():
        flags, _ = _decode(reader, group.size, _side(before, group))
        if flags is not None:
            channels[group] = torch.from_numpy(positions(flags))
    if bool(bits) != bool(kinds & BITS) or bool(channels) != bool(kinds & CHANNELS):
        raise Refused("mask: a kind was announced that no entry has")
    if reader.at != len(reader.data):
        raise Refused(f"mask: {len(reader.data) - reader.at} bytes too many")
    mask = Mask(bits, channels)
    for k, places in found.items():
        mask.tell(k, places)
    return mask


def digest(mask: Mask) -> bytes:
    """8 bytes that tell masks apart, whatever the order in which they were built."""
    h = blake2b(digest_size=8)
    for k in sorted(mask.bits):
        h.update(f"{k}{tuple(mask.bits[k].shape)}".encode())
        h.update(np.packbits(mask.bits[k].reshape(-1).numpy()).data)
    for group in sorted(mask.channels, key=_places):
        h.update(f"{group.size}{_places(group)}".encode())
        h.update(mask.channels[group].numpy().data)
    return h.digest()


def _encode(
    flags: NDArray[np.bool_] | None, before: NDArray[np.bool_] | None, at: NDArray[np.int64] | None = None
) -> bytes:
    if flags is None or before is None:
        return bytes([ABSENT]) if flags is None else encode_set(flags, at)
    if (before & ~flags).any():
        raise ValueError("mask: the one before is not nested in it")
    return encode_set(flags[positions(~before)])


def _decode(
    reader: Reader, size: int, before: NDArray[np.bool_] | None
) -> tuple[NDArray[np.bool_] | None, NDArray[np.int64] | None]:
    if before is None:
        return _set(reader, size)
    free = positions(~before)
    new = decode_set(reader, len(free))
    if new is None:
        return None, None
    flags = before.copy()
    flags[free] = new
    return flags, None


def _flags(mask: Mask, entry: str) -> NDArray[np.bool_] | None:
    return mask.bits[entry].reshape(-1).numpy() if entry in mask.bits else None


def _where(mask: Mask | None, entry: str, shape: Sequence[int]) -> NDArray[np.bool_] | None:
    return None if mask is None else mask.where(entry, shape).reshape(-1).numpy()


def _side(mask: Mask | None, group: Group) -> NDArray[np.bool_] | None:
    if mask is None or group not in mask.channels:
        return None
    flags = np.zeros(group.size, np.bool_)
    flags[mask.channels[group].numpy()] = True
    return flags


def _places(group: Group) -> tuple[tuple[str, int, int, int], ...]:
    return tuple((m.entry, m.axis, m.offset, m.repeat) for m in group.members)
