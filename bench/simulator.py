"""Client-rounds per second of `prfl run`, as a ratio to a plain PyTorch loop on two processes, side by side.

    python bench/simulator.py [--works mlp conv2] [--rounds 20] [--repeats 3] [--ray] [--json FILE]

FedAvg, SGD, learning rate 0.05, batch 20, one local epoch of 100 samples of 28x28 a client. The plain loop is what one
would write by hand: a model, `torch.optim.SGD` and two processes, one thread each, that add their clients up, so that
one model a process and round travels. Start-up and the first rounds are left out on both sides. The prfl side encodes,
checks, clocks and logs every client. The last rows are PR-FL with channel masks of 0.1 to 0.6, 0.3 on average, against
prfl's own dense FedAvg, both of Conv2 in rounds of ten; then PR-FL with ten more clients at work, where a merge of ten
updates leaves no worker without a task. Start-up: from nothing to a first result.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prfl import density, models, partition
from prfl.config import Experiment
from prfl.masks import DENSE
from prfl.problem import Problem
from prfl.samples import Dataset, Samples
from prfl.types import Task, Work
from sim import pools
from sim.pools import Place, Pool
from sim.run import simulate
from strategies.method import Method
from strategies.pr_fl import pr_fl

SAMPLES, BATCH, LR, PROCESSES = 100, 20, 0.05, 2
WARM = 3  # rounds that are not timed
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A model, how many clients there are, and how many a round."""

    model: Mapping[str, Any]
    clients: int
    round: int


JOBS = {
    "mlp": Job({"name": "mlp", "hidden": [64]}, 500, 50),
    "conv2": Job({"name": "two_cnn"}, 100, 10),
}


def problem(job: Job) -> Problem:
    """Random pictures: speed does not depend on what they show."""
    draw = torch.Generator().manual_seed(0)
    size = job.clients * SAMPLES
    x = torch.randint(0, 256, (size, 1, 28, 28), dtype=torch.uint8, generator=draw)
    y = torch.randint(0, 10, (size,), generator=draw)
    train = Samples(x, y, (127.5,), (73.6,))
    few = train.subset(torch.arange(100))
    name, *_ = job.model.values()
    options = {k: v for k, v in job.model.items() if k != "name"}
    model = models.build(str(name), (1, 28, 28), 10, seed=0, options=options)
    parts = [part.clone() for part in torch.split(torch.arange(size), SAMPLES)]
    return Problem(model, Dataset("random", train, few, 10), few, parts, partition.Noise(), 0)


def pruned(work: Work = Work()) -> Method:
    """PR-FL with channel masks of fixed densities, 0.3 on average, in multiples of eight."""
    return replace(pr_fl(unit="channels", multiple=8, work=work), density=density.tiers((0.1, 0.2, 0.3, 0.6)))


def prfl(job: Job, given: Problem, pool: Pool, rounds: int, method: Any = "fedavg", over: int = 0) -> float:
    """Client-rounds per second of a run, without start-up and first rounds. over: clients left at work by a merge."""
    wait = {"name": "buffered", "in_flight": job.round + over, "goal": job.round}
    stamps: list[float] = []

    def watch(event: Mapping[str, Any], tally: Any) -> None:
        if event["kind"] == "merge":
            stamps.append(time.perf_counter())

    experiment = Experiment.model_validate(
        {
            "data": {"clients": job.clients},
            "model": job.model,
            "work": {"epochs": 1, "batch": BATCH, "lr": LR},
            "method": method,
            "pacing": wait if over else {"name": "sync", "clients": job.round},
            "devices": {"mix": {"laptop": 1.0}},
            "stop": {"versions": WARM + rounds},
            "evaluate_every": 10**6,
            "metrics": [],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        simulate(experiment, Path(folder) / "run", pool=pool, given=given, watch=watch)
    return job.round * rounds / (stamps[-1] - stamps[WARM - 1])


def bare(job: Job, given: Problem, rounds: int) -> float:
    """Client-rounds per second of the plain loop."""
    with workers(given) as pipes:
        weights = {k: v.clone() for k, v in given.model.state_dict().items()}
        draw = torch.Generator().manual_seed(0)
        began = 0.0
        for version in range(WARM + rounds):
            if version == WARM:
                began = time.perf_counter()
            chosen = torch.randperm(job.clients, generator=draw)[: job.round].tolist()
            for i, pipe in enumerate(pipes):
                pipe.send(({k: v.numpy() for k, v in weights.items()}, chosen[i::PROCESSES]))
            sums = [pipe.recv() for pipe in pipes]
            weights = {k: torch.from_numpy(sum(s[k] for s in sums)) / job.round for k in weights}
        return job.round * rounds / (time.perf_counter() - began)


@contextmanager
def workers(given: Problem) -> Iterator[list[Connection]]:
    """Processes that train what comes through their pipes."""
    context = mp.get_context("spawn")
    pipes, running = [], []
    for _ in range(PROCESSES):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, given), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        running.append(process)
    try:
        yield pipes
    finally:
        for pipe, process in zip(pipes, running, strict=True):
            pipe.close()
            process.join()


def work(pipe: Connection, given: Problem) -> None:
    torch.set_num_threads(1)
    x = (given.dataset.train.x.float() - 127.5) / 73.6
    data = [(x[part], given.dataset.train.y[part]) for part in given.parts]
    while True:
        try:
            weights, clients = pipe.recv()
        except EOFError:
            return
        start = {k: torch.from_numpy(v) for k, v in weights.items()}
        total = {k: torch.zeros_like(v) for k, v in start.items()}
        for client in clients:
            given.model.load_state_dict(start)
            local(given.model, *data[client])
            for k, v in given.model.state_dict().items():
                total[k] += v
        pipe.send({k: v.numpy() for k, v in total.items()})


def local(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One epoch of plain SGD."""
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    for at in torch.split(torch.randperm(len(y)), BATCH):
        sgd.zero_grad()
        F.cross_entropy(model(x[at]), y[at]).backward()  # type: ignore[no-untyped-call]
        sgd.step()


def first(pool: Pool, given: Problem) -> None:
    """A first result."""
    with closing(pool(given)) as lent:
        lent.submit(0, Task(0, 0, models.values(given.model), DENSE, Work(steps=1), seed=0))
        lent.result(0)


def imported() -> float:
    """Seconds that a new Python takes to import torch, which every worker has to."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def row(name: str, pairs: Sequence[Sequence[float]]) -> Row:
    """A line of the table: medians of both sides, and of their ratio with its extremes."""
    ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    middle = statistics.median(ratios)
    print(f"{name:28}{ours:10.1f}{theirs:10.1f}{middle:8.2f}{ratios[0]:8.2f}{ratios[-1]:8.2f}", flush=True)
    return {"row": name, "per_second": [ours, theirs], "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="of every side, one after the other in turns")
    parser.add_argument("--ray", action="store_true", help="workers on Ray, not processes")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    given, began = problem(JOBS["mlp"]), time.perf_counter()
    with pools.kept(Place(PROCESSES, ray=args.ray)) as pool:
        first(pool, given)
        start, least = time.perf_counter() - began, imported()
        print(f"start-up of the pool: {start:.1f} s, {start / least:.1f} times an import of torch ({least:.1f} s)\n")
        print(f"{'':28}{'these/s':>10}{'those/s':>10}{'ratio':>8}{'lowest':>8}{'highest':>8}")
        for name in args.works:
            job = JOBS[name]
            given = problem(job)
            pairs = [(prfl(job, given, pool, args.rounds), bare(job, given, args.rounds)) for _ in range(args.repeats)]
            rows.append(row(f"{name}: prfl, plain loop", pairs))
        if "conv2" in args.works:
            sides = ((f"{__name__}:pruned", 0), (f"{__name__}:pruned", job.round), ("fedavg", 0))
            runs = [[prfl(job, given, pool, args.rounds, *side) for side in sides] for _ in range(args.repeats)]
            rows.append(row("conv2: PR-FL at 0.3, FedAvg", [(a, c) for a, _, c in runs]))
            rows.append(row("same, PR-FL buffered", [(b, c) for _, b, c in runs]))
    if args.json:
        about = {"torch": torch.__version__, "cores": os.cpu_count(), "ray": args.ray, "start": start, "import": least}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
