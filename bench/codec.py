"""The wire format: length against the information-theoretic least, GB/s both ways; CPU seconds of one thread."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import get_args

import torch

from prfl import residual
from prfl.codec import Codec, Layout, Values
from prfl.cut import Cut
from prfl.masks import DENSE, Mask
from prfl.types import Task, Tree, Update, Work

CONV2 = {
    "c1.weight": (32, 1, 5, 5), "c1.bias": (32,), "c2.weight": (64, 32, 5, 5), "c2.bias": (64,),
    "f1.weight": (512, 3136), "f1.bias": (512,), "f2.weight": (10, 512), "f2.bias": (10,),
}  # fmt: skip
SMALL = {
    "10 x 10": {"fc.weight": (10, 10), "fc.bias": (10,)},
    "MLP": {"f1.weight": (64, 784), "f1.bias": (64,), "f2.weight": (10, 64), "f2.bias": (10,)},
}  # the MLP: 50,890 values
LONGEST, SLOWEST = 1.02, 1.0  # of the least length; GB/s of dense model
SPEEDS = ("task out", "new mask", "task in", "update out", "update in")
DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)
RANKS = (0.05, 0.1, 0.2, 0.5, 1.0)
BITS = {"float32": 32, "float16": 16, "int8": 8}
Row = dict[str, str | float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", nargs="+", choices=get_args(Values), default=list(get_args(Values)))
    parser.add_argument("--seconds", type=float, default=0.15, help="CPU seconds per number")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)

    large = [large_model(v, density, args.seconds) for v in args.values for density in DENSITIES]
    print(f"Conv2, random masks; GB/s of dense float32. New masks: built for this message.\n{heads(large)}")
    for row in large:
        print(cells(row))
    small = [small_model(name, v, args.seconds) for name in SMALL for v in args.values]
    print(f"\nsmall dense models, microseconds\n{heads(small)}")
    for row in small:
        print(cells(row))
    ranks = increments()
    print(f"\nresidual split, densities {RANKS}\n{heads(ranks)}")
    for row in ranks:
        print(cells(row))
    print("\n" + "\n".join(verdicts(large)))
    if args.json:
        result = {"torch": torch.__version__, "large": large, "small": small, "residual": ranks}
        args.json.write_text(json.dumps(result, indent=1))


def large_model(values: Values, density: float, seconds: float) -> Row:
    """Bytes of a task beside the least, and speeds; decoding a task always builds its mask."""
    codec, params = Codec(values), model(CONV2)
    layout, mask = Layout.of(params), random_mask(params, density)
    task, update = job(params, mask)
    down = codec.encode_task(task, layout)
    up, _ = codec.encode_update(update, task, layout)
    shortest = sum(layout.sizes(mask)) * BITS[values] / 8
    shortest += sum(b.numel() * entropy(b.float().mean().item()) / 8 for b in mask.bits.values())

    def speed(run: Callable[[], object]) -> float:
        return 4 * sum(v.numel() for v in params.values()) / least(run, seconds) / 1e9

    return {
        "values": values,
        "density": density,
        "bytes": len(down),
        "of least": len(down) / shortest,
        "task out": speed(lambda: codec.encode_task(task, layout)),
        "new mask": speed(lambda: codec.encode_task(replace(task, mask=Mask(mask.bits)), layout)),
        "task in": speed(lambda: codec.decode_task(down, layout)),
        "update out": speed(lambda: codec.encode_update(update, task, layout)),
        "update in": speed(lambda: codec.decode_update(up, task, layout)),
    }


def verdicts(rows: list[Row]) -> list[str]:
    """Of random masks, a line for every target; float32 speeds by themselves, as the others also round."""
    out = []
    longest = max(float(row["of least"]) for row in rows)
    out.append(f"length: at most {longest:.3f} of the least, {LONGEST} allowed: {_met(longest <= LONGEST)}")
    for values in dict.fromkeys(str(row["values"]) for row in rows):
        cells = [
            (float(row[s]), f"{s} at {row['density']:g}") for row in rows if row["values"] == values for s in SPEEDS
        ]
        slow = [f"{what} {speed:.2f}" for speed, what in sorted(cells) if speed < SLOWEST]
        word = f"{_met(not slow)}{': ' if slow else ''}{', '.join(slow)}"
        out.append(f"{values}: at least {min(cells)[0]:.2f} GB/s, {SLOWEST:g} wanted: {word}")
    return out


def _met(yes: bool) -> str:
    return "met" if yes else "MISSED"


def small_model(name: str, values: Values, seconds: float) -> Row:
    codec, params = Codec(values), model(SMALL[name])
    layout = Layout.of(params)
    task, update = job(params, DENSE)
    down = codec.encode_task(task, layout)
    up, _ = codec.encode_update(update, task, layout)
    return {
        "model": name,
        "values": values,
        "down": len(down),
        "up": len(up),
        "task out": 1e6 * least(lambda: codec.encode_task(task, layout), seconds),
        "task in": 1e6 * least(lambda: codec.decode_task(down, layout), seconds),
        "update out": 1e6 * least(lambda: codec.encode_update(update, task, layout), seconds),
        "update in": 1e6 * least(lambda: codec.decode_update(up, task, layout), seconds),
    }


def increments() -> list[Row]:
    """Bytes of every rank's increment, with its mask and with the mask known, beside the whole sub-model."""
    params = model(CONV2)
    layout, ranking = Layout.of(params), Cut().rank({k: v.abs() for k, v in params.items()}, params)
    rows: list[Row] = []
    for share, i in zip(RANKS, residual.split(params, [ranking.mask(share) for share in RANKS]), strict=True):
        sizes = [len(residual.encode(i, layout, known=known)) for known in (False, True)]
        whole = len(Codec().encode_task(job(params, i.mask)[0], layout))
        rows.append({"density": share, "increment": sizes[0], "mask known": sizes[1], "sub-model": whole})
    total = {k: sum(float(row[k]) for row in rows) for k in ("increment", "mask known")}
    return [*rows, {"density": "all", **total, "sub-model": rows[-1]["sub-model"]}]


def model(shapes: dict[str, tuple[int, ...]]) -> Tree:
    draw = torch.Generator().manual_seed(0)
    return {k: torch.randn(shape, generator=draw) for k, shape in shapes.items()}


def random_mask(params: Tree, density: float) -> Mask:
    if density == 1:
        return DENSE
    draw = torch.Generator().manual_seed(1)
    return Mask({k: torch.rand(v.shape, generator=draw) < density for k, v in params.items() if v.dim() > 1})


def job(params: Tree, mask: Mask) -> tuple[Task, Update]:
    task = Task(3, 7, params, mask, Work(), seed=1)
    delta = {k: mask.gather(k, v) * 0.01 for k, v in params.items()}
    return task, Update(3, 7, delta, mask, 100.0, {"loss": 0.5, "seconds": 1.25})


def entropy(p: float) -> float:
    return 0.0 if p in (0, 1) else -p * log2(p) - (1 - p) * log2(1 - p)


def least(run: Callable[[], object], seconds: float) -> float:
    """Least CPU seconds of a call, so that a machine that others use says nearly the same."""
    run()
    took: list[float] = []
    while sum(took) < seconds or len(took) < 5:
        start = time.process_time()
        run()
        took.append(time.process_time() - start)
    return min(took)


def heads(rows: list[Row]) -> str:
    return "".join(f"{name:>12}" for name in rows[0])


def cells(row: Row) -> str:
    return "".join(
        f"{v:>12}" if isinstance(v, str) else f"{v:>12,.4g}" if v < 1e3 else f"{v:>12,.0f}" for v in row.values()
    )


if __name__ == "__main__":
    main()
