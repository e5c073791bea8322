"""Milliseconds of a convolution, forward and both gradients: the library's against frequencies, on one thread.

Both sides in turns, memory held as in a worker; medians, and of the ratio too. `fewer`: how many times fewer products.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clients import memory, spectral


@dataclass(frozen=True)
class Layer:
    """A square kernel on square images."""

    batch: int
    inputs: int
    outputs: int
    size: int
    taps: int
    padding: int


LAYERS = (
    Layer(20, 32, 64, 14, 5, 2),  # Conv2's second
    *(Layer(batch, 32, 64, 14, 5, 2) for batch in (5, 10, 64)),
    *(Layer(20, c, 2 * c, 14, 5, 2) for c in (8, 16, 17, 24, 25)),  # the same, cut
    *(Layer(20, 32, 64, size, 5, 2) for size in (4, 6, 7)),
    Layer(20, 128, 128, 7, 5, 2),
    Layer(20, 32, 64, 28, 5, 2),
    Layer(20, 32, 64, 12, 5, 0),
    Layer(20, 1, 32, 28, 5, 2),  # Conv2's first
    Layer(20, 16, 32, 14, 7, 3),
    Layer(20, 64, 64, 32, 3, 1),
    Layer(20, 256, 256, 8, 3, 1),
    Layer(64, 256, 256, 8, 3, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory.hold()
    print(f"{'layer':>28}{'library':>9}{'ours':>8}{'ratio':>7}{'fewer':>7}  switch")
    rows = []
    for layer in LAYERS:
        rows.append(r := asdict(layer) | measure(layer, args.repeats))
        name = f"{layer.batch} x {layer.inputs} -> {layer.outputs}, {layer.size}, {layer.taps}x{layer.taps}"
        cells = f"{r['library_ms']:9.2f}{r['ours_ms']:8.2f}{r['ratio']:7.2f}{r['fewer']:7.2f}"
        print(f"{name:>28}{cells}  {'on' if r['on'] else 'off'}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


def measure(layer: Layer, repeats: int) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    shape = (layer.batch, layer.inputs, layer.size, layer.size)
    x = torch.randn(shape, generator=draw).to(memory_format=torch.channels_last).requires_grad_()
    kernel = torch.randn(layer.outputs, layer.inputs, layer.taps, layer.taps, generator=draw)
    kernel = kernel.to(memory_format=torch.channels_last).requires_grad_()
    padding = (layer.padding, layer.padding)
    sides: list[Callable[[], Tensor]] = [
        lambda: F.conv2d(x, kernel, padding=padding),
        lambda: spectral.correlated(x, kernel, padding),
    ]
    slope = torch.randn_like(sides[0]().detach())
    pairs = [[timed(side, [x, kernel], slope) for side in sides] for _ in range(2 + repeats)][2:]
    library, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    plain, fewer = spectral.products(x.shape, kernel.shape, padding)
    return {
        "library_ms": library,
        "ours_ms": ours,
        "ratio": statistics.median(a / b for a, b in pairs),
        "fewer": plain / fewer,
        "on": spectral.worth(x.shape, kernel.shape, padding),
    }


def timed(side: Callable[[], Tensor], inputs: list[Tensor], slope: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(side(), inputs, slope)
    return (time.perf_counter() - start) * 1000


if __name__ == "__main__":
    main()
