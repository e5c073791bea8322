"""A server: SuperLink, gate and SuperExec are started, watched, started again, and stopped together."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx

from deploy import admission
from deploy.credentials import ending
from deploy.home import Home
from deploy.processes import MARK, belonging, configure, environment, program

POLL = "1.0"  # seconds between two looks of the SuperExec for a ServerApp to start: each costs the SuperLink 10 ms
PAGE = 1 << 16  # bytes of a page of the SuperLink's database
LOOK = 0.2  # seconds between two looks at the processes
READY = 120.0  # seconds
GRACE = 10.0  # seconds to end in
LONGEST = 30.0  # seconds before a process is started again
LONG = 60.0  # seconds after which a process counts as healthy
LOG = 10 << 20  # bytes before a log is turned over

Say = Callable[[str], None]


@dataclass
class Child:
    """A process that is to run. `due`: when it is started next, where it is not running."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    began: float = 0.0
    due: float = 0.0

    def start(self) -> None:
        """In a session of its own: Ctrl-C on the terminal is for us, and its children end with it."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.began = time.monotonic()

    def ended(self) -> str | None:
        """How it ended, in words; None while it runs, or when that was said already."""
        if self.process is None or self.process.poll() is None:
            return None
        code, self.process = self.process.returncode, None
        self.failures = 1 if time.monotonic() - self.began > LONG else self.failures + 1
        self.due = time.monotonic() + min(LONGEST, 2.0 ** (self.failures - 1))
        return f"{self.name} ended with {f'signal {-code}' if code < 0 else f'code {code}'}"


@dataclass(frozen=True)
class Server:
    """What is to run. `host`, `port`: of the gate; `superlink`: port on loopback."""

    home: Home
    host: str
    port: int
    superlink: int
    insecure: bool
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.superlink}"

    def children(self) -> list[Child]:
        home, there = self.home, f"127.0.0.1:{self.superlink}"
        tls = (str(home.certificate), str(home.certificate_key), str(home.ca))
        link = [program("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.superlink)]
        link += ["--isolation", "process", "--database", str(home.database)]
        link += ["--disable-runtime-dependency-installation"]
        if self.insecure:
            link += ["--insecure"]
        else:
            link += ["--ssl-certfile", tls[0], "--ssl-keyfile", tls[1], "--ssl-ca-certfile", tls[2]]
            link += ["--enable-supernode-auth"]
        execute = [program("flower-superexec"), "--runtime-api-address", there]
        execute += ["--insecure"] if self.insecure else ["--root-certificates", tls[2]]
        gate = [sys.executable, "-P", "-m", "deploy.gate", self.host, str(self.port), there]
        gate += () if self.insecure else tls
        commands = {"superlink": link, "gate": gate, "superexec": execute}  # stopped the other way round
        env = environment(home) | {MARK: str(home.folder), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL}
        return [Child(k, v, env, home.folder, home.logs / f"{k}.log") for k, v in commands.items()]


def serve(home: Home, host: str, port: int, *, insecure: bool, say: Say, ready: Callable[[], None]) -> None:
    """Run a server until SIGINT or SIGTERM, in the main thread; `ready` is called once, when nodes may come.

    Raises ValueError before anything runs, and RuntimeError when a process does not come up.
    """
    if not insecure:
        for file in (home.certificate, home.certificate_key, home.ca):
            if not file.exists():
                raise ValueError(f"no {file}; make it with `prfl deploy certs NAME_OR_ADDRESS...`")
        for line in ending((home.ca, home.certificate)):
            say(line)
    with home.alone():
        for pid in belonging(home):
            say(f"process {pid} was left by a server that died; it is stopped")
        _end([], home)
        if not _free(host, port):
            raise ValueError(f"{host}:{port} is taken; choose another --port")
        beside = (p for p in range(port + 1, min(port + 100, 1 << 16)) if _free("127.0.0.1", p))
        server = Server(home, host, port, next(beside), insecure)
        configure(home, server.address, insecure)
        home.logs.mkdir(exist_ok=True)
        pave(home.database)
        children = server.children()
        with _stopped_by_signals(server.stop):
            try:
                for child in children:
                    child.start()
                _note(server, children)
                _come_up(server, children)
                if not server.stop.is_set():
                    for line in () if insecure else admission.settle(home):
                        say(line)
                    ready()
                _watch(server, children, say)
            finally:
                _end(children, home)
                home.note(dict.fromkeys(("pid", "pids", "superlink", "insecure", "since")))


def _come_up(server: Server, children: Sequence[Child]) -> None:
    """Wait until the gate passes on that the SuperLink is well."""
    end = time.monotonic() + READY
    while not server.stop.is_set() and not well(server):
        for child in children:
            if how := child.ended():
                raise RuntimeError(f"{how}: {_last_line(child.log)}; all of it: {child.log}")
        if time.monotonic() > end:
            raise RuntimeError(f"not ready after {READY:.0f} s; see {server.home.logs}")
        server.stop.wait(LOOK)


def _watch(server: Server, children: Sequence[Child], say: Say) -> None:
    while not server.stop.wait(LOOK):
        for child in children:
            if how := child.ended():
                say(f"{how}; it is started again in {child.due - time.monotonic():.0f} s; see {child.log}")
            if child.process is None and time.monotonic() >= child.due:
                child.start()
                _note(server, children)
            turn_over(child.log)


def well(server: Server) -> bool:
    """Whether the SuperLink answers through the gate."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(server.host, server.host)
    secure = not server.insecure
    verify = ssl.create_default_context(cafile=server.home.ca) if secure else False
    url = f"{'https' if secure else 'http'}://{host}:{server.port}/health"
    try:
        with httpx.Client(verify=verify, timeout=2.0, trust_env=False) as client:
            return client.get(url, extensions={"sni_hostname": "localhost"}).status_code == 200
    except httpx.TransportError:
        return False


def pave(database: Path) -> None:
    """Large pages: whole models go through it, and one of 40 MB took 10,000 of SQLite's own. Frees what is unused."""
    with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(database)) as link:  # what it is, the SuperLink says
        link.execute("PRAGMA journal_mode = DELETE")
        link.execute(f"PRAGMA page_size = {PAGE}")
        link.execute("VACUUM")


def turn_over(log: Path) -> None:
    """A log that has grown long starts anew; the one before is kept as NAME.log.1."""
    with suppress(OSError):  # somebody deleted it, or the disk is full: no reason to end
        if log.stat().st_size > LOG:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)  # whoever writes appends, and goes on at the start


def _end(children: Sequence[Child], home: Home) -> None:
    """Stop everything of this home; first the SuperExec with its ServerApps, which still have something to say."""
    later = {c.process.pid for c in children if c.process}
    for process in [c.process for c in reversed(children) if c.process]:
        later.discard(process.pid)
        _tell(process, signal.SIGTERM)
        _wait(partial(_over, process, home, later))
        _tell(process, signal.SIGKILL)  # what is left of its session
        process.wait()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in belonging(home):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        _wait(lambda: not belonging(home))


def _over(process: subprocess.Popen[bytes], home: Home, others: set[int]) -> bool:
    return process.poll() is not None and set(belonging(home)) <= others


def _tell(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + GRACE
    while not done() and time.monotonic() < end:
        time.sleep(0.05)


def _note(server: Server, children: Sequence[Child]) -> None:
    pids = {c.name: c.process.pid for c in children if c.process}
    server.home.note(
        {
            "pid": os.getpid(),
            "pids": pids,
            "gate": f"{server.host}:{server.port}",
            "superlink": server.address,
            "insecure": server.insecure,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
    )


def _free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"


@contextmanager
def _stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT, SIGTERM and a closed terminal ask for the end, as often as they come."""
    asking = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in asking}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
