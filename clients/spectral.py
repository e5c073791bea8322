"""Convolutions by the discrete Fourier transform, where kernels and channels are large: fewer multiplications.

After Mathieu, Henaff and LeCun, "Fast training of convolutional networks through FFTs" (2014). Transforms as products
with small matrices, three real products for a complex one, and one row frequency after the other are *ours*.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from clients.accelerator import measured


class Bilinear(NamedTuple):
    """A correlation along one axis as products of sums: `output @ ((input @ x) * (kernel @ w))`."""

    input: Tensor
    kernel: Tensor
    output: Tensor


@cache
def down(size: int, taps: int, padding: int) -> Bilinear:
    """The first axis: the lower R frequencies of real values, of each a row of real and a row of imaginary parts.

    What `across` makes of them is complex still. Shapes: (2R, size), (2R, taps), (outputs, 2R).
    """
    length = size + padding  # what wraps around meets zeros
    low = length // 2 + 1
    once = torch.arange(low).mul_(2).remainder_(length) == 0  # the others stand for their conjugates too
    ins, taken, outs = _places(size, taps, padding)
    back = _waves(length, low, -outs) * torch.where(once, 1, 2)[:, None] / length
    there, kernel = (torch.view_as_real(_waves(length, low, at)).transpose(1, 2).flatten(0, 1) for at in (-ins, taken))
    return Bilinear(there.float(), kernel.float(), torch.view_as_real(back).transpose(0, 1).flatten(1).float())


@cache
def across(size: int, taps: int, padding: int) -> Bilinear:
    """The second axis, of complex values: real parts, then imaginary ones; three products a frequency (Karatsuba).

    Shapes, of `length` frequencies: (3 length, 2 size), (3 length, 2 taps), (2 outputs, 3 length).
    """
    length = size + padding
    ins, taken, outs = _places(size, taps, padding)
    halves = (_planar(_waves(length, length, at)).chunk(2) for at in (-ins, taken))
    there, kernel = (torch.cat([real, imaginary, real + imaginary]).float() for real, imaginary in halves)
    real, imaginary = _planar(_waves(length, length, outs).T / length).chunk(2, dim=1)
    return Bilinear(there, kernel, torch.cat([real - imaginary, -real - imaginary, imaginary], dim=1).float())


def _places(size: int, taps: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where inputs, taps and outputs lie along an axis."""
    return torch.arange(size), torch.arange(-padding, taps - padding), torch.arange(size + 2 * padding - taps + 1)


def _waves(length: int, frequencies: int, places: Tensor) -> Tensor:
    """exp(2 pi i u t / length) of frequencies u at places t: (frequencies, places), complex128."""
    turns = torch.outer(torch.arange(frequencies), places) % length
    return torch.polar(torch.ones(turns.shape, dtype=torch.float64), turns.double() * (2 * torch.pi / length))


def _planar(matrix: Tensor) -> Tensor:
    """A complex matrix as a real one, of real parts followed by imaginary ones."""
    return torch.cat([torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)])


@contextmanager
def lent(net: nn.Module, device: torch.device) -> Iterator[None]:
    """While it lasts, the network's convolutions go by frequencies where that is quicker.

    That was measured on processors with AVX2 and without AVX-512: all others, and GPUs, are left to torch.
    """
    able = measured(device) and torch.backends.cpu.get_cpu_capability() == "AVX2"
    layers = [m for m in net.modules() if able and type(m) is nn.Conv2d and _plain(m)]
    try:
        for layer in layers:
            vars(layer)["forward"] = partial(_forward, layer)
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def worth(images: torch.Size, kernels: torch.Size, padding: tuple[int, int]) -> bool:
    """Whether frequencies are quicker, as `bench/spectral.py` found.

    Kernels of 5x5 or more (of 3x3 they are slower at the batches that clients train on), 40 million multiplications,
    and 2.35 times as many as ours. images: (B, C, H, W); kernels: (O, C, h, w).
    """
    if prod(kernels[2:]) < 25:
        return False
    plain, ours = products(images, kernels, padding)
    return plain >= 40_000_000 and plain >= 2.35 * ours


@cache
def products(images: torch.Size, kernels: torch.Size, padding: tuple[int, int]) -> tuple[int, int]:
    """Multiplications of a plain convolution, forward, and of ours."""
    (batch, inputs, height, width), (outputs, _, *taps) = images, kernels
    rows, columns = down(height, taps[0], padding[0]), across(width, taps[1], padding[1])
    low, beside = len(rows.input) // 2, (width, taps[1], len(columns.output) // 2)
    each = batch * inputs, inputs * outputs, batch * outputs
    ours = low * len(columns.input) * batch * inputs * outputs
    for row, column, w, n in zip(rows, columns, beside, each, strict=True):
        ours += (row.numel() * w + low * column.numel()) * n
    return len(rows.output) * beside[2] * prod(kernels) * batch, ours


def correlated(x: Tensor, kernel: Tensor, padding: tuple[int, int]) -> Tensor:
    """What torch's `conv2d` makes of float32 images (B, C, H, W) and kernels (O, C, h, w): (B, O, H', W')."""
    out: Tensor = _Correlation.apply(x, kernel, padding)
    return out


def _plain(layer: nn.Conv2d) -> bool:
    """Whether a layer is a correlation of all channels, with zeros around the image."""
    moves = {*layer.stride, *layer.dilation, layer.groups}
    return moves == {1} and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
    padding = (int(layer.padding[0]), int(layer.padding[1]))
    if x.dim() != 4 or x.dtype != torch.float32 or not worth(x.shape, layer.weight.shape, padding):
        return cast(Tensor, layer._conv_forward(x, layer.weight, layer.bias))
    out = correlated(x, layer.weight, padding)
    return out if layer.bias is None else out + layer.bias[:, None, None]


def _room(like: Tensor, columns: Bilinear, batch: int, inputs: int, outputs: int) -> list[tuple[Tensor, Tensor]]:
    """For spectra of images, kernels and results: a matrix a frequency, and the same with a row a frequency."""
    sides = ((batch, inputs), (inputs, outputs), (batch, outputs))
    places = [like.new_empty(len(columns.input), *side) for side in sides]
    return [(place, place.flatten(1)) for place in places]


class _Correlation(torch.autograd.Function):
    """One row frequency at a time, in places that stay in the processor's cache; made anew for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        (batch, inputs, height, width), (outputs, _, *taps) = x.shape, weight.shape
        rows, columns = down(height, taps[0], padding[0]), across(width, taps[1], padding[1])
        xs = (rows.input @ x.permute(2, 3, 0, 1).flatten(1)).view(-1, 2 * width, batch * inputs)
        ws = (rows.kernel @ weight.permute(2, 3, 1, 0).flatten(1)).view(-1, 2 * taps[1], inputs * outputs)
        ys = x.new_empty(len(xs), len(columns.output), batch * outputs)
        (a, a_), (b, b_), (c, c_) = _room(x, columns, batch, inputs, outputs)
        for u, v, y in zip(xs, ws, ys, strict=True):
            torch.mm(columns.input, u, out=a_)
            torch.mm(columns.kernel, v, out=b_)
            torch.bmm(a, b, out=c)
            torch.mm(columns.output, c_, out=y)
        ctx.save_for_backward(xs, ws)
        ctx.rows, ctx.columns = rows, columns
        ctx.shape, ctx.taps = x.shape, taps
        out = (rows.output @ ys.view(2 * len(ys), -1)).view(len(rows.output), -1, batch, outputs)
        return out.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (xs, ws), rows, columns = ctx.saved_tensors, ctx.rows, ctx.columns
        (batch, inputs, *size), outputs, taps = ctx.shape, slope.shape[1], ctx.taps
        ys = (rows.output.T @ slope.permute(2, 3, 0, 1).flatten(1)).view(len(xs), -1, batch * outputs)
        to_x, to_w = torch.empty_like(xs), torch.empty_like(ws)
        (a, a_), (b, b_), (c, c_) = _room(slope, columns, batch, inputs, outputs)
        db = torch.empty_like(b)
        to_input, to_kernel, to_spectrum = (matrix.T for matrix in columns)
        a_t, b_t, db_ = a.mT, b.mT, db.flatten(1)
        for u, v, y, du, dv in zip(xs, ws, ys, to_x, to_w, strict=True):
            torch.mm(columns.input, u, out=a_)
            torch.mm(columns.kernel, v, out=b_)
            torch.mm(to_spectrum, y, out=c_)
            torch.bmm(a_t, c, out=db)
            torch.mm(to_kernel, db_, out=dv)
            torch.bmm(c, b_t, out=a)  # whose spectrum has served
            torch.mm(to_input, a_, out=du)
        dx = (rows.input.T @ to_x.view(2 * len(xs), -1)).view(*size, batch, inputs).permute(2, 3, 0, 1)
        dw = (rows.kernel.T @ to_w.view(2 * len(ws), -1)).view(*taps, inputs, outputs).permute(3, 2, 0, 1)
        last = torch.channels_last
        return dx.contiguous(memory_format=last), dw.contiguous(memory_format=last), None
