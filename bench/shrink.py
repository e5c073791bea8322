"""Milliseconds per training step of physically small models against the dense one, on one thread."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from clients.shrink import shrink
from prfl import models
from prfl.cut import Cut
from prfl.groups import architecture

MODELS: dict[str, tuple[str, models.Shape, int, Mapping[str, object]]] = {
    "conv2": ("conv2", (1, 28, 28), 62, {}),
    "vgg11": ("vgg11", (3, 32, 32), 10, {}),
    "resnet18": ("resnet18", (3, 32, 32), 10, {"stem": "cifar"}),
}
WIDTHS = (1.0, 0.5, 0.25, 0.125)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0, help="measuring time per model and width")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = [row for name in args.models for row in measure(name, args.batch, args.seconds)]
    print(f"{'model':10}{'width':>7}{'parameters':>12}{'ms a step':>11}{'ratio':>8}{'ms to shrink':>14}")
    for r in rows:
        cells = f"{r['width']:7g}{r['parameters']:12,.0f}{r['step_ms']:11.2f}{r['ratio']:7.1f}x{r['shrink_ms']:14.1f}"
        print(f"{r['model']:10}{cells}")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "batch": args.batch, "rows": rows}, indent=1))


def measure(name: str, batch: int, seconds: float) -> list[dict[str, str | float]]:
    """One row per width; `ratio` is how many times faster than dense."""
    kind, shape, classes, options = MODELS[name]
    dense = models.build(kind, shape, classes, seed=0, options=options)
    params = models.values(dense)
    ranking = Cut(unit="channels", width="linear").rank(
        {k: v.abs() for k, v in params.items()}, params, architecture(dense, torch.zeros(1, *shape)).groups
    )
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=draw)
    y = torch.randint(classes, (batch,), generator=draw)
    rows: list[dict[str, str | float]] = []
    for width in WIDTHS:
        mask = ranking.mask(width)
        small = shrink(dense, mask)
        step_ms = median_ms(training_step(small, x, y), seconds)
        rows.append(
            {
                "model": name,
                "width": width,
                "parameters": sum(p.numel() for p in small.parameters()),
                "step_ms": step_ms,
                "ratio": float(rows[0]["step_ms"]) / step_ms if rows else 1.0,
                "shrink_ms": median_ms(lambda mask=mask: shrink(dense, mask), seconds / 10),  # type: ignore[misc]
            }
        )
    return rows


def training_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        sgd.step()

    return step


def median_ms(work: Callable[[], object], seconds: float) -> float:
    """Median over as many calls as fit, three at least, after two unmeasured ones."""
    for _ in range(2):
        work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


if __name__ == "__main__":
    main()
