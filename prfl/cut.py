"""From scores to masks: a ranking says in which order units are given out, a cut how many a density gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from prfl.masks import Mask, prunable
from prfl.types import Group, Tree


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m neighbours along the last axis (N:M sparsity), as booleans."""
    if scores.shape[-1] % m:
        raise ValueError(f"N:M needs a last axis divisible by {m}, got shape {tuple(scores.shape)}")
    blocks = scores.reshape(-1, m)
    best = blocks.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros(blocks.shape, dtype=torch.bool).scatter_(1, best, True).view(scores.shape)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Units in the order they are given out; the mask of every density is a prefix of it, hence masks are nested.

    A pool of units is a layer, a group or (spread "model") the whole model; its core comes first in the order.
    """

    cut: Cut
    params: Tree = field(repr=False)
    scores: Tree = field(repr=False)
    groups: tuple[Group, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)
    _cuts: dict[float, Mask] = field(default_factory=dict, repr=False)  # masks already cut from this ranking

    def mask(self, share: float) -> Mask:
        """The mask of this share, in (0, 1]; the same object every time."""
        if not 0 < share <= 1:
            raise ValueError(f"density must be in (0, 1], got {share:g}")
        if share not in self._cuts:
            make = self._channels if self.cut.unit == "channels" else self._weights
            self._cuts[share] = Mask(ranking=self) if share == 1 else make(share)
        return self._cuts[share]

    @cached_property
    def _names(self) -> list[str]:
        return [k for k, v in self.params.items() if prunable(v) and not any(s in k for s in self.cut.skip)]

    @cached_property
    def _orders(self) -> dict[str, tuple[Tensor, int]]:
        """Per pool its units from first to last, and how many of them are the core."""
        pools = {k: self.scores[k].flatten() / self.costs.get(k, 1.0) for k in self._names}
        cores = {k: self._core(k) for k in self._names}
        if self.cut.spread == "model":
            pools, cores = {"": torch.cat(list(pools.values()))}, {"": torch.cat(list(cores.values()))}
        return {k: (_order(pools[k], cores[k]), int(cores[k].sum())) for k in pools}

    def _core(self, name: str) -> Tensor:
        by = self.params[name].abs() if self.cut.core == "magnitude" else self.scores[name]
        core = torch.zeros(by.numel(), dtype=torch.bool)
        core[by.flatten().argsort(descending=True, stable=True)[: ceil(self.cut.floor * by.numel())]] = True
        return core

    def _weights(self, share: float) -> Mask:
        sizes = {k: self.params[k].numel() for k in self._names}
        if self.cut.spread == "model":
            order, core = self._orders[""]
            keep = max(core, int(share * len(order) + 1e-9), 1)
            flat = torch.zeros(len(order), dtype=torch.bool)
            flat[order[:keep]] = True
            parts = dict(zip(sizes, torch.split(flat, list(sizes.values())), strict=True))
        else:
            layers = {k: self.params[k] for k in sizes}
            shares = erk(layers, share) if self.cut.spread == "erk" else dict.fromkeys(sizes, share)
            parts = {}
            for k, size in sizes.items():
                order, core = self._orders[k]
                parts[k] = torch.zeros(size, dtype=torch.bool)
                parts[k][order[: max(core, round(shares[k] * size), 1)]] = True
        return Mask(
            {k: part.view(self.params[k].shape) for k, part in parts.items() if not bool(part.all())}, ranking=self
        )

    @cached_property
    def _channel_orders(self) -> dict[Group, Tensor]:
        return {g: _channel_scores(g, self.scores).argsort(descending=True, stable=True) for g in self.groups}

    def _channels(self, share: float) -> Mask:
        width = share**0.5 if self.cut.width == "sqrt" else share
        least = max(width, self.cut.floor)
        kept = {g: order[: ceil(least * g.size - 1e-9)] for g, order in self._channel_orders.items()}
        return Mask(channels={g: at.sort().values for g, at in kept.items()}, ranking=self)


@dataclass(frozen=True)
class Cut:
    """How scores become masks.

    unit: single weights, or channels of coupled groups. spread: the same share in every layer, Erdos-Renyi-Kernel
    shares, or one pool over the model. floor: the share that every layer keeps whatever its scores, chosen by `core`.
    width (channels only): a share is a share of the channels ("linear", HeteroFL) or of the weights ("sqrt").
    skip: parts of entry names that are never cut.
    """

    unit: Literal["weights", "channels"] = "weights"
    spread: Literal["layer", "erk", "model"] = "layer"
    floor: float = 0.0
    core: Literal["score", "magnitude"] = "score"
    width: Literal["linear", "sqrt"] = "sqrt"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"cut: floor must be in [0, 1], got {self.floor:g}")
        if self.unit == "channels" and self.spread != "layer":
            raise ValueError(f"cut: channels are spread by layer, not {self.spread!r}")

    def rank(
        self, scores: Tree, params: Tree, groups: tuple[Group, ...] = (), costs: Mapping[str, float] | None = None
    ) -> Ranking:
        """Scores, larger kept longer, divided by `costs` per weight where given, as a ranking to cut from."""
        if self.unit == "channels" and not groups:
            raise ValueError("cut: unit 'channels' needs a model with channel groups, this one has none")
        return Ranking(self, params, scores, groups, costs or {})


def erk(params: Tree, share: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel shares (RigL, Evci et al. 2020): they go with sum(shape) / prod(shape), capped at 1."""
    free, fixed = dict(params), 0
    budget = share * sum(v.numel() for v in params.values())
    while True:
        weight = {k: sum(v.shape) for k, v in free.items()}
        scale = (budget - fixed) / max(1, sum(weight.values()))
        over = [k for k, v in free.items() if scale * weight[k] > v.numel()]
        if not over:
            return {k: min(1.0, scale * weight[k] / v.numel()) if k in free else 1.0 for k, v in params.items()}
        fixed += sum(free.pop(k).numel() for k in over)


def _order(scores: Tensor, core: Tensor) -> Tensor:
    """Core units first, then by falling score; ties keep their place."""
    by_score = scores.argsort(descending=True, stable=True)
    return by_score[(~core[by_score]).to(torch.uint8).argsort(stable=True)]


def _channel_scores(group: Group, scores: Tree) -> Tensor:
    """A channel's score: the sum over all weights of all members."""
    total = torch.zeros(group.size)
    for m in group.members:
        if m.entry in scores and prunable(scores[m.entry]):
            other = [a for a in range(scores[m.entry].dim()) if a != m.axis]
            side = scores[m.entry].sum(dim=other)[m.offset : m.offset + group.size * m.repeat]
            total += side.view(group.size, m.repeat).sum(dim=1)
    return total
