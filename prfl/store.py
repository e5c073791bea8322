"""The run folder: what a run was asked, what happened, and what came out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from itertools import count
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prfl.config import ConfigError, Experiment, plain

if TYPE_CHECKING:  # torch comes with it, and a folder is found without
    from prfl.types import Tree

PACKAGES = ("prfl", "flwr", "torch", "torchvision", "numpy", "ray", "safetensors", "scikit-learn")


class Run:
    """An open run folder; every file but `events.jsonl` is there as a whole or not at all.

    Events go to `events.jsonl` as they happen, one JSON object a line; `events_sha256` leaves wall-clock fields out.
    """

    def __init__(self, folder: Path, experiment: Experiment):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._began, self._hash = folder, time.monotonic(), hashlib.sha256()
        config = yaml.safe_dump(plain(experiment.model_dump()), sort_keys=False, allow_unicode=True)
        _whole(folder / "config.yaml", config.encode())
        self.write("env.json", environment())
        self._events = (folder / "events.jsonl").open("w", encoding="utf-8")

    def log(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(_finite(event), separators=(",", ":"), allow_nan=False)
        self._hash.update(line.encode() + b"\n")
        self._events.write(f'{line[:-1]},"wall":{self.seconds():.3f}}}\n')
        if event["kind"] == "merge":
            self._events.flush()

    def seconds(self) -> float:
        """Wall-clock seconds since the run began."""
        return time.monotonic() - self._began

    @property
    def events_sha256(self) -> str:
        return self._hash.hexdigest()

    def save_model(self, params: Tree) -> None:
        """`model.safetensors`."""
        from safetensors.torch import save

        _whole(self.folder / "model.safetensors", save({k: v.contiguous() for k, v in params.items()}))

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """A JSON object, one key a line; numbers that are not finite become null."""
        lines = (f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in _finite(value).items())
        _whole(self.folder / name, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def close(self) -> None:
        self._events.close()


def free(out: Path | None, name: str, root: Path = Path("runs")) -> Path:
    """The folder for a run: `out`, or a new one for this name below `root`. Raises ConfigError where a run lies."""
    if out is None:
        return fresh(root, name)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; a folder is wanted")
    if (out / "events.jsonl").exists():
        raise ConfigError(f"--out {out} holds a run already; choose another folder")
    return out


def fresh(root: Path, name: str) -> Path:
    """A new folder below `root` for a run of this name: `name`, `name-2`, ..."""
    tries = (name if n == 1 else f"{name}-{n}" for n in count(1))
    return next(root / t for t in tries if not (root / t).exists())


def model_sha256(params: Tree) -> str:
    """Over names, shapes and values of all entries, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(f"{name}{tuple(params[name].shape)}".encode())
        digest.update(params[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What a run ran on."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {p: _version(p) for p in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "absent"


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no nan."""
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}


def _whole(path: Path, content: bytes) -> None:
    """The file as a whole, or as it was."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
