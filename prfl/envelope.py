"""The envelope of every message: head, sections, checksum, and the rows of values in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from math import frexp, inf
from struct import Struct
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64

from prfl.bitstream import Layout, Reader, Refused
from prfl.types import Tree

Values = Literal["float32", "float16", "int8"]
Part = bytes | memoryview | Tensor  # a tensor stands for its values as they lie in memory
KINDS = ("a task", "an update", "an increment")
TASK, UPDATE, INCREMENT = range(3)

_MAGIC, _FORMAT = b"prfl", 2
_HEAD = Struct("<4sBBxx8s")  # magic, format, kind, the layout's checksum; the lengths of the sections follow
_CHECK = 4  # bytes of checksum
_TYPES = (torch.float32, torch.float16, torch.int8)  # in the order of Values
BLOCK = 2**16  # values that are rounded at a time, so that they stay in the cache; a multiple of 4
_STEPS = 127 - 2**-10  # int8 codes to the entry's largest value: whatever is drawn, it stays below 128
_LARGEST = torch.finfo(torch.float32).max


def seal(kind: int, layout: Layout, *sections: Sequence[Part]) -> bytes:
    """Head, lengths, sections, checksum: every part is copied once. All numbers are little-endian."""
    sizes = Struct(f"<{len(sections)}Q").pack(*map(_size, sections))
    head = [_HEAD.pack(_MAGIC, _FORMAT, kind, layout.checksum), sizes]
    parts = head + [raw(p) for p in chain.from_iterable(sections)]
    return b"".join((*parts, checksum(*parts)))


def sealed(*sections: Sequence[Part]) -> int:
    """The length of what `seal` makes of these sections."""
    return _HEAD.size + 8 * len(sections) + sum(map(_size, sections)) + _CHECK


def checksum(*parts: bytes | memoryview) -> bytes:
    """The last bytes of XXH3-64 of all parts in a row: they tell accidents, not intent, at the speed of memory."""
    hashed = xxh3_64()
    for part in parts:
        hashed.update(part)
    return hashed.digest()[-_CHECK:]


def raw(part: Part) -> memoryview:
    """Its bytes, not copied."""
    return part.numpy().data if isinstance(part, Tensor) else memoryview(part)


def _size(section: Sequence[Part]) -> int:
    """Bytes."""
    return sum(len(p) if isinstance(p, bytes) else p.nbytes for p in section)


def unseal(data: bytes, kind: int, layout: Layout, sections: int) -> list[Reader]:
    """The sections of a message of this kind and model, not copied; Refused for anything else."""
    view, lengths = memoryview(data), Struct(f"<{sections}Q")
    start, end = _HEAD.size + lengths.size, len(view) - _CHECK
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
    if checksum(view[:end]) != view[end:]:
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
        rng, tensors = np.random.default_rng(seed), list(tensors)
        draws = _draws(rng, min(BLOCK, max(map(len, tensors), default=0)))
        pairs = [_quantise(t, draws, rng) for t in tensors]
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
    codes = torch.empty(len(values), dtype=torch.float16)
    for some, code in zip(torch.split(values, BLOCK), torch.split(codes, BLOCK), strict=True):
        code.copy_(some * (1 / scale))
    return scale, codes


def _draws(rng: np.random.Generator, count: int) -> NDArray[np.uint16]:
    return np.asarray(rng.bit_generator.random_raw((count + 3) // 4)).view(np.uint16)[:count]


def _quantise(values: Tensor, draws: NDArray[np.uint16], rng: np.random.Generator) -> tuple[float, Tensor]:
    """Every block has the draws xor a number of its own: any two of all are independent, at a third of the time."""
    scale = float(np.float32(_largest(values) / _STEPS))
    if not 2.0**-110 <= scale < inf:  # too small to divide by; or NaN or Inf, which the scale alone tells
        return 0.0 if scale < 1 else scale, torch.zeros(len(values), dtype=torch.int8)
    codes, fine = np.empty(len(values), np.int8), np.float32(2**16 / scale)
    blocks = range(0, len(values), BLOCK)
    steps = np.empty(min(BLOCK, len(values)), np.int32)  # of 2^-16 of a code
    for at, key in zip(blocks, _draws(rng, len(blocks)), strict=True):
        some = values[at : at + BLOCK].numpy()
        step = np.rint(some * fine, out=steps[: len(some)], casting="unsafe")
        step += draws[: len(some)] ^ key
        step >>= 16  # rounds down, below zero too
        codes[at : at + BLOCK] = step
    return scale, torch.from_numpy(codes)


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
