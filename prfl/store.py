"""The run folder: what a run was asked, what happened, and what came out."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from math import isfinite
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from prfl.config import ConfigError, Experiment, plain

if TYPE_CHECKING:  # torch comes with it, and a folder is found without
    from prfl.types import Tree

WALL = b',"wall":'  # the last field of every line
OWN = (  # what a run itself writes into its folder, and nobody else
    "config.yaml", "env.json", "split.json", "events.jsonl", "summary.json", "clients.json", "model.safetensors",
)  # fmt: skip
PACKAGES = ("prfl", "flwr", "torch", "torchvision", "numpy", "ray", "safetensors", "scikit-learn")


class Run:
    """An open run folder; every file but `events.jsonl` is there as a whole or not at all.

    Events go to `events.jsonl` as they happen, one JSON object a line; `events_sha256` leaves wall-clock fields out.
    Without an experiment a folder is opened again: its log, its hash and its wall clock go on from the last event.
    """

    def __init__(self, folder: Path, experiment: Experiment | None = None):
        self.folder, self._began, self._hash = folder, time.monotonic(), hashlib.sha256()
        log = folder / "events.jsonl"
        if experiment is None:
            last = 0.0
            for line in log.read_bytes().splitlines():
                logged, _, wall = line.rpartition(WALL)
                self._hash.update(logged + b"}\n")
                last = float(wall[:-1])
            self._began -= last
        else:
            settle(folder, experiment)
            self.write("env.json", environment())
        self._events = log.open("a" if experiment is None else "w", encoding="utf-8")

    @classmethod
    def again(cls, folder: Path, offset: int) -> tuple[Run, list[dict[str, Any]]]:
        """The run as when its log had `offset` bytes, opened to go on; and the events since, now in `lost.jsonl`.

        ConfigError: there is no run, or its log does not reach so far or has no line that ends there.
        """
        path = _log(folder)
        with path.open("r+b") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, offset - 1))
            if not 0 <= offset <= size or (offset and log.read(1) != b"\n"):
                raise ConfigError(f"{path} has {size} bytes and no event that ends at byte {offset}")
            lost = list(_events(log))
            if lost:
                with (folder / "lost.jsonl").open("ab") as kept:
                    kept.writelines(line for line, _ in lost)
                    _synced(kept)
            log.truncate(offset)
            _synced(log)
        return cls(folder), [event for _, event in lost]

    def log(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(_finite(event), separators=(",", ":"), allow_nan=False)
        self._hash.update(line.encode() + b"\n")
        self._events.write(f"{line[:-1]}{WALL.decode()}{self.seconds():.3f}}}\n")
        if event["kind"] == "merge":
            self._events.flush()

    def offset(self) -> int:
        """Bytes of the log, all of them safely on disk: what `again` takes."""
        _synced(self._events)
        return os.fstat(self._events.fileno()).st_size

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


def settle(folder: Path, experiment: Experiment) -> None:
    """A run folder with nothing in it but what the run is asked, `config.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_dump(plain(experiment.model_dump()), sort_keys=False, allow_unicode=True)
    _whole(folder / "config.yaml", config.encode())


def events(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a run folder, in order, up to a line that is not whole. ConfigError: there is no run."""
    with _log(folder).open("rb") as log:
        yield from (event for _, event in _events(log))


def summary(folder: Path) -> dict[str, Any]:
    """What `summary.json` holds. ConfigError: the run has not come to an end, or the file is damaged."""
    return _json(folder, "summary.json")


def clients(folder: Path) -> dict[int, dict[str, Any]]:
    """What `clients.json` holds, a row for every client; nothing of a run before there was one."""
    there = (folder / "clients.json").is_file()
    return {int(client): row for client, row in _json(folder, "clients.json").items()} if there else {}


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


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """For the one process that writes a run folder. Raises ValueError when there is another."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: its run is under way") from None
        except OSError:
            pass  # a file system without locks
        yield


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


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / name).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no finished run") from None
    except ValueError as error:
        raise ConfigError(f"{folder / name}: not JSON: {error}") from None
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "absent"


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no nan."""
    return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}


def _log(folder: Path) -> Path:
    if not (folder / "events.jsonl").is_file():
        raise ConfigError(f"{folder} holds no run")
    return folder / "events.jsonl"


def _events(log: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines and what they say, up to one that was not written whole: after a crash anything may follow."""
    for line in log:
        try:
            event = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n"):
            return
        yield line, event


def _synced(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _whole(path: Path, content: bytes) -> None:
    """The file as a whole, or as it was."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
