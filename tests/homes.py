"""Homes, servers and nodes of a deployment for tests: real processes on loopback, all gone in the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from deploy import credentials, processes
from deploy.home import Home

COMMAND = [sys.executable, "-m", "prfl"]
PATIENCE = 90.0  # seconds, on a busy machine


def home(folder: Path, *nodes: str) -> Home:
    """A home that is server and node in one: certificates, and keys of these nodes, admitted."""
    made = Home.of(folder)
    credentials.certify(made, ["127.0.0.1"])
    made.nodes.mkdir(exist_ok=True)
    for name in nodes:
        public = credentials.make_key(made, name)
        (made.nodes / public.name).write_bytes(public.read_bytes())
    return made


def port() -> int:
    """Free, like the one after it, and not one that outgoing connections are given."""
    for start in range(20000 + os.getpid() % 10000, 32000, 7):
        if all(_free(p) for p in (start, start + 1)):
            return start
    raise AssertionError("no free port")


@contextmanager
def started(*arguments: str, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`prfl ARGUMENTS` in a session of its own, its output in `out`; stopped in the end, with all that it started."""
    env = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    with out.open("wb") as file:
        process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=env, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(PATIENCE)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    break
                time.sleep(0.2)
            process.wait()


@contextmanager
def server(of: Home, port: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is ready; its output is in `server.out`."""
    out = of.folder / "server.out"
    arguments = ("deploy", "server", "--home", str(of.folder), "--host", "127.0.0.1", "--port", str(port), *more)
    try:
        with started(*arguments, out=out) as process:
            until(lambda: "ready on" in out.read_text() or process.poll() is not None)
            assert process.poll() is None, out.read_text()
            yield process
    finally:
        for pid in processes.belonging(of):  # a failed test is no reason to leave them
            os.kill(pid, signal.SIGKILL)


def node(of: Home, port: int, name: str, *more: str) -> Sequence[str]:
    """The arguments of a node of Flower's that dials the gate."""
    to = ("--home", str(of.folder), "--server", f"127.0.0.1:{port}", "--client", "0", "--stock")
    return ("deploy", "node", "--key", name, *to, *more)


def until(true: Callable[[], object], patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0
