"""Which weights to hold so that the risk falls fastest per second (PruneFL, Jiang et al. 2022, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor

from prfl.cut import NOISE
from prfl.masks import Mask, prunable
from prfl.types import Tree


class Choice(NamedTuple):
    """The mask as scores and a share: a ranking by `scores` over the whole model, cut at `share`, is that mask."""

    scores: Tree
    share: float


def reconfigured(
    params: Tree,
    mask: Mask,
    g2: Tree,
    seconds: Mapping[str, float],
    constant: float,
    part: float,
    densest: float = 1.0,
) -> Choice:
    """The mask M that maximises Gamma(M) = sum of g^2 in M / (constant + sum of t in M), among those within reach.

    params: values of the held weights. g2: the squared gradients of all weights, held or not. seconds[entry]: t, the
    time that one kept weight takes a round, above 0. In reach: of every layer the held weights but the `part` of them
    with least |w| are kept; these and all that are not held may be chosen. Entries of one axis are never cut: they add
    to the sum of g^2 and take no time. densest: no more of the prunable weights is chosen than this share. ValueError:
    an entry without a time.
    """
    names = [k for k, v in params.items() if prunable(v)]
    if missing := [k for k in names if not seconds.get(k, 0) > 0]:
        raise ValueError(f"reconfiguration: a weight of {missing[0]} has no time; have {', '.join(seconds) or 'none'}")
    sure = {k: _sure(params[k], mask.where(k, params[k].shape), part) for k in names}
    gain = sum(float(v.double().sum()) for k, v in g2.items() if k not in sure)
    gain += sum(float(g2[k][kept].double().sum()) for k, kept in sure.items())
    time = constant + sum(seconds[k] * int(kept.sum()) for k, kept in sure.items())
    ratio = {k: g2[k] / seconds[k] for k in names}
    free_g2 = torch.cat([g2[k][~kept] for k, kept in sure.items()])
    free_t = torch.cat([torch.full((int((~kept).sum()),), seconds[k]) for k, kept in sure.items()])
    size, held = sum(v.numel() for v in sure.values()), sum(int(v.sum()) for v in sure.values())
    room = max(0, floor(densest * size + NOISE) - held)
    taken = min(room, gainful(free_g2, free_t, gain, time))
    top = max((float(v.max()) for v in ratio.values()), default=0.0) or 1.0
    return Choice({k: v / top + 2.0 * sure[k] for k, v in ratio.items()}, (held + taken) / size)


def gainful(g2: Tensor, seconds: Tensor, gain: float, time: float) -> int:
    """How many to add, those of the largest g^2 / t first: while it is at least the ratio so far, (gain) / (time).

    That is the best of all subsets: adding one raises the ratio exactly when its own lies above it.
    """
    order = (g2 / seconds).argsort(descending=True, stable=True)
    gains, times = g2[order].double(), seconds[order].double()
    before_gain, before_time = gain + gains.cumsum(0) - gains, time + times.cumsum(0) - times
    worth = gains * before_time >= before_gain * times
    return int(worth.long().cumprod(0).sum())


def _sure(values: Tensor, held: Tensor, part: float) -> Tensor:
    """The held weights without `part` of them, those of least |w|; among equals the first stay."""
    count = int(held.sum())
    order = values.abs().masked_fill(~held, -1.0).flatten().argsort(descending=True, stable=True)
    marks = torch.zeros(held.numel(), dtype=torch.bool)
    return marks.index_fill_(0, order[: count - floor(part * count + NOISE)], True).view(held.shape)
