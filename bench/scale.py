"""The server at scale: CPU time an event over 100 to 10,000 devices, a tenth of them in flight, and its memory.

A model's parameters, `buffered` pacing, training that does nothing; tasks and updates are really encoded, decoded and
merged. Every row is a process of its own, and times are CPU seconds of its one thread, so that a machine that
others use says the same. `us`: microseconds an event (an arrival and the task sent in its place) over the later three
quarters of the run; `merging`: those spent in the merge itself, which for PR-FL sums the latest models of all clients
`seen`, by definition; `choosing`: those spent in choosing who trains next, which draws from all that are idle;
`versions`: those that tasks in flight have started from, at most; `models`: how many of them lie in memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from math import log
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import torch

from prfl import config, groups, models
from prfl.codec import Codec, Layout
from prfl.types import Arrival, State, Task, Update
from sim.devices import Device
from sim.network import links
from sim.transport import VirtualTransport
from sim.workers import Serial, singly
from strategies import selector, table
from strategies.pacing import buffered
from strategies.server import serve

GOAL = 10
LIMIT = 2048  # MiB
FLEETS = (100, 1_000, 10_000)


@dataclass(frozen=True)
class Timed:
    """A merge or a selector, and the CPU seconds of all its calls so far."""

    inner: Any
    took: list[float] = field(default_factory=lambda: [0.0])

    def init(self) -> Any:
        return self.inner.init()

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> Any:
        return self._timed(self.inner, state, arrivals)

    def ask(self, state: State, idle: Sequence[int], free: int, rng: np.random.Generator) -> Any:
        return self._timed(self.inner.ask, state, idle, free, rng)

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Any:
        return self.inner.tell(state, arrivals)

    def _timed(self, part: Callable[..., Any], *given: Any) -> Any:
        began = time.process_time()
        try:
            return part(*given)
        finally:
            self.took[0] += time.process_time() - began


def nothing(task: Task) -> Update:
    delta = {k: torch.full((task.mask.count(k, v.shape),), 1e-3) for k, v in task.params.items()}
    signal = {k: v.abs() for k, v in delta.items()} if task.work.report else None
    return Update(task.client, task.version, delta, task.mask, 20.0, {"loss": 1.0, "accuracy": 0.5}, signal)


def measure(method: str, devices: int, arrivals: int, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = models.build(name, (1, 28, 28), 10, seed=0)
    params, architecture = models.values(model), groups.architecture(model, torch.zeros(1, 1, 28, 28))
    speeds = [{"conv": 1e9 * (1 + c % 7), "linear": 1e9 * (1 + c % 7)} for c in range(devices)]
    fleet = [Device("d", speed, 2**33, 1e6, 1e6) for speed in speeds]
    layout = Layout.of(params, architecture.groups)
    transport = VirtualTransport(fleet, [20] * devices, Serial(singly(nothing)), links(), Codec(), layout, architecture)
    m = table.method(method, config.work({"steps": 1}))
    merge, choose = Timed(m.merge), Timed(selector.random())
    m = replace(m, merge=merge)
    counted, alive, most, there = 0, [ref(next(iter(params.values())))], 1, 1
    marks: list[tuple[float, int, float, float]] = []
    seen = set()

    def log(event: Any) -> None:
        nonlocal counted
        if event["kind"] == "arrival":
            counted += 1
            seen.add(event["client"])
            if counted in (arrivals // 4, arrivals):
                marks.append((time.process_time(), counted, merge.took[0], choose.took[0]))

    def keep(state: State) -> None:
        nonlocal alive, most, there
        alive = [r for r in alive if r() is not None] + [ref(next(iter(state.params.values())))]
        most = max(most, len(alive))
        there = max(there, sum(v.untyped_storage().filename is None for r in alive if (v := r()) is not None))

    def stop(state: State, now: float) -> bool:
        return counted >= arrivals

    start = m.init(params, architecture, dict.fromkeys(range(devices), "d"), 0)
    serve(m, buffered(devices // 10, GOAL), transport, start, selector=choose, stop=stop, log=log, keep=keep)
    spent, events, merging, choosing = (after - before for before, after in zip(*marks, strict=True))
    gc.collect()
    return {
        "method": method,
        "devices": devices,
        "in flight": devices // 10,
        "arrivals": counted,
        "seen": len(seen),
        "us": 1e6 * spent / events,
        "merging": 1e6 * merging / events,
        "choosing": 1e6 * choosing / events,
        "versions": most,
        "models": there,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arrivals", type=int, default=1_000)
    parser.add_argument("--methods", nargs="+", default=["fedbuff", "pr_fl"])
    parser.add_argument("--model", choices=models.TABLE, default="conv2_mnist")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    print(
        f"{'method':<9}{'devices':>8}{'in flight':>10}{'seen':>6}{'us':>8}{'merging':>9}{'choosing':>9}{'versions':>9}"
        f"{'models':>8}{'peak MiB':>10}"
    )
    rows, spawn = [], get_context("spawn")
    for method in options.methods:
        for devices in FLEETS:
            with ProcessPoolExecutor(1, mp_context=spawn) as own:
                r = own.submit(measure, method, devices, options.arrivals, options.model).result()
            rows.append(r)
            print(
                f"{method:<9}{devices:>8}{r['in flight']:>10}{r['seen']:>6}{r['us']:>8.0f}{r['merging']:>9.0f}"
                f"{r['choosing']:>9.0f}{r['versions']:>9}{r['models']:>8}{r['peak MiB']:>10.0f}",
                flush=True,
            )
    for method in options.methods:
        print(verdict([r for r in rows if r["method"] == method]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Of the two largest fleets: how the time grows beside log n, and the memory beside its limit."""
    less, most = rows[-2:]
    allowed = log(most["devices"]) / log(less["devices"])
    whole = most["us"] / less["us"]
    apart = (most["us"] - most["merging"]) / (less["us"] - less["merging"])
    return (
        f"{most['method']}: from {less['devices']} to {most['devices']} devices {whole:.2f}x the time an event "
        f"({apart:.2f}x apart from the merge), log n grows {allowed:.2f}x: {_met(whole <= allowed)}; "
        f"{most['peak MiB']:.0f} of {LIMIT} MiB: {_met(most['peak MiB'] <= LIMIT)}"
    )


def _met(yes: bool) -> str:
    return "met" if yes else "MISSED"


if __name__ == "__main__":
    main()
