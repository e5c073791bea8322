"""A merge against the machine's memory: GB/s of what it has to move beside GB/s of a copy, in the same run, one thread.

masked_mean of 100 updates of Conv2 (hidden 2048, 6.6 M values) at density 0.3. What has to be moved: every update's
packed values read once, the parameters read once and written once, 4 bytes each. Masks, positions, sums and counts are
not counted, so that what a merge reads or writes beyond the least does not look like speed. A copy counts the bytes it
reads and those it writes; torch's goes through the caches, numpy's may write past them. Target: half of torch's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from prfl import groups, models
from prfl.cut import Cut
from prfl.masks import Mask
from prfl.merge import masked_mean
from prfl.types import Architecture, Arrival, State, Task, Tree, Update, Work

TARGET = 0.5
MIX = (0.1, 0.2, 0.3, 0.4, 0.5)  # tiers; their mean is the density of the others
DENSITY = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--times", type=int, default=5, help="measurements per number")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)

    copies = bandwidth(args.times)
    print(f"copy: torch {copies['torch']:.2f} GB/s, numpy {copies['numpy']:.2f} GB/s")
    print(f"{'masks':<24}{'GB':>8}{'ms':>9}{'GB/s':>8}{'of copy':>9}{'of numpy':>10}  half of the copy")
    rows: list[dict[str, str | float]] = []
    for name, masks in cases(args.updates).items():
        row = measure(masks, args.times)
        row |= {"of copy": row["GB/s"] / copies["torch"], "of numpy": row["GB/s"] / copies["numpy"]}
        verdict = "met" if row["of copy"] >= TARGET else "MISSED"
        cells = f"{row['GB']:>8.3f}{row['ms']:>9.1f}{row['GB/s']:>8.2f}{row['of copy']:>9.2f}{row['of numpy']:>10.2f}"
        print(f"{name:<24}{cells}  {verdict}", flush=True)
        rows.append({"masks": name, **row})
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "copy": copies, "merge": rows}, indent=1))


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
        "every client's own": lambda: [scattered(params, i) for i in range(updates)],
    }


def measure(made: Callable[[], Sequence[Mask]], times: int) -> dict[str, float]:
    params = start()
    state = State(0, params, Cut().rank(params, params), Architecture())
    updates = [update(params, mask, i) for i, mask in enumerate(made())]
    arrivals = [Arrival(Task(u.client, 0, params, u.mask, Work(), u.client), 0.0, 1.0, 0, 0, u) for u in updates]
    values = sum(v.numel() for u in updates for v in u.delta.values()) + 2 * sum(v.numel() for v in params.values())
    seconds = typical(lambda: masked_mean()(state, arrivals), times)
    return {"GB": 4e-9 * values, "ms": 1e3 * seconds, "GB/s": 4e-9 * values / seconds}


def update(params: Tree, mask: Mask, client: int) -> Update:
    delta = {k: torch.full((mask.count(k, v.shape),), 1e-3 * (client + 1)) for k, v in params.items()}
    return Update(client, 0, delta, mask, 10.0 + client)


def start() -> Tree:
    torch.manual_seed(0)
    return models.values(models.conv2(hidden=2048)((1, 28, 28), 62))


def scattered(params: Tree, seed: int) -> Mask:
    draw = torch.Generator().manual_seed(seed)
    return Mask({k: torch.rand(v.shape, generator=draw) < DENSITY for k, v in params.items() if v.dim() > 1})


def bandwidth(times: int) -> dict[str, float]:
    """GB/s read and written by copies of 256 MB, by library."""
    source, target = torch.ones(64_000_000), torch.ones(64_000_000)
    copies = {
        "torch": lambda: target.copy_(source),
        "numpy": lambda: np.copyto(target.numpy(), source.numpy()),
    }
    return {name: 2 * 256e6 / typical(copy, times) / 1e9 for name, copy in copies.items()}


def typical(run: Callable[[], object], times: int) -> float:
    """Median seconds of a call."""
    run()
    took = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


if __name__ == "__main__":
    main()
