"""Client-rounds per second on a GPU, alone and shared by several workers, against a pool of CPU workers in one run."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from prfl import config, models
from prfl.partition import Noise
from prfl.problem import Problem
from prfl.samples import Dataset, Samples
from sim import experiments
from sim.pools import Place
from sim.run import simulate

SHAPE, CLASSES, CLIENTS, SAMPLES = (1, 28, 28), 10, 50, 100
MODELS: dict[str, dict[str, Any]] = {"mlp": {"hidden": (64,)}, "conv2": {}}


def problem(name: str) -> Problem:
    """Clients with random samples: what they learn does not matter here."""
    draw = torch.Generator().manual_seed(0)
    count = CLIENTS * SAMPLES
    samples = Samples(torch.randn(count, *SHAPE, generator=draw), torch.randint(CLASSES, (count,), generator=draw))
    model = models.build(name, SHAPE, CLASSES, 0, MODELS[name])
    parts = list(torch.split(torch.arange(count), SAMPLES))
    return Problem(model, Dataset("random", samples, samples, CLASSES), samples, parts, Noise(), 0)


def rate(given: Problem, place: Place, versions: int) -> float:
    """Client-rounds per second of FedAvg on all clients; start-up and the first round are not counted."""
    asked = [f"data.clients={CLIENTS}", "method=fedavg", f"pacing={{name: sync, clients: {CLIENTS}}}",
             "work={epochs: 1, batch: 20, lr: 0.05}", f"stop={{versions: {versions}}}",
             f"evaluate_every={versions}"]  # fmt: skip
    merged: list[float] = []

    def watch(event: Mapping[str, Any], tally: Any) -> None:
        if event["kind"] == "merge":
            merged.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        experiment = config.load(experiments.path("default"), asked)
        simulate(experiment, Path(folder) / "run", pool=place, given=given, watch=watch)
    return CLIENTS * (len(merged) - 1) / (merged[-1] - merged[0])


def places(workers: int, shares: Sequence[float]) -> dict[str, Place]:
    found = {f"{workers} CPU workers": Place(workers)}
    for share in shares:
        each = min(workers, int(1 / share))
        found[f"{each} on one GPU"] = Place(each, device="cuda", gpus=share)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"skipped: no GPU here (torch {torch.__version__})")
        return
    rows = []
    print(f"{torch.cuda.get_device_name(0)}\n{'model':8}{'where':16}{'client-rounds/s':>17}{'ratio':>8}")
    for name in MODELS:
        given, first = problem(name), 0.0
        for where, place in places(options.workers, options.shares).items():
            found = rate(given, place, options.versions)
            first = first or found
            rows.append({"model": name, "where": where, "client_rounds_per_second": found, "ratio": found / first})
            print(f"{name:8}{where:16}{found:17.1f}{found / first:7.2f}x", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(0), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
