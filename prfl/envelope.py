"""The envelope of every message: head, sections, checksum, and the rows of values in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from math import frexp, inf
from struct import Struct
from typing import Literal, get_args
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from prfl.bitstream import Layout, Reader, Refused
from prfl.types import Tree

Values = Literal["float32", "float16", "int8"]
Part = bytes | memoryview | Tensor  # a tensor stands for its values as they lie in memory
KINDS = ("a task", "an update", "an increment")
TASK, UPDATE, INCREMENT = range(3)

_MAGIC, _FORMAT = b"prfl", 1
_HEAD = Struct("<4sBBxx8s")  # magic, format, kind, the layout's checksum; the lengths of the sections follow
_CRC = Struct("<I")
_TYPES = (torch.float32, torch.float16, torch.int8)  # in the order of Values
BLOCK = 2**15  # values that are rounded at a time, so that they stay in the cache; a multiple of 4
_LARGEST = torch.finfo(torch.float32).max


def seal(kind: int, layout: Layout, *sections: Sequence[Part]) -> bytes:
    """Head, lengths, sections, CRC-32: every part is copied once. All numbers are little-endian."""
    sizes = Struct(f"<{len(sections)}Q").pack(*map(_size, sections))
    head = [_HEAD.pack(_MAGIC, _FORMAT, kind, layout.checksum), sizes]
    parts = head + [raw(p) for p in chain.from_iterable(sections)]
    check = 0
    for part in parts:
        check = crc32(part, check)
    return b"".join((*parts, _CRC.pack(check)))


def sealed(*sections: Sequence[Part]) -> int:
    """The length of what `seal` makes of these sections."""
    return _HEAD.size + 8 * len(sections) + sum(map(_size, sections)) + _CRC.size


def raw(part: Part) -> memoryview:
    """Its bytes, not copied."""
    return part.numpy().data if isinstance(part, Tensor) else memoryview(part)


def _size(section: Sequence[Part]) -> int:
    """Bytes."""
    return sum(len(p) if isinstance(p, bytes) else p.nbytes for p in section)


def unseal(data: bytes, kind: int, layout: Layout, sections: int) -> list[Reader]:
    """The sections of a message of this kind and model, not copied; Refused for anything else."""
    view, lengths = memoryview(data), Struct(f"<{sections}Q")
    start, end = _HEAD.size + lengths.size, len(view) - _CRC.size
    if end < start:
        raise Refused(f"truncated: {len(view)} bytes")
    magic, version, sort, model = _HEAD.unpack_from(view)
    if magic != _MAGIC:
        raise Refused("not a message of prfl")
    if version != _FORMAT:
        raise Refused(f"format {version}, this side speaks {_FORMAT}")
    if sort != kind:
        raise Refused(f"{KINDS[kind]} was expected, not {KINDS[sort] if sort < len(KINDS) else sort}")
    sizes = lengths.unpack_from(view, _HEAD.size)
    if over := end - start - sum(sizes):
        raise Refused(f"truncated: {-over} bytes are missing" if over < 0 else f"{over} bytes too many")
    if crc32(view[:end]) != _CRC.unpack_from(view, end)[0]:
        raise Refused("checksum")
    if model != layout.checksum:
        raise Refused("another model")
    body = Reader(view, start)
    return [Reader(body.take(size)) for size in sizes]


def seal_values(values: Values, tensors: Iterable[Tensor], seed: Sequence[int]) -> list[Part]:
    """1-D float32 tensors as their type, a float32 scale by tensor unless exact, and their codes in one row."""
    code = bytes([get_args(Values).index(values)])
    if values == "float32":
        return [code, *tensors]
    if values == "float16":
        pairs = [_halve(t) for t in tensors]
    else:
        rng = np.random.default_rng(seed)
        pairs = [_quantise(t, rng) for t in tensors]
    return [code, np.array([s for s, _ in pairs], np.float32).data, *(c for _, c in pairs)]


def open_values(
    section: Reader, names: Sequence[str], sizes: Sequence[int], what: str = "", limit: float = _LARGEST
) -> dict[str, Tensor]:
    """1-D float32 by name; Refused when the length is not that of `sizes`, or a value is not finite or past `limit`."""
    out, flat = _read(section, names, sizes)
    if not flat.dot(flat).item() <= limit * limit:
        look(out, what, limit)
    return out


def look(tree: Tree, what: str, limit: float) -> None:
    """Refused for a 1-D value that is not finite or past `limit`."""
    for k, values in tree.items():
        if values.dot(values).item() <= limit * limit:  # much faster than to look at each; it fails for NaN and Inf
            continue
        top = _largest(values.nan_to_num(inf, inf, -inf))
        if top > limit:
            word = "NaN" if bool(values.isnan().any()) else "Inf"
            raise Refused(f"{word} in {what}{k}" if top == inf else f"{top:g} in {what}{k}, more than {limit:g}")


def _halve(values: Tensor) -> tuple[float, Tensor]:
    scale = 2.0 ** max(frexp(_largest(values))[1] - 15, -126)
    return scale, (values / scale).half()


def _quantise(values: Tensor, rng: np.random.Generator) -> tuple[float, Tensor]:
    scale = float(np.float32(_largest(values) / 127))
    if not 2.0**-126 <= scale < float("inf"):  # too small to divide by; or NaN or Inf, which the scale alone tells
        return 0.0 if scale < 1 else scale, torch.zeros(len(values), dtype=torch.int8)
    codes = torch.empty(len(values), dtype=torch.int8)
    for some, code in zip(torch.split(values, BLOCK), torch.split(codes, BLOCK), strict=True):
        draws = np.asarray(rng.bit_generator.random_raw((len(some) + 3) // 4)).view(np.uint16)[: len(some)]
        noise = torch.from_numpy(draws.astype(np.float32)).add_(0.5).mul_(2.0**-16)
        code.copy_(noise.add_(some / scale).floor_().clamp_(-127, 127))
    return scale, codes


def _largest(values: Tensor) -> float:
    if not len(values):
        return 0.0
    low, high = values.aminmax()
    return max(-low.item(), high.item())


def _read(section: Reader, names: Sequence[str], sizes: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    (code,) = section.fields("<B")
    if code >= len(_TYPES):
        raise Refused(f"values: no type {code}")
    total, dtype, scaled = sum(sizes), _TYPES[code], 4 * len(sizes) if code else 0
    length = total * dtype.itemsize + scaled
    if len(section.data) - section.at != length:
        raise Refused(f"values: {len(section.data) - section.at} bytes instead of {length}")
    scales = np.frombuffer(section.take(scaled), "<f4").tolist()
    flat = torch.empty(total, dtype=dtype)
    flat.numpy().view(np.uint8)[:] = np.frombuffer(section.take(total * dtype.itemsize), np.uint8)
    flat = flat.float()
    out = dict(zip(names, torch.split(flat, list(sizes)), strict=True))
    for k, scale in zip(names, scales, strict=False):
        out[k].mul_(scale)
    return out, flat
