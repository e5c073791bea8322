"""A client's own pruning for good: a step at a time, while the masks still move and the pruned model is accurate.

Sub-FedAvg, unstructured and hybrid; its reference code takes the client's test data where this takes held-out ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prfl.cut import NOISE
from prfl.evaluate import evaluate
from prfl.masks import Mask, prunable
from prfl.samples import Samples, stratified
from prfl.types import Group, Task, Tree, Update, Work

STEP = 0.05  # share of the kept weights that the last step before the target may take (as published)


def apart(task: Task, samples: Samples) -> tuple[Samples, Samples]:
    """What the client trains on, and its held-out share: the same in every task. Both are all without `holdout`."""
    if not task.work.holdout:
        return samples, samples
    rest, held = stratified(samples.y, task.work.holdout, task.client)
    return samples.subset(rest), samples.subset(held)


def turn(work: Work, samples: int, steps: int) -> int:
    """The last step of the first pass, or the first step where there is no second pass (ours); 0: no pruning."""
    one = -(-samples // work.batch) if work.steps else steps // work.epochs
    return (one if one < steps else 1) if work.prune or work.prune_channels else 0


def pruned(update: Update, task: Task, model: nn.Module, held: Samples, first: Tree) -> Update:
    """The update with what the client's next mask keeps, and the metric `held_out`: its accuracy with that mask.

    first: local values after the first pass, 1-D in mask order. `prune` alone takes single weights of every layer; with
    `prune_channels` it takes those of fully connected layers, and of groups that have a BatchNorm whole channels.
    Either is done when its gates are passed: distance, target, accuracy on `held`. Where `held` is empty, as nothing of
    a few samples is held out, nothing is pruned and no accuracy told.
    """
    old, zeros = task.mask, {k: torch.zeros_like(v) for k, v in task.params.items()}
    values = {k: old.gather(k, task.params[k]) + d for k, d in update.delta.items()}
    early, late = ({k: old.scatter(k, v, zeros[k]) for k, v in tree.items()} for tree in (first, values))

    if not len(held):
        return update

    def accuracy(mask: Mask) -> float:
        return evaluate(mask.apply(late), model, held)["accuracy"]

    mask, score = old, accuracy(old)
    for step in (_weights, _channels):
        candidate = step(task.work, mask, early, late)
        if candidate is not None and (found := accuracy(candidate)) > task.work.prune_accuracy:
            mask, score = candidate, found

    def kept(tree: Tree) -> Tree:
        return {k: mask.gather(k, old.scatter(k, v, zeros[k])) for k, v in tree.items()}

    whole = update.signal is None or task.work.scope == "all"
    signal = update.signal if whole else kept(update.signal or {})
    metrics = {**update.metrics, "held_out": score}
    return replace(update, mask=mask, delta=kept(update.delta), signal=signal, metrics=metrics)


def _weights(work: Work, mask: Mask, early: Tree, late: Tree) -> Mask | None:
    """The mask without the least weights of each layer, None where its own gates are shut."""
    layers = [k for k, v in late.items() if prunable(v) and (v.dim() == 2 or not work.prune_channels)]
    alive = {k: mask.where(k, late[k].shape) for k in layers}
    kept = sum(int(v.sum()) for v in alive.values()) / max(1, sum(v.numel() for v in alive.values()))
    if not work.prune or not layers or kept <= work.prune_to + NOISE:
        return None
    rate = work.prune if kept - work.prune_to >= work.prune else min(STEP, (kept - work.prune_to) / kept)
    one, other = (_smaller(alive, tree, work.prune) for tree in (early, late))
    if _distance(one, other) <= work.prune_apart:
        return None
    return Mask({**mask.bits, **(other if rate == work.prune else _smaller(alive, late, rate))}, mask.channels)


def _channels(work: Work, mask: Mask, early: Tree, late: Tree) -> Mask | None:
    """The mask without the channels of least |scale|, None where its own gates are shut."""
    groups = {g: g.scale for g in mask.channels if g.scale}
    if not work.prune_channels or not groups:
        return None

    def candidate(tree: Tree) -> dict[Group, Tensor]:
        return {g: _leave(work, g, mask.channels[g], tree[k].abs()) for g, k in groups.items()}

    one, other = candidate(early), candidate(late)
    marks = [{g: _marks(g, kept[g]) for g in groups} for kept in (one, other)]
    if _distance(*marks) <= work.channels_apart:
        return None
    channels = {**mask.channels, **other}
    narrow = Mask(channels=channels)
    return Mask({k: bits & narrow.where(k, bits.shape) for k, bits in mask.bits.items()}, channels)


def _smaller(alive: Mapping[str, Tensor], tree: Tree, rate: float) -> dict[str, Tensor]:
    """What is left of each layer's living weights without those below the `rate` quantile of their |w|."""
    out = {}
    for k, bits in alive.items():
        size = tree[k].abs()
        least = float(np.quantile(size[bits].numpy(), rate)) if bool(bits.any()) else 0.0
        out[k] = bits & (size >= least)
    return out


def _leave(work: Work, group: Group, kept: Tensor, scale: Tensor) -> Tensor:
    """The kept channels above the quantile of the scales, and never fewer than `channels_to` of the group."""
    scales = scale[kept]
    above = int((scales > float(np.quantile(scales.numpy(), work.prune_channels))).sum())
    count = min(len(kept), max(1, above, ceil(work.channels_to * group.size - NOISE)))
    best = scales.argsort(descending=True, stable=True)[:count]
    return kept[best.sort().values]


def _marks(group: Group, kept: Tensor) -> Tensor:
    return torch.zeros(group.size, dtype=torch.bool).index_fill_(0, kept, True)


def _distance(a: Mapping[Any, Tensor], b: Mapping[Any, Tensor]) -> float:
    """The mean over layers of the share of places that differ."""
    return sum(float((a[k] ^ b[k]).float().mean()) for k in a) / len(a)
