"""What a node costs apart from training: memory, seconds, bytes on the wire, idle CPU; Flower's own and the warm one.

A server with TLS, node authentication and the gate, and one node at a time, all on loopback. The node dials a relay
that counts bytes. The model is a real one and its training is real, a single step. Beside it, what these bytes cost
at least on this machine: one TLS connection there and back, hashed and checked at both ends. Through the gate and the
SuperLink they cross three, each way. `edge_app.py` is the ServerApp.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zlib import crc32

from gauges import Memory, Relay, belonging, cpu

HIDDEN = {"0.2 MB": (670,), "6.6 MB": (1250, 1250), "40 MB": (3120, 3120)}  # of float32, between 64 and 10
PRFL = [sys.executable, "-c", "from prfl.cli import main; main()"]
MARK = "PRFL_EDGE"  # in the environment of every process of the node
QUIET = 12.0  # seconds without a task before the idle node is measured, so that its polling has slowed down
ASK = 2.0  # seconds between two questions to the server
TARGET = 0.6  # seconds a task, apart from training
PROJECT = """[project]
name = "edge"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "prfl"
[tool.flwr.app.components]
serverapp = "edge_app:app"
clientapp = "clients.app:app"
[tool.flwr.app.config]
hidden = ""
tasks = 1
out = ""
"""
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", nargs="+", choices=("stock", "warm"), default=["stock", "warm"])
    parser.add_argument("--sizes", nargs="+", choices=list(HIDDEN), default=list(HIDDEN))
    parser.add_argument("--tasks", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers here, as they come")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, deployed(Path(folder)) as (home, port):
        by_kind: dict[str, Row] = {}
        for kind in args.nodes:
            for row in measured(home, port, kind, args.sizes, args.tasks):
                by_kind[kind] = row
                size, its = list(row["tasks"].items())[-1]
                print(f"{kind}, {size}: {its['seconds']:.2f} s a task", file=sys.stderr, flush=True)
                if args.json:
                    nodes = list(by_kind.values())
                    args.json.write_text(json.dumps({"cores": os.cpu_count(), "load": load, "nodes": nodes}, indent=1))
    found = list(by_kind.values())
    print(f"{os.cpu_count()} cores, load before {load:.2f}; with TLS and node authentication, through the gate\n")
    print(f"{'node':8}{'idle PSS':>10}{'idle CPU':>10}{'of server':>11}{'idle B/s':>10}{'processes':>11}")
    for row in found:
        print(f"{row['node']:8}{row['idle_pss'] / 1e6:>7.0f} MB{row['idle_cpu']:>10.2%}{row['server_cpu']:>11.2%}"
              f"{row['idle_bytes']:>10.0f}{row['processes']:>11}")  # fmt: skip
    print(f"\n{'node':8}{'model':8}{'s a task':>10}{'worst':>8}{'training':>10}"
          f"{'bare TLS':>10}{'wire/encoded':>14}{'up':>8}{'peak PSS':>11}")  # fmt: skip
    for row in found:
        for size, its in row["tasks"].items():
            print(f"{row['node']:8}{size:8}{its['seconds']:>10.2f}{its['worst']:>8.2f}{its['training']:>10.2f}{its['bare']:>10.3f}"
                  f"{its['down']:>14.3f}{its['up']:>8.3f}{its['peak_pss'] / 1e6:>8.0f} MB")  # fmt: skip
    for size, its in next((row["tasks"] for row in found if row["node"] == "warm"), {}).items():
        print(f"warm, {size}: {TARGET} s wanted, {'met' if its['seconds'] <= TARGET else 'MISSED'}")


def measured(home: Path, port: int, kind: str, sizes: Sequence[str], tasks: int) -> Iterator[Row]:
    """One kind of node: idle, then at work with models of every size; all that is known so far, size by size."""
    often = 1 if kind == "stock" else 10  # it starts a process a task
    with (
        Relay.to(port) as relay,
        node(home, kind, relay.port),
        Memory.watched(MARK, mark(kind), often) as memory,
    ):
        wait(lambda: online(home), "the node")
        time.sleep(QUIET)
        idle: Row = {"processes": len(belonging(MARK, mark(kind))), "idle_pss": memory.latest}
        at, ticks, of_server, passed = (
            time.monotonic(),
            cpu(MARK, mark(kind)),
            cpu("PRFL_SERVER", str(home)),
            relay.total(),
        )
        time.sleep(QUIET)
        took = time.monotonic() - at
        idle["idle_cpu"] = (cpu(MARK, mark(kind)) - ticks) / took
        idle["server_cpu"] = (cpu("PRFL_SERVER", str(home)) - of_server) / took
        idle["idle_bytes"] = (relay.total() - passed) / took
        by_size: Row = {}
        for size in sizes:
            rows = ran(home, HIDDEN[size], tasks)
            encoded = [sum(r[f"encoded_{way}"] for r in rows) for way in ("down", "up")]
            spans = [(r["began"], r["ended"]) for r in rows]
            by_size[size] = {
                "seconds": statistics.median(r["seconds"] for r in rows),
                "worst": max(r["seconds"] for r in rows),
                "training": statistics.median(r["training"] for r in rows),
                "down": sum(relay.within(0, *span) for span in spans) / encoded[0],
                "up": sum(relay.within(1, *span) for span in spans) / encoded[1],
                "peak_pss": memory.peak(spans),
                "bare": bare(home, rows[0]["encoded_down"]),
                "rows": rows,
            }
            yield {"node": kind, **idle, "tasks": by_size}


def ran(home: Path, hidden: Sequence[int], tasks: int) -> list[Row]:
    """A run of the ServerApp above."""
    from deploy import admission, processes
    from deploy.home import Home

    where, folder, out = Home.of(home), home / "edge", home / f"{time.time_ns()}.json"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    shutil.copy(Path(__file__).with_name("edge_app.py"), folder)
    settings = f"hidden='{list(hidden)}' tasks={tasks} out='{out}'"
    told = processes.flwr(where, "run", str(folder), processes.CONNECTION, "--run-config", settings)

    def over() -> bool:
        with admission.connected(where) as link:
            state, how = link.run(int(told["run-id"]))
        if state == "finished" and not out.exists():
            raise RuntimeError(f"the run ended: {how}")
        return state == "finished"

    wait(over, "the run", pause=ASK)
    found: list[Row] = json.loads(out.read_text())
    return found


@contextmanager
def deployed(home: Path) -> Iterator[tuple[Path, int]]:
    """A server in `home`, and the port of its gate; the node's key is there too."""
    from deploy import credentials, processes
    from deploy.home import Home

    where, port = Home.of(home), processes.free_port()
    credentials.certify(where, ["127.0.0.1"])
    where.nodes.mkdir()
    for kind in ("stock", "warm"):
        shutil.copy(credentials.make_key(where, kind), where.nodes)
    command = ["deploy", "server", "--home", str(home), "--host", "127.0.0.1", "--port", str(port)]
    with process(command, home / "server.out") as its:
        wait(lambda: "ready on" in its.read_text(), "the server")
        yield home, port


@contextmanager
def node(home: Path, kind: str, port: int) -> Iterator[None]:
    command = ["deploy", "node", "--home", str(home), "--server", f"127.0.0.1:{port}", "--key", kind, "--client", "0"]
    with process([*command, *(["--stock"] if kind == "stock" else [])], home / f"{kind}.out", **{MARK: mark(kind)}):
        yield


def mark(kind: str) -> str:
    """Ours alone: another bench may run."""
    return f"{kind}-{os.getpid()}"


def online(home: Path) -> bool:
    from deploy import processes
    from deploy.home import Home

    return any(n["status"] == "online" for n in processes.flwr(Home.of(home), "supernode", "list")["nodes"])


@contextmanager
def process(command: Sequence[str], log: Path, **more: str) -> Iterator[Path]:
    """`prfl COMMAND`, stopped in the end with all that it started; its output."""
    env = os.environ | {"PYTHONUNBUFFERED": "1", "FLWR_TELEMETRY_ENABLED": "0"} | more
    with log.open("wb") as out:
        its = subprocess.Popen([*PRFL, *command], stdout=out, stderr=out, env=env, start_new_session=True)
    try:
        yield log
    finally:
        its.terminate()
        with suppress(subprocess.TimeoutExpired):
            its.wait(30)
        for name, value in more.items():
            for pid in belonging(name, value):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(its.pid, signal.SIGKILL)
        its.wait()


def bare(home: Path, size: int) -> float:
    """Seconds for so many bytes there and back over one TLS connection on loopback, hashed and checked at both ends."""
    from deploy.home import Home

    where, data = Home.of(home), os.urandom(size)
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(where.certificate, where.certificate_key)

    def take(end: ssl.SSLSocket) -> bytearray:
        got, at = bytearray(size), 0
        while at < size:
            at += end.recv_into(memoryview(got)[at:])
        hashlib.sha256(got).digest(), crc32(got)
        return got

    def echo(ear: socket.socket) -> None:
        with inside.wrap_socket(ear.accept()[0], server_side=True) as end:
            end.sendall(take(end))

    def once() -> float:
        with socket.create_server(("127.0.0.1", 0)) as ear:
            other = threading.Thread(target=echo, args=(ear,))
            other.start()
            with socket.create_connection(ear.getsockname()) as plain:
                outside = ssl.create_default_context(cafile=where.ca)
                with outside.wrap_socket(plain, server_hostname="localhost") as end:
                    began = time.perf_counter()
                    end.sendall(data)
                    take(end)
                    took = time.perf_counter() - began
            other.join()
        return took

    return statistics.median(once() for _ in range(3))


def wait(true: Callable[[], bool], what: str, patience: float = 300.0, pause: float = 0.5) -> None:
    end = time.monotonic() + patience
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come")
        time.sleep(pause)


if __name__ == "__main__":
    main()
