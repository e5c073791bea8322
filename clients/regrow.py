"""A mask that moves while a client trains: the least weights give way to those with the largest gradient (FedDST)."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from prfl.masks import Mask
from prfl.types import Task, Tree


def turn(task: Task, steps: int) -> int:
    """The step before whose update the mask moves, by the gradient of that step; 0: never. ValueError: channels.

    As published the gradient is that of one batch more.
    """
    if task.work.regrow and task.mask.channels:
        raise ValueError("work: regrow needs a mask of single weights")
    return max(1, ceil(task.work.regrow_at * steps)) if task.work.regrow else 0


def regrown(held: Mask, weights: Tree, gradients: Tree, share: float) -> tuple[Mask, Tree]:
    """As many weights as before in every entry with bits, all others as they are; and which of them stayed, by entry.

    First `share` of an entry's kept weights goes, the least |w|; then as many come, the largest |g| of what is not kept
    then, which may be one that has just gone (as published: FedDST). Equals in row-major order. What comes is to begin
    at zero.
    """
    bits, stayed = dict(held.bits), {}
    for k in bits.keys() & weights.keys():
        kept = bits[k].flatten()
        count = int(kept.sum())
        stay = _largest(weights[k].abs(), kept, count - round(share * count))
        bits[k] = (stay | _largest(gradients[k].abs(), ~stay, count - int(stay.sum()))).view(bits[k].shape)
        stayed[k] = stay.view(bits[k].shape)
    return Mask(bits), stayed


def _largest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` largest scores among the places marked, as marks."""
    order = scores.flatten().masked_fill(~among, -1.0).argsort(descending=True, stable=True)
    return torch.zeros_like(among).index_fill_(0, order[:count], True)
