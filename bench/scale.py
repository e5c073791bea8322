"""Arrivals per second through `serve`, and memory over a long run: a one-layer model, training that does nothing."""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from prfl.codec import Codec, Layout
from prfl.types import Architecture, State, Task, Update
from sim.devices import Device
from sim.network import links
from sim.transport import VirtualTransport
from sim.workers import Serial, singly
from strategies import table
from strategies.pacing import buffered
from strategies.server import serve

PARAMS = {"weight": torch.zeros(10, 10), "bias": torch.zeros(10)}
WORK = table.config.work({"steps": 1})


def nothing(task: Task) -> Update:
    delta = {k: torch.full((task.mask.count(k, v.shape),), 1e-3) for k, v in task.params.items()}
    return Update(task.client, task.version, delta, task.mask, 20.0, {"loss": 1.0})


def measure(method: str, devices: int, arrivals: int, in_flight: int) -> dict[str, Any]:
    """One run; memory is the process's resident set after a first tenth of the arrivals, and at the end."""
    architecture = Architecture(macs={"weight": 1.0})
    fleet = [Device("d", {"linear": 1e6 * (1 + c % 7)}, 2**30, 1e6, 1e6) for c in range(devices)]
    transport = VirtualTransport(
        fleet, [20] * devices, Serial(singly(nothing)), links(), Codec(), Layout.of(PARAMS), architecture
    )
    m = table.method(method, WORK)
    goal, counted, memory = 10, 0, list[float]()

    def log(event: Any) -> None:
        nonlocal counted
        counted += event["kind"] == "arrival"
        if event["kind"] == "arrival" and counted in (arrivals // 10, arrivals):
            gc.collect()
            memory.append(_resident())

    def stop(state: State, now: float) -> bool:
        return counted >= arrivals

    state = m.init(PARAMS, architecture, dict.fromkeys(range(devices), "d"), 0)
    began = time.perf_counter()
    serve(m, buffered(in_flight, goal), transport, state, stop=stop, log=log)
    seconds = time.perf_counter() - began
    return {
        "method": method,
        "devices": devices,
        "in_flight": in_flight,
        "arrivals": counted,
        "arrivals_per_second": round(counted / seconds),
        "microseconds_per_arrival": round(1e6 * seconds / counted, 1),
        "MiB_early": round(memory[0], 1),
        "MiB_late": round(memory[-1], 1),
    }


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrivals", type=int, default=20_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(method, devices, options.arrivals, devices // 10)
        for method in ("fedbuff", "pr_fl")
        for devices in (100, 1000)
    ]
    print(f"{'method':<9}{'devices':>8}{'in flight':>10}{'arrivals/s':>12}{'us each':>9}{'MiB early':>11}{'late':>8}")
    for r in rows:
        print(
            f"{r['method']:<9}{r['devices']:>8}{r['in_flight']:>10}{r['arrivals_per_second']:>12}"
            f"{r['microseconds_per_arrival']:>9}{r['MiB_early']:>11}{r['MiB_late']:>8}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
