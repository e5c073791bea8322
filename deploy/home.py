"""The home folder of a deployment: which file lies where, and what a running server writes down about itself."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED = ("nodes", "flwr", "logs", "state")


@dataclass(frozen=True)
class Home:
    """`folder`: absolute. On the server it holds certificates, admitted nodes and records; on a node, its key."""

    folder: Path

    @staticmethod
    def of(folder: Path) -> Home:
        """Made where there is none, for its owner alone. Raises ValueError where a file is in the way."""
        folder = folder.expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"home {folder} is a file; a folder is wanted")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Home(folder)

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca.key"

    @property
    def certificate(self) -> Path:
        return self.folder / "server.crt"

    @property
    def certificate_key(self) -> Path:
        return self.folder / "server.key"

    @property
    def nodes(self) -> Path:
        """The public keys of the admitted nodes, NAME.pub."""
        return self.folder / "nodes"

    @property
    def database(self) -> Path:
        return self.folder / "superlink.db"

    @property
    def flwr(self) -> Path:
        """FLWR_HOME of everything that is started from here."""
        return self.folder / "flwr"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def server(self) -> Path:
        return self.folder / "server.json"

    def key(self, name: str) -> Path:
        """The private key of the node `name`; the public one is NAME.pub. Raises ValueError."""
        return self.folder / named(name)

    def state(self, name: str) -> Path:
        """What the node `name` remembers."""
        return self.folder / "state" / named(name)

    def read(self) -> dict[str, Any]:
        """`server.json`; empty where there is none. Raises ValueError."""
        try:
            found = json.loads(self.server.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            raise ValueError(f"{self.server} is not JSON; remove it when no server runs") from None
        if not isinstance(found, dict):
            raise ValueError(f"{self.server} is not what a server writes; remove it when no server runs")
        return found

    def note(self, changes: Mapping[str, Any]) -> None:
        """Change keys of `server.json`; None removes one. Several processes may do so at once."""
        with (self.folder / ".server.json.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            now = {k: v for k, v in {**self.read(), **changes}.items() if v is not None}
            write(self.server, (json.dumps(now, indent=1) + "\n").encode(), mode=0o644)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the one server of this home. Raises ValueError when there is another."""
        with (self.folder / ".server.lock").open("ab") as lock:
            if not _taken(lock):
                raise ValueError(f"a server runs on {self.folder} already (pid {self.read().get('pid', '?')})")
            yield

    def served(self) -> bool:
        """Whether a server runs on this home."""
        try:
            with self.alone():
                return False
        except ValueError:
            return True


def named(name: str) -> str:
    """A name that is a file name and cannot hide one of ours. Raises ValueError."""
    if not NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(f"a node's name is letters, digits, - and _, at most 64, and none of {RESERVED}; got {name!r}")
    return name


def write(path: Path, content: bytes, mode: int) -> None:
    """The file as a whole, or as it was; never readable for more than `mode` says."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _taken(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
