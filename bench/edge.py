"""What a node costs apart from training: memory, seconds, bytes on the wire, idle CPU; Flower's own and the warm one.

A server with TLS, node authentication and the gate, and one node at a time, all on loopback. The node dials a relay
that counts bytes. The model is a real one and its training is real, a single step. Beside it, what these bytes cost
at least on this machine: one TLS connection there and back, hashed and checked at both ends. Through the gate and the
SuperLink they cross three, each way. This file is also the ServerApp.
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
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

HIDDEN = {"0.2 MB": (670,), "6.6 MB": (1250, 1250), "40 MB": (3120, 3120)}  # of float32, between 64 and 10
PRFL = [sys.executable, "-c", "from prfl.cli import main; main()"]
MARK = "PRFL_EDGE"  # in the environment of every process of the node
QUIET = 12.0  # seconds without a task before the idle node is measured, so that its polling has slowed down
LOOK = 0.1  # seconds between two looks at the memory
ASK = 2.0  # seconds between two questions to the server
TARGET = 0.6  # seconds a task, apart from training
PROJECT = """[project]
name = "edge"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "prfl"
[tool.flwr.app.components]
serverapp = "edge:app"
clientapp = "clients.app:app"
[tool.flwr.app.config]
hidden = ""
tasks = 1
out = ""
"""
Row = dict[str, Any]

app = ServerApp()


@app.main()
def server(grid: Grid, context: Context) -> None:
    """Tasks one after the other, the first one to warm up; when each was sent and came, and its seconds of training."""
    from clients.local import Local
    from deploy.replies import Prompt
    from prfl import groups, models, problem
    from prfl.codec import Codec, Layout
    from prfl.config import Experiment
    from prfl.masks import DENSE
    from prfl.records import architecture_out, experiment_out
    from prfl.types import Task, Work
    from strategies.grid import GridTransport

    chosen = context.run_config
    experiment = Experiment.model_validate(
        {
            "data": {"set": "digits", "clients": 2, "partition": "iid"},
            "model": {"name": "mlp", "hidden": json.loads(str(chosen["hidden"]))},
            "work": {"steps": 1, "batch": 10, "lr": 0.1},
        }
    )
    given = problem.build(experiment)
    local, params = Local(given), models.values(given.model)
    architecture = groups.architecture(given.model, given.example)
    beside = {
        "experiment": experiment_out(experiment),
        "codec": json.dumps(asdict(Codec())),
        "architecture": architecture_out(architecture),
    }
    layout = Layout.of(params, architecture.groups)
    transport = GridTransport(Prompt(grid), Codec(), layout, beside, timeout=300)
    transport.enrol(1)
    rows: list[Row] = []
    for version in range(int(chosen["tasks"]) + 1):
        task = Task(0, version, params, DENSE, Work(steps=1, batch=10, lr=0.1), seed=version)
        began, sent = time.time(), transport.now()
        transport.send(task)
        arrival = transport.wait()
        if arrival is None or arrival.update is None:
            raise RuntimeError(f"no update: {arrival}")
        ended, took = time.time(), transport.now() - sent
        start = time.perf_counter()
        local.train(task)  # as long as it took on the node, which is this machine too
        training = time.perf_counter() - start
        rows.append(
            {
                "began": began,
                "ended": ended,
                "seconds": took - training,
                "training": training,
                "encoded_down": arrival.bytes_down,
                "encoded_up": arrival.bytes_up,
            }
        )
        time.sleep(0.5)
    out = Path(str(chosen["out"]))
    out.with_suffix(".part").write_text(json.dumps(rows[1:]))
    out.with_suffix(".part").rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", nargs="+", choices=("stock", "warm"), default=["stock", "warm"])
    parser.add_argument("--sizes", nargs="+", choices=list(HIDDEN), default=list(HIDDEN))
    parser.add_argument("--tasks", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder, deployed(Path(folder)) as (home, port):
        found = [measured(home, port, kind, args.sizes, args.tasks) for kind in args.nodes]
        for its in (its for row in found for its in row["tasks"].values()):
            its["bare"] = bare(home, its["rows"][0]["encoded_down"])
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
    warm = [its["seconds"] for row in found if row["node"] == "warm" for its in row["tasks"].values()]
    if warm:
        print(f"\nwarm: {max(warm):.2f} s at most, {TARGET} s wanted{'' if max(warm) <= TARGET else ': MISSED'}")
    if args.json:
        args.json.write_text(json.dumps({"cores": os.cpu_count(), "load": load, "nodes": found}, indent=1))


def measured(home: Path, port: int, kind: str, sizes: Sequence[str], tasks: int) -> Row:
    """One kind of node: idle, then at work with models of every size."""
    with Relay.to(port) as relay, node(home, kind, relay.port), Memory.watched(kind) as memory:
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
        by_size = {}
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
                "rows": rows,
            }
            print(f"{kind}, {size}: {by_size[size]['seconds']:.2f} s a task", file=sys.stderr, flush=True)
    return {"node": kind, **idle, "tasks": by_size}


def ran(home: Path, hidden: Sequence[int], tasks: int) -> list[Row]:
    """A run of the ServerApp above."""
    from deploy import admission, processes
    from deploy.home import Home

    where, folder, out = Home.of(home), home / "edge", home / f"{time.time_ns()}.json"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    shutil.copy(__file__, folder / "edge.py")
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


def belonging(name: str, value: str) -> list[int]:
    """Processes with this in their environment."""
    wanted, found = f"{name}={value}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def cpu(name: str, value: str) -> float:
    """Seconds that these processes and their ended children have used."""
    ticks = 0
    for pid in belonging(name, value):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Memory:
    """Proportional set size of all processes of a node, looked at all the time."""

    kind: str
    looks: list[tuple[float, int]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @staticmethod
    @contextmanager
    def watched(kind: str) -> Iterator[Memory]:
        memory = Memory(kind)
        thread = threading.Thread(target=memory._watch)
        thread.start()
        try:
            yield memory
        finally:
            memory.over.set()
            thread.join()

    @property
    def latest(self) -> int:
        return self.looks[-1][1]

    def peak(self, spans: Sequence[tuple[float, float]]) -> int:
        return max(pss for at, pss in self.looks if any(a <= at <= b + LOOK for a, b in spans))

    def _watch(self) -> None:
        pids: list[int] = []
        while not self.over.wait(LOOK):
            if len(self.looks) % 10 == 0 or self.kind == "stock":  # which starts a process a task
                pids = belonging(MARK, mark(self.kind))
            total = 0
            for pid in pids:
                with suppress(OSError):
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                    total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            self.looks.append((time.time(), total))


class Relay:
    """Passes TCP connections on to a port of this machine and counts: bytes to the node, and from it."""

    def __init__(self, to: int):
        self._to, self._lock = to, threading.Lock()
        self._times: tuple[list[float], list[float]] = ([], [])
        self._sums: tuple[list[int], list[int]] = ([0], [0])
        self._ear = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._ear.getsockname()[1])

    @staticmethod
    @contextmanager
    def to(port: int) -> Iterator[Relay]:
        relay = Relay(port)
        threading.Thread(target=relay._listen, daemon=True).start()
        try:
            yield relay
        finally:
            relay._ear.close()

    def total(self) -> int:
        return self._sums[0][-1] + self._sums[1][-1]

    def within(self, way: int, start: float, end: float) -> int:
        times, sums = self._times[way], self._sums[way]
        return sums[bisect(times, end)] - sums[bisect(times, start)]

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._ear.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass, args=(far, near, 0), daemon=True).start()
                threading.Thread(target=self._pass, args=(near, far, 1), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: int) -> None:
        with suppress(OSError):
            while part := source.recv(1 << 18):
                with self._lock:
                    self._times[way].append(time.time())
                    self._sums[way].append(self._sums[way][-1] + len(part))
                sink.sendall(part)
        for end in (sink, source):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
