"""Where old tensors lie while somebody still needs them: in files, so that memory holds but a few models."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from tempfile import NamedTemporaryFile
from weakref import ref

import torch
from torch import Tensor

from prfl.checkpoint import buffer
from prfl.types import Tree

ALIGNED = 64  # bytes: where tensors begin in a file


class Shelf:
    """Tensors in the order in which they came; of what is still in use, the newest few are left in memory.

    What is older, as what a task under way began with, moves to a file of the system's folder for such (TMPDIR), and is
    read from there as it is needed: the same tensors, the same values. The file goes with its last reader, however that
    ends. Where the disk has no room, memory keeps them. To be used by the thread that reads them.
    newest: how many trees stay; room: bytes of the newest that stay, if those are more.
    """

    def __init__(self, newest: int = 8, room: int = 0):
        self._newest, self._room = newest, room
        self._known: deque[tuple[int, list[ref[Tensor]]]] = deque()  # bytes, tensors
        self._bytes = 0

    def add(self, tree: Tree) -> None:
        """Newer tensors than all before."""
        size = sum(v.nbytes for v in tree.values())
        self._known.append((size, [ref(v) for v in tree.values()]))
        self._bytes += size
        while len(self._known) > self._newest and self._bytes > self._room:
            size, tensors = self._known.popleft()
            self._bytes -= size
            alive = [v for tensor in tensors if (v := tensor()) is not None]
            with suppress(OSError):
                _move([v for v in alive if _in_memory(v)])


def _in_memory(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.untyped_storage().filename is None


def _move(tensors: list[Tensor]) -> None:
    """To a file that has no name any more: it is there as long as it is mapped."""
    if not tensors:
        return
    starts, end = [], 0
    for v in tensors:
        starts.append(end)
        end += -(-v.nbytes // ALIGNED) * ALIGNED
    with NamedTemporaryFile(prefix="prfl-") as file:
        for v, start in zip(tensors, starts, strict=True):
            file.seek(start)
            file.write(buffer(v))
        file.truncate(end)
        file.flush()
        mapped = torch.from_file(file.name, shared=True, size=end, dtype=torch.uint8)
    for v, start in zip(tensors, starts, strict=True):
        v.data = mapped[start : start + v.nbytes].view(v.dtype).view(v.shape)
