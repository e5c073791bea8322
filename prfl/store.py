"""The run folder: what a run was asked, what happened, and what came out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import yaml
from safetensors.torch import save_file

from prfl.config import Experiment
from prfl.types import Tree

PACKAGES = ("flwr", "torch", "torchvision", "numpy", "ray", "safetensors", "scikit-learn")


class Run:
    """An open run folder. Events go to `events.jsonl` as they happen; `events_sha256` leaves wall-clock fields out."""

    def __init__(self, folder: Path, experiment: Experiment):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._began, self._hash = folder, time.monotonic(), hashlib.sha256()
        self._events: TextIO = (folder / "events.jsonl").open("w")
        (folder / "config.yaml").write_text(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))
        write_json(folder / "env.json", environment())

    def log(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event, separators=(",", ":"))
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
        """`model.safetensors`, whole or not at all."""
        part = self.folder / "model.safetensors.part"
        save_file({k: v.contiguous() for k, v in params.items()}, part)
        os.replace(part, self.folder / "model.safetensors")

    def write(self, name: str, value: Any) -> None:
        write_json(self.folder / name, value)

    def close(self) -> None:
        self._events.close()


def fresh(root: Path, name: str) -> Path:
    """A new folder below `root` for a run of this name: `name`, `name-2`, ..."""
    tries = (name if n == 1 else f"{name}-{n}" for n in range(1, sys.maxsize))
    return next(root / t for t in tries if not (root / t).exists())


def write_json(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, path)


def model_sha256(params: Tree) -> str:
    """Over names, shapes and values of all entries, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(f"{name}{tuple(params[name].shape)}".encode())
        digest.update(params[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What a run ran on."""
    packages: Sequence[str] = PACKAGES
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {p: _version(p) for p in packages},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "absent"
