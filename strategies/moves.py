"""Masks that clients move: by how much in which version, and how the server makes them one again (FedDST)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import cos, pi

import torch

from prfl.types import Arrival, State, Work
from strategies.method import Method


@dataclass(frozen=True)
class moving:
    """Work by version: every so many versions up to `end`, `rate` / 2 (1 + cos(pi version / end)) of the mask moves."""

    work: Work
    rate: float
    every: int
    end: int

    def __call__(self, version: int) -> Work:
        due = version % self.every == 1 % self.every and 0 < version < self.end
        return replace(self.work, regrow=self.rate / 2 * (1 + cos(pi * version / self.end))) if due else self.work


@dataclass(frozen=True)
class pruned_back:
    """After clients have moved their masks: each layer's largest |w| again. Without them: the mask as it is.

    Weights outside the mask are zero on the server, so that a client that grows one starts from the server's value.
    """

    keep: float

    def listens(self, version: int) -> bool:
        return False

    def __call__(self, method: Method, state: State, arrivals: Sequence[Arrival]) -> State:
        if any(a.update is not None and a.update.mask is not a.task.mask for a in arrivals):
            scores = {k: torch.where(state.merge[k] | (w != 0), w.abs(), -1.0) for k, w in state.params.items()}
            state = replace(state, rank=method.ranking(scores, state.params, state.architecture))
        return replace(state, params=state.rank.mask(self.keep).apply(state.params))
