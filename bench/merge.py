"""A merge against the machine's memory: GB/s of what it has to move beside GB/s of a copy, in the same run, one thread.

Both in CPU seconds and by turns, the least of each, so that a machine that others use says nearly the same.

masked_mean of 100 updates of Conv2 (hidden 2048, 6.6 M values) at density 0.3. What has to be moved: every update's
packed values read once, the parameters read once and written once, 4 bytes each. Masks, positions, sums and counts are
not counted, so that what a merge reads or writes beyond the least does not look like speed. A copy counts the bytes it
reads and those it writes; torch's goes through the caches, numpy's may write past them. Target: half of torch's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prfl import groups, models
from prfl.cut import Cut
from prfl.masks import Mask
from prfl.merge import masked_mean
from prfl.types import Architecture, Arrival, State, Task, Tree, Update, Work

TARGET = 0.5
MIX = (0.1, 0.2, 0.3, 0.4, 0.5)  # tiers; their mean is the density of the others
DENSITY = 0.3
COPIED = 64_000_000  # values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--times", type=int, default=5, help="measurements per number")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows: list[dict[str, str | float]] = []
    print(f"{'masks':<24}{'GB':>8}{'ms':>9}{'GB/s':>8}{'torch':>8}{'numpy':>8}{'of torch':>10}{'of numpy':>10}")
    for name, masks in cases(args.updates).items():
        row = measure(masks, args.times)
        rows.append({"masks": name, **row})
        print(
            f"{name:<24}{row['GB']:>8.3f}{row['ms']:>9.1f}{row['GB/s']:>8.2f}{row['torch']:>8.2f}{row['numpy']:>8.2f}"
            f"{row['of torch']:>10.2f}{row['of numpy']:>10.2f}",
            flush=True,
        )
    for done in rows:
        met = "met" if float(done["of torch"]) >= TARGET else "MISSED"
        print(f"{done['masks']}: {done['of torch']:.2f} of a copy by torch, {TARGET} wanted: {met}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "merge": rows}, indent=1))


def cases(updates: int) -> dict[str, Callable[[], list[Mask]]]:
    """Who holds what; made only when it is measured."""
    params = start()
    model = models.conv2(hidden=2048)((1, 28, 28), 62)
    coupled = groups.architecture(model, torch.zeros(1, 1, 28, 28)).groups
    magnitudes = {k: v.abs() for k, v in params.items()}
    weights, channels = Cut(spread="model").rank(magnitudes, params), Cut("channels").rank(magnitudes, params, coupled)
    return {
        "one for all": lambda: [weights.mask(DENSITY)] * updates,
        "tiers of one ranking": lambda: [weights.mask(MIX[i % len(MIX)]) for i in range(updates)],
        "channels, one for all": lambda: [channels.mask(DENSITY)] * updates,
        "every client's own": lambda: [scattered(params, 7919 * i) for i in range(updates)],
    }


def measure(made: Callable[[], Sequence[Mask]], times: int) -> dict[str, float]:
    params = start()
    state = State(0, params, Cut().rank(params, params), Architecture())
    updates = [update(params, mask, i) for i, mask in enumerate(made())]
    arrivals = [Arrival(Task(u.client, 0, params, u.mask, Work(), u.client), 0.0, 1.0, 0, 0, u) for u in updates]
    values = sum(v.numel() for u in updates for v in u.delta.values()) + 2 * sum(v.numel() for v in params.values())
    source, target = torch.ones(COPIED), torch.ones(COPIED)
    seconds, by_torch, by_numpy = least(
        [
            lambda: masked_mean()(state, arrivals),
            lambda: target.copy_(source),
            lambda: np.copyto(target.numpy(), source.numpy()),
        ],
        times,
    )
    speed, *copies = 4e-9 * values / seconds, 8e-9 * COPIED / by_torch, 8e-9 * COPIED / by_numpy
    return {
        "GB": 4e-9 * values,
        "ms": 1e3 * seconds,
        "GB/s": speed,
        "torch": copies[0],
        "numpy": copies[1],
        "of torch": speed / copies[0],
        "of numpy": speed / copies[1],
    }


def update(params: Tree, mask: Mask, client: int) -> Update:
    delta = {k: torch.full((mask.count(k, v.shape),), 1e-3 * (client + 1)) for k, v in params.items()}
    return Update(client, 0, delta, mask, 10.0 + client)


def start() -> Tree:
    torch.manual_seed(0)
    return models.values(models.conv2(hidden=2048)((1, 28, 28), 62))


def scattered(params: Tree, by: int) -> Mask:
    """A random mask, which is much faster moved on by so many places than drawn anew."""
    return Mask({k: (_random(v.shape) < DENSITY).roll(by) for k, v in params.items() if v.dim() > 1})


@cache
def _random(shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def least(runs: Sequence[Callable[[], object]], times: int) -> list[float]:
    """Least CPU seconds of a call of each, called by turns."""
    took: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + times):
        for run, one in zip(runs, took, strict=True):
            start = time.process_time()
            run()
            one.append(time.process_time() - start)
    return [min(one[1:]) for one in took]


if __name__ == "__main__":
    main()
