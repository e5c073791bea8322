"""Server optimisers: merges that wrap a merge and take the step it proposes as a gradient (FedOpt).

W the weights before, V what the inner merge proposes, D = V - W. Entries that no arrival holds and the inner merge left
alone keep value and moments; BatchNorm's running statistics are taken from V as they are (both ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prfl.checks import fraction, positive
from prfl.types import Arrival, Merge, State, Tree


@dataclass(frozen=True)
class Moments:
    """Memory of an optimiser: the inner merge's, and the running moments, empty before the first step."""

    inner: Any
    first: Tree = field(default_factory=dict)
    second: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class momentum:
    """m <- beta m + D; W <- W + lr m (FedAvgM, Hsu et al. 2019)."""

    inner: Merge
    beta: float = 0.9
    lr: float = 1.0

    def __post_init__(self) -> None:
        positive("momentum", "lr", self.lr)
        fraction("momentum", "beta", self.beta)

    def init(self) -> Moments:
        return Moments(self.inner.init())

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Moments]:
        proposed, inner = self.inner(replace(state, merge=state.merge.inner), arrivals)
        params, first = dict(proposed), dict(state.merge.first)
        for k, w in state.params.items():
            if not statistic(k):
                step, old = proposed[k] - w, first.get(k, torch.zeros_like(w))
                live = _touched(k, step, arrivals)
                first[k] = torch.where(live, self.beta * old + step, old)
                params[k] = torch.where(live, w + self.lr * first[k], w)
        return params, Moments(inner, first)


@dataclass(frozen=True)
class adam:
    """m <- b1 m + (1 - b1) D; v <- b2 v + (1 - b2) D^2; W <- W + lr m / (sqrt(v) + tau), v = tau^2 at first.

    FedAdam (Reddi et al. 2021, algorithm 2), without bias correction as published; the defaults are recalled.
    """

    inner: Merge
    beta1: float = 0.9
    beta2: float = 0.99
    lr: float = 0.01
    tau: float = 1e-3

    def __post_init__(self) -> None:
        positive("adam", "lr", self.lr)
        positive("adam", "tau", self.tau)
        fraction("adam", "beta1", self.beta1)
        fraction("adam", "beta2", self.beta2)

    def init(self) -> Moments:
        return Moments(self.inner.init())

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Moments]:
        proposed, inner = self.inner(replace(state, merge=state.merge.inner), arrivals)
        params, first, second = dict(proposed), dict(state.merge.first), dict(state.merge.second)
        for k, w in state.params.items():
            if not statistic(k):
                step, m = proposed[k] - w, first.get(k, torch.zeros_like(w))
                v = second.get(k, torch.full_like(w, self.tau**2))
                live = _touched(k, step, arrivals)
                first[k] = torch.where(live, torch.lerp(step, m, self.beta1), m)
                second[k] = torch.where(live, torch.lerp(step**2, v, self.beta2), v)
                params[k] = torch.where(live, w + self.lr * first[k] / (second[k].sqrt() + self.tau), w)
        return params, Moments(inner, first, second)


def statistic(entry: str) -> bool:
    """Whether an entry is a BatchNorm running statistic: never to be extrapolated."""
    return entry.endswith(("running_mean", "running_var"))


def _touched(entry: str, step: Tensor, arrivals: Sequence[Arrival]) -> Tensor:
    """Where an arrival holds the entry or the inner merge moved it (a cache may)."""
    live = step != 0
    for a in arrivals:
        if a.update is not None:
            if a.update.mask.whole(entry):
                return torch.ones_like(live)
            live |= a.update.mask.where(entry, step.shape)
    return live
