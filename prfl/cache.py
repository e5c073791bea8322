"""Merges that remember every client (PR-FL): slow ones keep their vote between arrivals; notation of `prfl.merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from prfl.arrivals import ordered
from prfl.average import Term, Weigh, average, check, keep, local, shares, weight
from prfl.checks import choice, share
from prfl.masks import Mask
from prfl.staleness import PR_FL, Staleness
from prfl.types import Arrival, State, Tree

Age = Literal["growing", "frozen"]


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
    """A client's latest local weights: packed values of its mask, never a dense model."""

    mask: Mask
    values: Tree
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
        mean, held = average(state.params, _terms(state, cache, self.age, self.staleness))
        return keep(held, mean, state.params), cache


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
        terms = _terms(state, cache, self.age, self.staleness)
        mean, held = average(state.params, terms, sum(a for *_, a in terms))
        return keep(held, mean, state.params), cache


def normalised(values: Mapping[int, float]) -> dict[int, float]:
    """Shares that sum to one, in the order of the clients."""
    total = sum(values[c] for c in sorted(values))
    return {c: values[c] / total for c in sorted(values)}


def _renewed(state: State, arrivals: Sequence[Arrival], staleness: Staleness, weigh: Weigh) -> Mapping[int, Cached]:
    new = {
        a.task.client: Cached(
            u.mask, local(a.task, u), weight(u, weigh), a.task.version, staleness(state.version - a.task.version)
        )
        for a, u in ordered(arrivals)
    }
    return {**state.merge, **new}


def _terms(state: State, cache: Mapping[int, Cached], age: Age, staleness: Staleness) -> list[Term]:
    """The cache in client order, each model with its present share."""
    terms: list[Term] = []
    for client in sorted(cache):
        c = cache[client]
        a = c.weight * (c.staleness if age == "frozen" else staleness(state.version - c.version))
        terms.append((c.mask, c.values, a, a))
    return terms
