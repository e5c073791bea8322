"""Values in files in memory: how processes of one machine hand each other arrays without a pipe's copies and waits."""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any
from weakref import finalize

import cloudpickle
import numpy as np
import torch

ALIGNED = 64  # bytes: where arrays begin in a file
BULK = 2**12  # bytes of an array that is worth a place of its own
Buffers = Sequence[memoryview]


@dataclass(frozen=True)
class Stored:
    """A value in a file that every process of this machine can read."""

    path: str

    def read(self) -> Any:
        """Its arrays are the file's bytes in memory, shared with all who read it until one writes there."""
        with open(self.path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        size = int.from_bytes(data[:8], "little")
        value, sizes = pickle.loads(data[8 : 8 + size])
        starts = _starts(size, sizes)
        return pickle.loads(value, buffers=[data[at : at + n] for at, n in zip(starts, sizes, strict=True)])

    def copied(self) -> Any:
        """Its arrays are copies, each for itself: the file may be written again."""
        with open(self.path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            value, sizes = pickle.loads(file.read(size))
            buffers = [np.empty(n, np.uint8).data for n in sizes]
            for at, buffer in zip(_starts(size, sizes), buffers, strict=True):
                file.seek(at)
                file.readinto(buffer)
        return pickle.loads(value, buffers=buffers)


class Files:
    """Folders for such files: the first, which may be in memory, as long as there is room, else the last."""

    def __init__(self, folders: Sequence[str]):
        self._folders, self._count = [Path(folder) for folder in folders], count()

    def put(self, value: Any) -> Stored:
        """Kept as long as somebody here holds what is returned."""
        stored = self._written(f"value-{next(self._count)}", *_packed(value))
        finalize(stored, Path(stored.path).unlink, missing_ok=True)
        return stored

    def letter(self, value: Any, box: str) -> bytes:
        """The value for one reader, who opens the letter before another comes through this box.

        Large arrays wait in the box, a file that stays: memory that is there already takes half the time of new.
        """
        head, buffers = _packed(value)
        return pickle.dumps(self._written(box, head, buffers)) if buffers else head

    def _written(self, name: str, head: bytes, buffers: Buffers) -> Stored:
        *first, last = (folder / name for folder in self._folders)
        for path in first:  # in a container there may be very little
            try:
                return _write(path, head, buffers)
            except OSError:
                path.unlink(missing_ok=True)
        return _write(last, head, buffers)


def opened(letter: bytes) -> Any:
    """What `Files.letter` was given."""
    found = pickle.loads(letter)
    return found.copied() if isinstance(found, Stored) else pickle.loads(found[0])


def _packed(value: Any) -> tuple[bytes, list[memoryview]]:
    """A head with the lengths of what follows it: large arrays as they lie in memory."""
    found: list[pickle.PickleBuffer] = []
    data = BytesIO()

    def small(buffer: pickle.PickleBuffer) -> bool:
        if buffer.raw().nbytes < BULK:
            return True
        found.append(buffer)
        return False

    _Pickler(data, protocol=5, buffer_callback=small).dump(value)
    buffers = [buffer.raw() for buffer in found]
    return pickle.dumps((data.getvalue(), [len(b) for b in buffers])), buffers


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Tensors go as arrays do; by themselves they would drag along all that they are views of."""

    def reducer_override(self, obj: Any) -> Any:
        plain = type(obj) is torch.Tensor and obj.layout is torch.strided and not obj.requires_grad
        if plain and obj.device.type == "cpu" and obj.dtype is not torch.bfloat16:  # of which numpy knows nothing
            return torch.from_numpy, (obj.numpy(),)
        return super().reducer_override(obj)


def _write(path: Path, head: bytes, buffers: Buffers) -> Stored:
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "wb") as file:  # what it held is overwritten, not freed
        file.write(len(head).to_bytes(8, "little") + head)
        for at, buffer in zip(_starts(len(head), [len(b) for b in buffers]), buffers, strict=True):
            file.seek(at)
            file.write(buffer)
    return Stored(str(path))


def _starts(head: int, sizes: Sequence[int]) -> list[int]:
    """Where a file's arrays begin."""
    starts, at = [], 8 + head
    for size in sizes:
        at += -at % ALIGNED
        starts.append(at)
        at += size
    return starts
