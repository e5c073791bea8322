"""The whole state of a run on disk: one safetensors file a version, the newest two kept, the newest whole one read.

Structure is JSON in the file's metadata (`prfl.nodes`), tensors lie beside it, and the last tensor is the checksum of
all bytes before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prfl import nodes
from prfl.config import Experiment
from prfl.types import State

FORMAT = "prfl state 1"
LARGEST = 100_000_000  # bytes that safetensors reads of a header
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Loaded(NamedTuple):
    """What a checkpoint held. `damaged`: names of newer files that were passed over."""

    state: State
    beside: dict[str, Any]
    damaged: tuple[str, ...]


def save(folder: Path, state: State, beside: Mapping[str, Any], trusted: Sequence[str] = ()) -> Path:
    """Write `folder/state/<version>.safetensors`, whole or not at all; of the others only the one before it stays.

    beside: the caller's own values. trusted: packages or modules of classes that are not this project's, see `own`.
    ValueError: a value that could not be restored. OSError: the disk. Neither leaves anything behind.
    """
    home = folder / "state"
    home.mkdir(parents=True, exist_ok=True)
    content = nodes.Writer(trusted)
    root = content.put({"state": state, "beside": dict(beside)})
    structure = json.dumps({"root": root, "nodes": content.nodes}, separators=(",", ":"), allow_nan=False)
    path = home / f"{state.version:08d}.safetensors"
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            _write(file, content.tensors, structure)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    for changed in (home, folder):
        _settle(changed)
    _tidy(home, state.version)
    return path


def load(folder: Path, trusted: Sequence[str] = ()) -> Loaded:
    """The newest whole checkpoint of a run folder. ValueError: there is none, or it holds a class nobody trusts."""
    damaged: list[str] = []
    for path in reversed(_files(folder / "state").values()):
        content = _read(path)
        if content is not None:
            root = nodes.restored(*content, trusted)
            return Loaded(root["state"], root["beside"], tuple(damaged))
        damaged.append(path.name)
    raise ValueError(f"checkpoint: none in {folder}" + (f" is whole: {', '.join(damaged)}" if damaged else ""))


def own(experiment: Experiment) -> tuple[str, ...]:
    """The packages of the experiment's own method and selector and of the parts in them: what `trusted` takes."""

    def named(spec: Any) -> Iterator[str]:
        if isinstance(spec, Mapping):
            spec = list(spec.values())
        if isinstance(spec, list | tuple):
            yield from chain.from_iterable(map(named, spec))
        elif isinstance(spec, str) and ":" in spec:
            yield spec.partition(":")[0].partition(".")[0]

    return tuple(sorted({*named(experiment.method), *named(experiment.selector)}))


def _write(file: BinaryIO, tensors: Sequence[Tensor], structure: str) -> None:
    """One pass over the tensors, which are not copied; the widest types first, so that all lie aligned."""
    if odd := [t for t in tensors if t.dtype not in DTYPES or t.layout != torch.strided]:
        raise ValueError(f"checkpoint: a tensor of {odd[0].dtype}, {odd[0].layout} can not be saved")
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "structure": structure}}
    end = 0
    for i in order:
        t, start = tensors[i], end
        end += t.numel() * t.element_size()
        header[str(i)] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    header["crc32"] = {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST:
        raise ValueError(f"checkpoint: {len(text)} bytes of structure, {LARGEST} is the most; keep numbers in tensors")
    crc = 0
    for piece in chain([len(text).to_bytes(8, "little"), text], (buffer(tensors[i]) for i in order)):
        file.write(piece)
        crc = crc32(piece, crc)
    file.write(crc.to_bytes(4, "little"))


def buffer(tensor: Tensor) -> Any:
    """The tensor's values as a buffer; a view of it where it is contiguous."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _read(path: Path) -> tuple[dict[str, Any], list[Tensor]] | None:
    """Structure and tensors; None: truncated or damaged. ValueError: whole, but of another format."""
    if not _sound(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(f"checkpoint: {path} is {about.get('format', 'something else')}, this reads {FORMAT}")
            names = map(str, range(len(file.keys()) - 1))
            tensors = [file.get_tensor(name).clone() for name in names]  # in memory, not mapped from the file
    except SafetensorError:
        return None
    return json.loads(about["structure"]), tensors


def _sound(path: Path) -> bool:
    """Whether the last four bytes are the checksum of all others."""
    left, crc = path.stat().st_size - 4, 0
    with path.open("rb") as file:
        while left > 0:
            piece = file.read(min(left, 2**20))
            crc, left = crc32(piece, crc), left - len(piece)
        return file.read(4) == crc.to_bytes(4, "little")


def _tidy(home: Path, version: int) -> None:
    """Only this version and the last before it stay: newer ones are of a course that was taken back."""
    kept = [v for v in _files(home) if v < version][-1:]
    for v, path in _files(home).items():
        if v not in (*kept, version):
            path.unlink()
    for leftover in home.glob("*.part"):
        leftover.unlink()


def _files(home: Path) -> dict[int, Path]:
    """The checkpoints by version, ascending."""
    return dict(sorted((int(p.stem), p) for p in home.glob("*.safetensors") if p.stem.isdigit()))


def _settle(folder: Path) -> None:
    """Let the names in a folder outlast a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
