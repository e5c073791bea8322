"""Milliseconds a training step of a fully connected layer: masked dense against sparse products, on one thread.

A step is forward, backward and SGD as `clients.train` takes them. Times are of the thread's own processor, the least of
several: other work on the machine disturbs them little. `pack` is what a new mask costs once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from clients import sparse
from clients.descent import descent
from prfl.masks import Mask
from prfl.types import Work

LAYERS = {(784, 64): False, (784, 200): False, (3136, 512): True, (3136, 2048): True}  # whether something lies below
DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05, 0.01)
BATCHES = (20, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.15, help="measuring time per cell and way")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)

    print(
        f"{'layer':>11}{'batch':>7}{'density':>9}{'masked ms':>11}{'sparse ms':>11}{'ratio':>8}{'pack ms':>9}  switch"
    )
    rows = []
    for inputs, outputs in LAYERS:
        for batch in BATCHES:
            for density in DENSITIES:
                rows.append(r := measure(inputs, outputs, density, batch, args.seconds))
                cells = f"{batch:7}{density:9g}{r['masked_ms']:11.3f}{r['sparse_ms']:11.3f}{r['ratio']:7.2f}x"
                print(
                    f"{f'{inputs}x{outputs}':>11}{cells}{r['pack_ms']:9.1f}  {'on' if r['on'] else 'off'}", flush=True
                )
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


def measure(inputs: int, outputs: int, density: float, batch: int, seconds: float) -> dict[str, float]:
    """One cell; `ratio` is how many times faster sparse is."""
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    mask = Mask({"weight": torch.rand(outputs, inputs, generator=draw) < density})
    layer.weight.data *= mask.bits["weight"]
    x = torch.randn(batch, inputs, generator=draw).requires_grad_(LAYERS[inputs, outputs])
    slope = torch.randn(batch, outputs, generator=draw)
    masked_ms = least_ms(step(layer, x, slope, mask.bits["weight"].float()), seconds)
    at, shape = mask.bits["weight"].flatten().nonzero().flatten(), (outputs, inputs)
    with sparse.packed(layer, mask, {"weight": sparse.Pack.of(at, shape)}):
        sparse_ms = least_ms(step(layer, x, slope, None), seconds)
    return {
        "inputs": inputs,
        "outputs": outputs,
        "batch": batch,
        "density": density,
        "masked_ms": masked_ms,
        "sparse_ms": sparse_ms,
        "ratio": masked_ms / sparse_ms,
        "pack_ms": least_ms(lambda: sparse.Pack.of(at, shape), seconds / 10),
        "on": sparse.worth(outputs, inputs, density, batch),
    }


def step(layer: nn.Linear, x: Tensor, slope: Tensor, mask: Tensor | None) -> Callable[[], None]:
    weights = [p.data for p in layer.parameters()]
    descend = descent(Work(lr=1e-9), weights, [mask, None])

    def work() -> None:
        x.grad = None
        torch.autograd.backward(layer(x), slope)
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        layer.zero_grad()
        descend(gradients)

    return work


def least_ms(work: Callable[[], object], seconds: float) -> float:
    """Of as many calls as fit, three at least, after two unmeasured ones."""
    for _ in range(2):
        work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 1000 * seconds:
        start = time.thread_time()
        work()
        times.append((time.thread_time() - start) * 1000)
    return min(times)


if __name__ == "__main__":
    main()
