"""The networks that ordered dropout trains inside a client's own: narrower, on slices of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from clients.shrink import shrink
from clients.statistics import needs_dense
from prfl.masks import Mask
from prfl.types import Task
from prfl.widths import ladder, leading

Forward = Callable[[Tensor], Tensor]


def drawn(task: Task, model: nn.Module, net: nn.Module, steps: int) -> Sequence[Forward | None]:
    """For each step the network of the width drawn for it, from inputs to logits; None for the client's own, `net`.

    Every width of `ladder` is as likely, the same in all layers, drawn anew for every mini-batch (as published).
    `model` is the full-sized skeleton. ValueError: a mask that names no channels or holds single weights.
    """
    work, mask = task.work, task.mask
    if not work.rungs:
        return [None] * steps
    if mask.bits or not mask.channels or needs_dense(work):
        raise ValueError("work: rungs need a mask that names its channels, no single weights, no report of all weights")
    narrower = [leading(mask, width, task.density) for width in ladder(task.density, work.rungs)[:-1]]
    choices = [*(_inside(net, shrink(model, small, task.params), mask, small) for small in narrower), None]
    draw = torch.Generator().manual_seed(task.seed + 1)
    return [choices[i] for i in torch.randint(len(choices), (steps,), generator=draw).tolist()]


def _inside(net: nn.Module, small: nn.Module, mask: Mask, narrow: Mask) -> Forward:
    """`small` on slices of the weights of `net`; gradients reach those."""
    for module in small.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False  # statistics of a width are those of its batch
    small.train()
    weights = dict(net.named_parameters())
    places = {k: {axis: at.to(w.device) for axis, at in _places(mask, narrow, k).items()} for k, w in weights.items()}

    def forward(x: Tensor) -> Tensor:
        out: Tensor = functional_call(small, {k: _sliced(w, places[k]) for k, w in weights.items()}, (x,))
        return out

    return forward


def _places(mask: Mask, narrow: Mask, entry: str) -> Mapping[int, Tensor]:
    """By axis, where the channels of the narrow mask lie among those of the other."""
    own, few = mask.sides(entry), narrow.sides(entry)
    return {axis: torch.searchsorted(own[axis], at) for axis, at in few.items() if len(at) < len(own[axis])}


def _sliced(weight: Tensor, places: Mapping[int, Tensor]) -> Tensor:
    for axis, at in places.items():
        weight = weight.index_select(axis, at)
    return weight
