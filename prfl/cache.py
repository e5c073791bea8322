"""Merges that remember every client (PR-FL): slow ones keep their vote between arrivals; notation of `prfl.merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prfl.arrivals import ordered
from prfl.average import Weigh, average, check, keep, local, shares, weight
from prfl.checks import choice, share
from prfl.staleness import PR_FL, Staleness
from prfl.types import Arrival, State, Task, Tree, Update

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
        mean, held = average(state.params, ((u.mask, local(t, u), a, a) for t, u, a in votes))
        return keep(held, {k: torch.lerp(w, mean[k], eta) for k, w in state.params.items()}, state.params), seen


@dataclass(frozen=True)
class Cached:
    """A client's latest local weights, packed, all entries end to end in the order of their names.

    `at[i]`: where `values[i]` lies in the whole model flattened likewise; None: it is the whole model. Not the mask
    itself, which would keep its ranking and so an old model alive.
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
        return _kept(state, total / count, count), cache


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
        return _kept(state, total / sum(a for _, a in votes), count), cache


def normalised(values: Mapping[int, float]) -> dict[int, float]:
    """Shares that sum to one, in the order of the clients."""
    total = sum(values[c] for c in sorted(values))
    return {c: values[c] / total for c in sorted(values)}


def _renewed(state: State, arrivals: Sequence[Arrival], staleness: Staleness, weigh: Weigh) -> Mapping[int, Cached]:
    came = ordered(arrivals)
    new = {
        a.task.client: Cached(
            *_packed(a.task, u), weight(u, weigh), a.task.version, staleness(state.version - a.task.version)
        )
        for a, u in came
    }
    return {**state.merge, **new}


def _packed(task: Task, update: Update) -> tuple[Tensor | None, Tensor]:
    """Positions and values of the local weights, as `Cached` has them."""
    values, mask, places, start = local(task, update), update.mask, list[Tensor](), 0
    for k in sorted(task.params):
        shape, size = task.params[k].shape, task.params[k].numel()
        places.append(mask.gather(k, torch.arange(start, start + size, dtype=torch.int32).view(shape)))
        start += size
    whole = all(mask.whole(k) for k in task.params)
    return None if whole else torch.cat(places), torch.cat([values[k] for k in sorted(task.params)])


def _votes(state: State, cache: Mapping[int, Cached], age: Age, staleness: Staleness) -> list[tuple[Cached, float]]:
    """The cache in client order, each model with its present share."""
    now = {v: staleness(state.version - v) for v in {c.version for c in cache.values()}}
    return [(c, c.weight * (c.staleness if age == "frozen" else now[c.version])) for _, c in sorted(cache.items())]


def _sums(state: State, votes: Sequence[tuple[Cached, float]]) -> tuple[Tensor, Tensor]:
    """sum(a m w) and sum(a m) of the model flattened: sub-models in the order given, then whole models."""
    size = sum(v.numel() for v in state.params.values())
    total, count, step = torch.zeros(size), torch.zeros(size), max(1, ROWS // size)
    parts = [(c.at, c.values, a) for c, a in votes if c.at is not None]
    for i in range(0, len(parts), step):
        places, values, each = zip(*parts[i : i + step], strict=True)
        at = torch.cat(places)
        share = torch.from_numpy(np.repeat(np.array(each, np.float32), [v.numel() for v in values]))
        total.index_add_(0, at, torch.cat(values) * share)
        count.index_add_(0, at, share)
    whole = [(c.values, a) for c, a in votes if c.at is None]
    for v, a in whole:
        total.add_(v, alpha=a)
    return total, count.add_(sum(a for _, a in whole))


def _kept(state: State, mean: Tensor, count: Tensor) -> Tree:
    """The flat mean as a tree; what nobody holds keeps its old value."""
    names = sorted(state.params)
    sizes = [state.params[k].numel() for k in names]
    new, held = (
        {k: part.view(state.params[k].shape) for k, part in zip(names, torch.split(flat, sizes), strict=True)}
        for flat in (mean, count > 0)
    )
    return keep(held, new, state.params)
