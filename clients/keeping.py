"""What a client keeps on disk between tasks: its tree for one run, a file in a folder that survives restarts."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from prfl.types import Tree

RUNS = 4  # whose files stay in a folder, the latest
_NAME = re.compile(r"([0-9a-f]{16})-[0-9]+\.safetensors(\.part|\.damaged)?")
_HEAD = 1 << 20  # bytes that a file may have besides its values

log = logging.getLogger("flwr")


@dataclass(frozen=True)
class Kept:
    """The file of a client in a run; `run` is its name, however long. It is there as a whole or not at all."""

    folder: Path
    run: str
    client: int

    @property
    def path(self) -> Path:
        return self.folder / f"{self._key}-{self.client}.safetensors"

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> Tree | None:
        """The tree, or None; a file that does not hold one of these shapes is put aside."""
        size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
        try:
            if self.path.stat().st_size > size + _HEAD:
                raise ValueError("too long")
            tree = load(self.path.read_bytes())
            if not fits(tree, shapes):
                raise ValueError("not of this model, or not finite")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("%s is damaged and put aside: %s", self.path, error)
            self._aside()
            return None
        return tree

    def write(self, tree: Tree) -> None:
        """Replace what was kept. A full or broken disk costs no task: it is said, and the tree is lost."""
        part = self.path.with_name(self.path.name + ".part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(save({k: v.contiguous() for k, v in tree.items()}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
            self._tidy()
        except OSError as error:
            log.warning("%s can not be written: %s", self.path, error.strerror)

    @property
    def _key(self) -> str:
        return blake2b(self.run.encode(), digest_size=8).hexdigest()

    def _aside(self) -> None:
        try:
            os.replace(self.path, self.path.with_name(self.path.name + ".damaged"))
        except OSError as error:
            log.warning("%s can not be put aside: %s", self.path, error.strerror)

    def _tidy(self) -> None:
        """Remove the files of all but the latest runs."""
        found = [(match[1], file) for file in self.folder.iterdir() if (match := _NAME.fullmatch(file.name))]
        latest = dict[str, float]()
        for key, file in found:
            latest[key] = max(latest.get(key, 0.0), file.stat().st_mtime)
        old = sorted(latest.keys() - {self._key}, key=lambda key: -latest[key])[RUNS - 1 :]
        for key, file in found:
            if key in old:
                file.unlink(missing_ok=True)


def fits(tree: Tree, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a tree has these shapes, in finite float32."""
    return {k: tuple(v.shape) for k, v in tree.items()} == dict(shapes) and all(
        v.dtype == torch.float32 and bool(v.isfinite().all()) for v in tree.values()
    )
