"""Merges that remember every client (PR-FL): slow ones keep their vote between arrivals; notation of `prfl.merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prfl.arrivals import ordered
from prfl.average import Weigh, average, check, keep, local, shares, weight
from prfl.checks import choice, share
from prfl.masks import Mask
from prfl.staleness import PR_FL, Staleness
from prfl.types import Arrival, State, Tree

Age = Literal["growing", "frozen"]

ROWS = 2**17  # values that are summed in one go: many small clients or one large one


@dataclass(frozen=True)
class mask_fed_avg:
    """V = sum(a m w) / sum(a m) over the arrivals, then W + eta (V - W) where held; staleness sets the shares.

    eta None: the arrivals' part of the staleness of all clients seen, sum over arrivals of p_i with
    p_i = s_i / sum_j s_j, every client's s as of its last arrival (PR-FL's code as published, but every upload has its
    own client's weight).
    """

    eta: float | None = None
    staleness: Staleness = PR_FL
    weigh: Weigh = "samples"

    def __post_init__(self) -> None:
        check("mask_fed_avg", self.weigh)
        if self.eta is not None:
            share("mask_fed_avg", "eta", self.eta)

    def init(self) -> Mapping[int, float]:
        """Memory: the latest staleness factor of every client seen."""
        return {}

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Mapping[int, float]]:
        votes = shares(state, arrivals, self.staleness, self.weigh)
        now = {t.client: self.staleness(state.version - t.version) for t, _, _ in votes}
        seen = {**state.merge, **now}
        p = normalised(seen)
        eta = min(1.0, sum(p[c] for c in sorted(now))) if self.eta is None else self.eta
        mean, count = average(state.params, ((u.mask, local(t, u), a, a) for t, u, a in votes))
        return keep(count(), {k: torch.lerp(w, mean[k], eta) for k, w in state.params.items()}, state.params), seen


@dataclass(frozen=True)
class Cached:
    """A client's latest local weights, packed, all entries end to end in the order of their names.

    `at[i]`: where `values[i]` lies in the whole model flattened likewise, one object for all clients with these places;
    None: it is the whole model. Not the mask itself, which would keep its ranking and so an old model alive.
    """

    at: Tensor | None
    values: Tensor
    weight: float
    version: int
    staleness: float  # the factor when it arrived


@dataclass(frozen=True)
class buff_mask_fed_avg:
    """sum(a m w) / sum(a m) over the latest local weights of all clients seen; staleness sets the shares.

    PR-FL's MaskFedAvg over its cache. age "growing": a cached model ages while it lies there (its paper); "frozen": it
    keeps the factor it arrived with (its code).
    """

    age: Age = "growing"
    staleness: Staleness = PR_FL
    weigh: Weigh = "samples"

    def __post_init__(self) -> None:
        choice("buff_mask_fed_avg", "age", self.age, ("growing", "frozen"))
        check("buff_mask_fed_avg", self.weigh)

    def init(self) -> Mapping[int, Cached]:
        """Memory: every client's latest local weights."""
        return {}

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Mapping[int, Cached]]:
        cache = _renewed(state, arrivals, self.staleness, self.weigh)
        total, count = _sums(state, _votes(state, cache, self.age, self.staleness))
        return _kept(state, total.div_(count), count), cache


@dataclass(frozen=True)
class buff_fed_avg:
    """sum(a m w) / sum(a) over the latest local weights of all clients seen: a missing weight counts as zero.

    PR-FL's plain average over its cache; staleness sets the shares, `age` as in `buff_mask_fed_avg`.
    """

    age: Age = "growing"
    staleness: Staleness = PR_FL
    weigh: Weigh = "samples"

    def __post_init__(self) -> None:
        choice("buff_fed_avg", "age", self.age, ("growing", "frozen"))
        check("buff_fed_avg", self.weigh)

    def init(self) -> Mapping[int, Cached]:
        """Memory: every client's latest local weights."""
        return {}

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Mapping[int, Cached]]:
        cache = _renewed(state, arrivals, self.staleness, self.weigh)
        votes = _votes(state, cache, self.age, self.staleness)
        total, count = _sums(state, votes)
        return _kept(state, total.div_(sum(a for _, a in votes)), count), cache


def normalised(values: Mapping[int, float]) -> dict[int, float]:
    """Shares that sum to one, in the order of the clients."""
    total = sum(values[c] for c in sorted(values))
    return {c: values[c] / total for c in sorted(values)}


def _renewed(state: State, arrivals: Sequence[Arrival], staleness: Staleness, weigh: Weigh) -> Mapping[int, Cached]:
    cache: dict[int, Cached] = dict(state.merge)
    known = {id(c.at): c.at for c in cache.values() if c.at is not None}  # the places that clients share
    found: dict[Mask, Tensor | None] = {}
    began: Tree = {}
    for a, u in sorted(ordered(arrivals), key=lambda pair: pair[0].task.version):  # one old model at a time
        if u.mask not in found:
            at = u.mask.places(state.params)
            same = (have for have in known.values() if at is not None and torch.equal(have, at))
            found[u.mask] = at = next(same, at)
            known |= {id(at): at} if at is not None else {}
        if a.task.params is not began:
            began, whole = a.task.params, _flat(a.task.params)
        at, age = found[u.mask], state.version - a.task.version
        values = _flat(u.delta).add_(whole if at is None else whole.index_select(0, at))
        cache[a.task.client] = Cached(at, values, weight(u, weigh), a.task.version, staleness(age))
    return cache


def _flat(tree: Tree) -> Tensor:
    """All values end to end, entries in the order of their names."""
    return torch.cat([tree[k].reshape(-1) for k in sorted(tree)])


def _votes(state: State, cache: Mapping[int, Cached], age: Age, staleness: Staleness) -> list[tuple[Cached, float]]:
    """The cache in client order, each model with its present share."""
    now = {v: staleness(state.version - v) for v in {c.version for c in cache.values()}}
    return [(c, c.weight * (c.staleness if age == "frozen" else now[c.version])) for _, c in sorted(cache.items())]


def _sums(state: State, votes: Sequence[tuple[Cached, float]]) -> tuple[Tensor, Tensor]:
    """sum(a m w) and sum(a m) of the model flattened: clients that hold the same places are summed as packed."""
    size = sum(v.numel() for v in state.params.values())
    total, count = torch.zeros(size), torch.zeros(size)
    groups: dict[int, list[tuple[Cached, float]]] = {}
    for c, a in votes:
        groups.setdefault(id(c.at), []).append((c, a))
    for group in groups.values():
        at, share, values = group[0][0].at, sum(a for _, a in group), _sum(group)
        if at is None:
            total.add_(values)
            count.add_(share)
        else:
            total.index_add_(0, at, values)
            count.index_add_(0, at, count.new_ones(()).expand(len(at)), alpha=share)
    return total, count


def _sum(group: Sequence[tuple[Cached, float]]) -> Tensor:
    """sum(a w) of packed values of one length, in the order given."""
    out = torch.zeros_like(group[0][0].values)
    step = max(1, ROWS // max(1, len(out)))
    for i in range(0, len(group) if step > 1 else 0, step):
        rows, shares = zip(*((c.values, a) for c, a in group[i : i + step]), strict=True)
        out.add_((torch.stack(rows) * torch.tensor(shares)[:, None]).sum(dim=0))
    for c, a in group if step == 1 else ():
        out.add_(c.values, alpha=a)
    return out


def _kept(state: State, mean: Tensor, count: Tensor) -> Tree:
    """The flat mean as a tree; what nobody holds keeps its old value."""
    names = sorted(state.params)
    sizes = [state.params[k].numel() for k in names]
    new, held = (
        {k: part.view(state.params[k].shape) for k, part in zip(names, torch.split(flat, sizes), strict=True)}
        for flat in (mean, count > 0)
    )
    return keep(held, new, state.params)
