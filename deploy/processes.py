"""Flower's programs as processes: where they lie, what they are told, what they answer, which are a server's."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.home import Home, write

CONNECTION = "prfl"  # the name of our SuperLink in Flower's config.toml
MARK = "PRFL_SERVER"  # in the environment of everything that belongs to a server: its home


def flwr(home: Home, *arguments: str, timeout: float = 60.0) -> dict[str, Any]:
    """What Flower's CLI answers, as JSON, about the server of this home. Raises RuntimeError with one line."""
    call = [program("flwr"), *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            call, env=environment(home), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"flwr {arguments[0]} took longer than {timeout:.0f} s") from None
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {}
    if not isinstance(found, dict) or not found.get("success"):
        told = found.get("error-message") if isinstance(found, dict) else None
        text = " ".join((told or done.stderr or done.stdout or f"code {done.returncode}").split())
        raise RuntimeError(f"flwr {arguments[0]}: {text[max(0, text.find('[code:')) :]}")  # chatter comes before it
    return found


def supernode(address: str, config: Mapping[str, str | int], root: Path | None, key: Path | None) -> list[str]:
    """The command of Flower's own SuperNode. Raises ValueError."""
    for value in config.values():
        if isinstance(value, str) and (set(value) & set('"\\\n')):
            raise ValueError(f"Flower's node config cannot carry {value!r}")
    pairs = (f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in config.items())
    call = [program("flower-supernode"), "--superlink", address, "--port", str(free_port())]
    call += ["--insecure"] if root is None else ["--root-certificates", str(root)]
    call += [] if key is None else ["--auth-supernode-private-key", str(key)]
    return [*call, "--node-config", " ".join(pairs)]


def configure(home: Home, address: str, insecure: bool) -> None:
    """Flower's `config.toml`, so that `flwr run`, `ls` and `log` with our FLWR_HOME reach this SuperLink."""
    home.flwr.mkdir(mode=0o700, exist_ok=True)
    how = "insecure = true" if insecure else f"root-certificates = {json.dumps(str(home.ca))}"
    text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n{how}\n'
    write(home.flwr / "config.toml", text.encode(), mode=0o600)


def environment(home: Home) -> dict[str, str]:
    """Of everything of Flower's that is started from this home: its programs are found, and it asks nobody outside."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
    return os.environ | {
        "PATH": path,
        "FLWR_HOME": str(home.flwr),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
    }


def program(name: str) -> str:
    """Where a program of Flower's lies: beside our Python, else on the PATH. Raises ValueError."""
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
    if (found := shutil.which(name, path=path)) is None:
        raise ValueError(f"{name} is not installed beside {sys.executable}; install prfl with its dependencies")
    return found


def belonging(home: Home) -> list[int]:
    """Processes of this home's server, whoever started them; known on Linux alone, and empty elsewhere."""
    mark, found = f"{MARK}={home.folder}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # gone, or another user's
            continue
    return sorted(found)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
