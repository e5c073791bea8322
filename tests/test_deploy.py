"""Federations of real processes on loopback, with TLS and node authentication: they learn, and they survive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, MessageType
from homes import COMMAND, home, port, server, started, until

from deploy import internals, processes
from deploy.home import Home
from prfl import store
from prfl.records import pack

pytestmark = pytest.mark.slow

LEARNING = ["data={set: digits, clients: 4, partition: iid}", "model={name: mlp, hidden: [32]}", "evaluate_every=1"]


@dataclass
class Federation:
    """A server and its nodes."""

    home: Home
    port: int
    stack: ExitStack = field(default_factory=ExitStack)
    nodes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def node(self, client: int, *more: str) -> None:
        """Start one; its device class is `kind<client>`."""
        out = self.home.folder / f"node{client}.{time.monotonic_ns()}.out"
        to = ("--server", f"127.0.0.1:{self.port}", "--key", f"n{client}", "--client", str(client), *more)
        call = ("deploy", "node", "--home", str(self.home.folder), "--profile", f"kind{client}", *to)
        self.nodes[client] = self.stack.enter_context(started(*call, out=out))

    def run(self, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
        """`prfl ARGUMENTS` for this home, on its way."""
        return self.stack.enter_context(started(*arguments, "--home", str(self.home.folder), out=folder))

    def superlink(self) -> int:
        return int(self.home.read()["pids"]["superlink"])

    def server_apps(self) -> list[int]:
        return [p for p in processes.belonging(self.home) if b"flwr-serverapp" in _command(p)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = home(tmp_path_factory.mktemp("home"), "n0", "n1", "n2", "n3")
    with ExitStack() as stack:
        os.environ["OMP_NUM_THREADS"] = "1"  # three nodes share this machine
        stack.callback(os.environ.pop, "OMP_NUM_THREADS")
        found = Federation(made, port(), stack)
        stack.enter_context(server(made, found.port))
        for client in range(3):
            found.node(client)
        yield found


def events(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    return [e for e in store.events(folder) if kind in ("", e["kind"])] if (folder / "events.jsonl").exists() else []


@pytest.mark.parametrize(
    ("method", "pacing"), [("pr_fl", "{name: buffered, in_flight: 3, goal: 2}"), ("fedavg", "{name: sync, clients: 3}")]
)
def test_three_nodes_learn_to_read_digits(federation: Federation, tmp_path: Path, method: str, pacing: str) -> None:
    out, folder = tmp_path / "out", tmp_path / "run"
    asked = ["run", *LEARNING, f"method={method}", f"pacing={pacing}", "devices={name: real, nodes: 3, timeout: 60}",
             "stop={accuracy: 0.94, versions: 80}", "work={steps: 20, lr: 0.2}", "--out", str(folder)]  # fmt: skip
    assert federation.run(out, *asked).wait(180) == 0, out.read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_accuracy"] >= 0.90
    assert summary["failed_updates"] == 0
    assert set(summary["updates_by_class"]) == {"kind0", "kind1", "kind2"}
    assert 0 <= summary["poll_seconds_mean"] <= summary["poll_seconds_longest"] <= 1  # 0: no look was in vain
    assert "validation" in out.read_text()
    assert counted(folder) == summary["client_updates"]
    assert subprocess.run([*COMMAND, "resume", str(folder)], capture_output=True, text=True).stdout.endswith("end\n")
    told = subprocess.run(
        [*COMMAND, "deploy", "status", "--home", str(federation.home.folder)], capture_output=True, text=True
    )
    assert "nodes: 3 of 4 online" in told.stdout
    assert str(folder) in told.stdout


def misbehave(federation: Federation, over: threading.Event) -> None:
    """The node n3, client 3: it says who it is, then answers tasks with everything but their updates."""
    key = internals.load_key(federation.home.key("n3"))
    with internals.fleet(f"127.0.0.1:{federation.port}", federation.home.ca.read_bytes(), key) as fleet:
        node, tasks = fleet.activate(), 0

        def fetched(notice: internals.Notice, name: str) -> bytes:
            while (content := fleet.fetch(node, notice.run, name)) is None:
                time.sleep(0.05)
            return content

        while not over.wait(0.1):
            fleet.heartbeat(node)
            if (notice := fleet.look(node)) is None:
                continue
            message = notice.whole({name: fetched(notice, name) for name in notice.objects})
            fleet.confirm(node, notice)
            internals.act_as(node, notice.run)
            if message.metadata.message_type == MessageType.QUERY:
                reply = Message(pack(b"", {"client": 3, "profile": "odd"}), reply_to=message)
            else:
                tasks += 1
                data = (b"short", bytes(4 << 20), b"never sent")[min(tasks - 1, 2)]
                reply = Message(pack(data), reply_to=message)
            parcel = internals.Parcel.of(reply)
            session, wanted = fleet.announce(node, parcel, 0.1)
            for name in wanted if tasks < 3 else ():
                fleet.store(node, notice.run, session, name, parcel.contents[name]())
        fleet.deactivate(node)


def test_a_node_that_answers_in_part_or_too_much_holds_nobody_up(federation: Federation, tmp_path: Path) -> None:
    out, folder, over = tmp_path / "out", tmp_path / "run", threading.Event()
    asked = ["run", *LEARNING, "method=fedbuff", "pacing={name: buffered, in_flight: 4, goal: 2}",
             "devices={name: real, nodes: 4, timeout: 8}", "stop={versions: 15}", "work={steps: 20}",
             "evaluate_every=5", "--out", str(folder)]  # fmt: skip
    with ThreadPoolExecutor(1) as pool:
        odd = pool.submit(misbehave, federation, over)
        try:
            assert federation.run(out, *asked).wait(180) == 0, out.read_text()
        finally:
            over.set()
        odd.result()
    reasons = [e["reason"] for e in events(folder, "arrival") if e["client"] == 3]
    assert reasons[0].startswith("truncated: 5 bytes")
    assert "the reply has more than" in reasons[1]
    assert reasons[2] == "no answer in 8 s"
    assert not any(e["used"] for e in events(folder, "arrival") if e["client"] == 3)
    others = [e for e in events(folder, "arrival") if e["client"] != 3]
    assert sum(e["used"] for e in others) > 20
    assert max(e["seconds"] for e in others) < 20  # Flower's own Grid waits three minutes for what was announced


def test_whatever_dies_or_stalls_or_comes_late_the_run_goes_on(federation: Federation, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "run"
    asked = ["run", *LEARNING, "method=pr_fl", "pacing={name: buffered, in_flight: 3, goal: 2}",
             "devices={name: real, nodes: 3, timeout: 8}", "stop={seconds: 95}", "work={steps: 20, lr: 0.2}",
             "evaluate_every=10", "--out", str(folder)]  # fmt: skip
    follower = federation.run(out, *asked)

    def arrived(client: int, reason: str | None = None, after: float = 0.0) -> bool:
        wanted = [e for e in events(folder, "arrival") if e["client"] == client and e["at"] > after]
        return any(e["used"] if reason is None else reason in e["reason"] for e in wanted)

    def merged() -> int:
        return len(events(folder, "merge"))

    def now() -> float:
        return float(events(folder)[-1]["at"])

    until(lambda: merged() > 2)
    federation.nodes[0].kill()  # and comes back with the same key, when Flower lets it
    federation.node(0)
    killed = now()
    federation.nodes[1].send_signal(signal.SIGSTOP)
    federation.node(3)
    until(lambda: arrived(1, "no answer in 8 s"))
    federation.nodes[1].send_signal(signal.SIGCONT)
    stopped = now()
    until(lambda: arrived(3) and arrived(1, after=stopped))

    before = merged()
    (app,) = federation.server_apps()
    os.kill(app, signal.SIGKILL)
    follower.terminate()
    going = federation.run(tmp_path / "resumed", "resume", str(folder))
    until(lambda: events(folder, "resume") and merged() > before + 2)

    before = merged()
    os.kill(federation.superlink(), signal.SIGKILL)
    until(lambda: merged() > before + 2)
    until(lambda: arrived(0, after=killed + 5))
    assert going.wait(180) == 0, (tmp_path / "resumed").read_text()

    summary = json.loads((folder / "summary.json").read_text())
    assert counted(folder) == summary["client_updates"]
    assert summary["versions"] == merged()
    (resumed,) = events(folder, "resume")
    assert len(lost(folder)) >= resumed["updates"]
    assert summary["failed_updates"] == resumed["updates"] + sum(not e["used"] for e in events(folder, "arrival"))
    assert [e["client"] for e in events(folder, "join")].count(3) >= 1
    assert "goes on" not in out.read_text()  # that is only said to a person who leaves


def counted(folder: Path) -> int:
    """Updates that came, each once, from a task that was sent; each is in the next merge, or came after the last."""
    under_way: dict[int, int] = {}
    versions, total, used = [], 0, 0
    for e in events(folder):
        match e["kind"]:
            case "send":
                assert e["client"] not in under_way
                under_way[e["client"]] = e["version"]
            case "arrival":
                assert under_way.pop(e["client"]) == e["version"]
                used += e["used"]
            case "merge":
                versions.append(e["version"])
                assert e["updates"] == used
                total, used = total + used, 0
            case "resume":
                assert used == 0
                under_way.clear()
    assert versions == list(range(1, len(versions) + 1))
    return total + used


def lost(folder: Path) -> list[str]:
    path = folder / "lost.jsonl"
    return [line for line in path.read_text().splitlines() if '"used":true' in line] if path.exists() else []


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
