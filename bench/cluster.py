"""A run on a Ray cluster of two nodes, one of which is killed in the middle, against the run in this process.

Starts both nodes itself, as processes with ports and a folder of their own, and ends them whatever happens.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from prfl import config
from prfl.problem import Problem
from sim import experiments, pools
from sim.pools import Pool
from sim.run import simulate
from sim.workers import Workers

ROOT = Path(__file__).parent.parent
HEAD, OTHER = "127.0.0.2", "127.0.0.3"  # each node has an address of its own, as on two machines
START_UP = 120.0  # seconds that a node may take
EXPERIMENT = [
    "name=cluster", "data={set: digits, clients: 20, partition: {name: iid}}", "model={name: mlp, hidden: [64]}",
    "work={epochs: 8, batch: 10, lr: 0.05}", "pacing={name: buffered, in_flight: 10, goal: 5}", "evaluate_every=10",
]  # fmt: skip


@contextmanager
def node(folder: Path, name: str, *options: str, cpus: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """A Ray node, up; ended, with all that it started, at the end."""
    log = folder / f"{name}.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options, "--block", "--disable-usage-stats",
               "--num-cpus", str(cpus), "--object-store-memory", str(200 * 2**20)]  # fmt: skip
    more = {"PYTHONPATH": str(ROOT), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, **more}, cwd=folder, start_new_session=True
        )
    try:
        until = time.monotonic() + START_UP
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"no {name} node: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """A node and all that it started, at once: what a power cut does."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HEAD, 0))
        return int(s.getsockname()[1])


@contextmanager
def cluster() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of two nodes with a CPU each, and the one that does not hold the head."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)))
        port, client_port = free_port(), free_port()
        address = f"{HEAD}:{port}"
        head = ["--head", "--port", str(port), "--ray-client-server-port", str(client_port), "--no-monitor",
                "--node-ip-address", HEAD, "--temp-dir", str(folder)]  # fmt: skip
        stack.enter_context(node(folder, "head", *head, "--include-dashboard", "false"))
        yield address, stack.enter_context(node(folder, "other", "--address", address, "--node-ip-address", OTHER))


class Watched:
    """Makes the pool that is asked for, and keeps it to be looked at."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self.workers: Any = None

    def __call__(self, given: Problem) -> Workers:
        self.workers = self._pool(given)
        return self.workers  # type: ignore[no-any-return]


def measure(versions: int) -> dict[str, Any]:
    """Both runs, and where the actors were before and after the death of a node."""
    experiment = config.load(experiments.path("default"), [*EXPERIMENT, f"stop={{versions: {versions}}}"])
    with tempfile.TemporaryDirectory() as folder:
        here = simulate(experiment, Path(folder) / "serial")
        began = time.perf_counter()
        with cluster() as (address, other):
            started = time.perf_counter() - began
            pool = Watched(pools.Place(0, address))
            places: list[dict[int, str]] = []
            merges: list[tuple[int, float]] = []  # version, when
            killed: float = 0.0

            def watch(event: Mapping[str, Any], tally: Any) -> None:
                nonlocal killed
                if event["kind"] != "merge":
                    return
                merges.append((event["version"], time.perf_counter()))
                if not killed and event["version"] >= versions // 3 and len(pool.workers.nodes) == 2:
                    places.append(_addresses(pool.workers.nodes))
                    killed = time.perf_counter()
                    kill(other)
                elif event["version"] == versions:
                    places.append(_addresses(pool.workers.nodes))

            there = simulate(experiment, Path(folder) / "ray", pool=pool, watch=watch)
    before = [at for _, at in merges if at <= killed]
    after = [at for _, at in merges if at > killed]
    gaps = [b - a for a, b in zip([killed, *after], after, strict=False)]
    return {
        "seconds_to_start_two_nodes": round(started, 1),
        "serial": _told(here),
        "cluster": _told(there),
        "killed_after_version": len(before),
        "actors_before": places[0],
        "actors_after": places[-1],
        "merges_per_second_before": round(len(before[1:]) / (before[-1] - before[0]), 2),
        "merges_per_second_after": round(len(after[1:]) / (after[-1] - after[0]), 2),
        "longest_pause_after_s": round(max(gaps), 2),
        "same": all(here[key] == there[key] for key in ("model_sha256", "events_sha256")),
    }


def _addresses(nodes: Mapping[int, str]) -> dict[int, str]:
    """By actor, the address of its node."""
    import ray

    known = {found["NodeID"]: found["NodeManagerAddress"] for found in ray.nodes()}  # type: ignore[no-untyped-call]
    return {actor: known[node] for actor, node in nodes.items()}


def _told(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in ("versions", "model_sha256", "events_sha256", "wall_seconds", "stopped")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the nodes are ended then too
    found = measure(options.versions)
    print(f"{'':<18}{'versions':>9}{'seconds':>9}  model         events")
    for name in ("serial", "cluster"):
        r = found[name]
        hashes = f"{r['model_sha256'][:12]}  {r['events_sha256'][:12]}"
        print(f"{name:<18}{r['versions']:>9}{r['wall_seconds']:>9.1f}  {hashes}")
    for name in ("before", "after"):
        actors = ", ".join(f"actor {n} on {where}" for n, where in found[f"actors_{name}"].items())
        print(f"{name + ' the kill':<18}{found[f'merges_per_second_{name}']:>9} merges/s; {actors}")
    print(
        f"killed with -9 after version {found['killed_after_version']}; longest pause after it "
        f"{found['longest_pause_after_s']} s; two nodes took {found['seconds_to_start_two_nodes']} s to start"
    )
    print("the same model and events" if found["same"] else "NOT the same model and events")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    sys.exit(not found["same"])


if __name__ == "__main__":
    main()
