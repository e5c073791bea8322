"""From scores to masks: a ranking says in which order units are given out, a cut how many a share gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil, floor, inf
from typing import Any, Literal
from weakref import ref

import torch
from torch import Tensor

from prfl.checks import choice
from prfl.masks import Mask, prunable
from prfl.types import Group, Tree

Places = Mapping[Any, Tensor]
"""By entry or group: how many units of the same pool are given out before each unit; int32."""

NOISE = 1e-6  # of a unit: what floating point may add to a count before it is rounded


@dataclass(frozen=True, eq=False)
class Ranking:
    """Units in the order in which they are given out; the mask of a share is a prefix of it, so masks are nested.

    Units are ordered within a pool: a layer, a group or (spread "model") all layers together. The core comes first,
    then units by falling score, equals in row-major order.
    """

    cut: Cut
    _order: list[Callable[[], Places]] = field(repr=False)  # forgotten once called: it holds a model and its scores
    _cuts: dict[float | tuple[bool, ...], Mask] = field(default_factory=dict, init=False, repr=False)

    def mask(self, share: float) -> Mask:
        """The mask of this share, in (0, 1]; the same object every time. `Cut` says what it is a share of."""
        if not 0 < share <= 1:
            raise ValueError(f"density must be in (0, 1], got {share:g}")
        if share not in self._cuts:
            make = self._channels if self.cut.unit == "channels" else self._weights
            named = self.cut.named and self.cut.unit == "channels"
            self._cuts[share] = Mask(origin=ref(self)) if share == 1 and not named else make(share)
        return self._cuts[share]

    @cached_property
    def places(self) -> Places:
        """What `Places` says, of every entry or group."""
        places = self._order[0]()
        self._order.clear()
        return places

    def regions(self, kept: tuple[bool, ...]) -> Mask:
        """The mask of some of as many equal regions of every pool, best first, and of every pool's best unit.

        The same object every time. These masks are not nested, so they do not know their ranking.
        """
        if kept not in self._cuts:
            keep, pools = torch.tensor(kept), {k: place.numel() for k, place in self.places.items()}
            if self.cut.spread == "model":
                pools = dict.fromkeys(pools, sum(pools.values()))
            held = {k: keep[place.long() * len(kept) // pools[k]] | (place == 0) for k, place in self.places.items()}
            if self.cut.unit == "channels":
                skipped = {g for g in held if any(self.cut.skips(m.entry) for m in g.members)}
                channels = {g: (h | (g in skipped)).nonzero().flatten() for g, h in held.items()}
                self._cuts[kept] = Mask(channels=channels)
            else:
                self._cuts[kept] = Mask({k: h for k, h in held.items() if not bool(h.all())})
        return self._cuts[kept]

    def _weights(self, share: float) -> Mask:
        sizes = {k: place.numel() for k, place in self.places.items()}
        keep = {k: self.cut.core_of(n) for k, n in sizes.items()}
        if self.cut.spread == "model":
            keep = dict.fromkeys(sizes, max(sum(keep.values()), floor(share * sum(sizes.values()) + NOISE)))
        else:
            shares = erk(self.places, share) if self.cut.spread == "erk" else dict.fromkeys(sizes, share)
            keep = {k: max(keep[k], round(shares[k] * n)) for k, n in sizes.items()}
        bits = {k: place < keep[k] for k, place in self.places.items()}
        return Mask({k: kept for k, kept in bits.items() if not bool(kept.all())}, origin=ref(self))

    def _channels(self, share: float) -> Mask:
        width = share**0.5 if self.cut.width == "sqrt" else share
        sizes = {group: group.size for group in self.places}
        cores = {group: self.cut.core_of(size) for group, size in sizes.items()}
        if self.cut.spread == "model":
            sizes, cores = (dict.fromkeys(of, sum(of.values())) for of in (sizes, cores))
        channels = {}
        for group, place in self.places.items():
            keep = self.cut.rounded(ceil(width * sizes[group] - NOISE), cores[group])
            whole = any(self.cut.skips(m.entry) for m in group.members)
            channels[group] = (place < (place.max() + 1 if whole else keep)).nonzero().flatten()
        return Mask(channels=channels, origin=ref(self))


@dataclass(frozen=True)
class Cut:
    """How scores become masks.

    unit: single weights, or channels of coupled groups. spread: what a share of the weights is a share of: of every
    layer ("layer"), of the model with Erdos-Renyi-Kernel shares of its layers ("erk"), or of the model with the weights
    of all layers in one order ("model"). width: what a share of the channels is a share of: of every group's channels,
    rounded up ("linear", HeteroFL), or of the weights, by its root of the channels ("sqrt", FedGMR's baselines); the
    model's input and output stay whole. Channels with spread "model": of all groups' channels, in one order (GDP, Lin
    et al. 2018). by: what a channel's score sums up: the weights of all entries that are cut with it ("group"), or of
    the filters or neurons that make it ("filter", Li et al. 2017). floor: the share that every layer or group keeps at
    least, its core: the best by score or by magnitude; never less than one unit (ours). skip: parts of names of entries
    that are never cut. named: a mask of all channels names them too, for clients that cut it further by themselves.
    multiple: channels are kept in multiples of so many, the nearest, as processors work on 4, 8 or 16 at once (ours).

    PR-FL is `Cut(spread="model", floor=core, core="magnitude")`: the model's best by importance as published, the core
    and importance per cost (`costs` of `rank`) as in its released code. A share below the core's gets the core.
    """

    unit: Literal["weights", "channels"] = "weights"
    spread: Literal["layer", "erk", "model"] = "layer"
    floor: float = 0.0
    core: Literal["score", "magnitude"] = "score"
    width: Literal["linear", "sqrt"] = "sqrt"
    skip: tuple[str, ...] = ()
    by: Literal["group", "filter"] = "group"
    named: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        choice("cut", "unit", self.unit, ("weights", "channels"))
        choice("cut", "spread", self.spread, ("layer", "erk", "model"))
        choice("cut", "core", self.core, ("score", "magnitude"))
        choice("cut", "width", self.width, ("linear", "sqrt"))
        choice("cut", "by", self.by, ("group", "filter"))
        if not 0 <= self.floor <= 1:
            raise ValueError(f"cut: floor must be in [0, 1], got {self.floor:g}")
        if self.unit == "channels" and self.spread == "erk":
            raise ValueError("cut: channels are spread by layer or model, not 'erk'")
        if self.multiple < 1 or (self.multiple > 1 and (self.unit, self.spread) != ("channels", "layer")):
            got = f"{self.multiple} of {self.unit} by {self.spread}"
            raise ValueError(f"cut: multiples are above 0, and of channels by layer; got {got}")
        if isinstance(self.skip, str):
            raise ValueError(f"cut: skip must be a list of parts of names, got {self.skip!r}")

    def rank(
        self, scores: Tree, params: Tree, groups: tuple[Group, ...] = (), costs: Mapping[str, float] | None = None
    ) -> Ranking:
        """Scores, larger kept longer, finite, shaped like `params`, as a ranking to cut from; sorted at its first cut.

        costs: what one weight of each entry costs, above 0; scores of single weights are divided by it. ValueError: no
        groups, or a score or cost that is missing or out of range.
        """
        if self.unit == "channels" and not groups:
            raise ValueError("cut: unit 'channels' needs a model with channel groups, this one has none")
        if self.unit == "channels":
            return Ranking(self, [partial(_order_channels, self, scores, params, groups)])
        names = [k for k, v in params.items() if prunable(v) and v.numel() and not self.skips(k)]
        for k in names:
            if k not in scores or scores[k].shape != params[k].shape:
                got = tuple(scores[k].shape) if k in scores else "none"
                raise ValueError(f"cut: scores of {k} must have shape {tuple(params[k].shape)}, got {got}")
            if costs and not 0 < costs.get(k, 0) < inf:
                raise ValueError(f"cut: the cost of {k} must be above 0, got {costs.get(k, 'none')}")
        return Ranking(self, [partial(_order_weights, self, scores, {k: params[k] for k in names}, costs or {})])

    def skips(self, entry: str) -> bool:
        """Whether an entry is never cut."""
        return any(part in entry for part in self.skip)

    def rounded(self, keep: int, core: int) -> int:
        """The multiple nearest to `keep` channels, half of one up, that holds the core."""
        return max(-(-core // self.multiple), (2 * keep + self.multiple) // (2 * self.multiple)) * self.multiple

    def core_of(self, size: int) -> int:
        """How many of a layer's weights or a group's channels are its core."""
        return min(size, max(1, ceil(self.floor * size - NOISE)))


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


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m neighbours along the last axis (N:M sparsity), as booleans; among equals the first."""
    if not 0 < n <= m:
        raise ValueError(f"N:M needs 0 < N <= M, got {n}:{m}")
    if not scores.dim() or scores.shape[-1] % m:
        raise ValueError(f"N:M needs a last axis divisible by {m}, got shape {tuple(scores.shape)}")
    blocks = scores.reshape(-1, m)
    best = blocks.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros(blocks.shape, dtype=torch.bool).scatter_(1, best, True).view(scores.shape)


def _order_weights(cut: Cut, scores: Tree, params: Tree, costs: Mapping[str, float]) -> Places:
    """Places in the shapes of `params`, counted in every entry or over all."""
    cheapest = min((costs[k] for k in params if costs), default=1.0)  # only ratios count, and none of these overflows
    pools = []
    for k, w in params.items():
        by = w.abs() if cut.core == "magnitude" else scores[k]
        pools.append(_core_first(_per_cost(scores[k].flatten(), cheapest / costs.get(k, 1.0)), by.flatten(), cut, k))
    if cut.spread == "model" and pools:
        places = torch.split(_place(torch.cat(pools)), [len(pool) for pool in pools])
    else:
        places = tuple(_place(pool) for pool in pools)
    return {k: place.view(w.shape) for (k, w), place in zip(params.items(), places, strict=True)}


def _per_cost(scores: Tensor, factor: float) -> Tensor:
    """The scores, lowered by a factor of at most 1: below zero they are divided by it."""
    return scores if factor == 1 else torch.where(scores < 0, scores / factor, scores * factor)


def _order_channels(cut: Cut, scores: Tree, params: Tree, groups: tuple[Group, ...]) -> Places:
    """Places of every group's channels, counted in every group or over all."""
    pools: list[Tensor] = []
    together = sum(v.numel() for v in params.values()) if cut.spread == "model" else 0
    for g in groups:
        score = by = _per_channel(cut, g, scores, together)
        if cut.core == "magnitude":
            by = _per_channel(cut, g, {m.entry: params[m.entry].abs() for m in g.members}, together)
        pools.append(_core_first(score, by, cut, g.members[0].entry))
    ordered = torch.split(_place(torch.cat(pools)), [len(p) for p in pools]) if together else map(_place, pools)
    return dict(zip(groups, ordered, strict=True))


def _core_first(scores: Tensor, by: Tensor, cut: Cut, entry: str) -> Tensor:
    """The scores of a layer or group, infinite for the best of it by `by`."""
    if not bool(scores.abs().max() < inf):
        raise ValueError(f"cut: scores of {entry} must be finite")
    if cut.core == "score" and cut.spread != "model":
        return scores  # the best of them are first anyway
    return scores.index_fill(0, _falling(by)[: cut.core_of(len(by))], inf)


def _per_channel(cut: Cut, group: Group, scores: Tree, together: int) -> Tensor:
    """A channel's score: the sum over all weights of its members, times a power of two that keeps it finite.

    together: how many weights are scored by the same power; 0: those of this group.
    """
    members = [m for m in group.members if m.entry in scores and prunable(scores[m.entry])]
    if cut.by == "filter":
        members = [m for m in members if m.axis == 0] or members  # a group may begin where no layer makes it
    scale = 0.5 ** (together or sum(scores[m.entry].numel() for m in members)).bit_length()
    total = torch.zeros(group.size)
    for m in members:
        other = [a for a in range(scores[m.entry].dim()) if a != m.axis]
        side = (scores[m.entry] * scale).sum(dim=other)[m.offset : m.offset + group.size * m.repeat]
        total += side.view(group.size, m.repeat).sum(dim=1)
    return total


def _falling(scores: Tensor) -> Tensor:
    """Indices by falling score, equals in their order.

    Floats compare like their bits as integers, but for the sign: torch sorts integers by radix, seven times as fast.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # without -0.0
    return (~(bits ^ ((bits >> 31) & 0x7FFFFFFF))).argsort(stable=True)


def _place(scores: Tensor) -> Tensor:
    """How many come before each when all are given out by falling score."""
    n = len(scores)
    return torch.empty(n, dtype=torch.int32).scatter_(0, _falling(scores), torch.arange(n, dtype=torch.int32))
