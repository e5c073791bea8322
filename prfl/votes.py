"""A merge in which clients move the mask themselves: a weight lives where enough of them have kept it (FedDST)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prfl.average import Weigh, average, check, local, shares
from prfl.checks import least
from prfl.staleness import FLAT, Staleness
from prfl.types import Arrival, State, Tree


@dataclass(frozen=True)
class voted:
    """sum(a m w) / sum(a m) where sum(a m) is at least `votes`; what clients gave up, and too few hold, becomes zero.

    Notation of `prfl.merge`. FedDST (Bibikar et al. 2022), as published for clients that all start from one mask. Ours:
    what the arrivals were never given keeps its value, as an old task knows no newer weights; what all of them hold
    stays, however few they are.
    Memory: where the last merge left weights alive.
    """

    votes: float = 0.0
    staleness: Staleness = FLAT
    weigh: Weigh = "samples"

    def __post_init__(self) -> None:
        check("voted", self.weigh)
        least("voted", "votes", self.votes, 0)

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Tree]:
        came = shares(state, arrivals, self.staleness, self.weigh)
        mean, count = average(state.params, ((u.mask, local(t, u), a, a) for t, u, a in came))
        held = count()
        given = {k: torch.zeros_like(v) for k, v in state.params.items()}
        for task in {id(task.mask): task for task, *_ in came}.values():
            for k in state.params:
                task.mask.count_into(k, given[k], 1.0)
        enough = min(self.votes, sum(a for *_, a in came) * (1 - 1e-6))
        alive = {k: (n > 0) & (n >= enough) for k, n in held.items()}
        old = {k: torch.where((given[k] > 0) | (held[k] > 0), 0.0, w) for k, w in state.params.items()}
        return {k: torch.where(alive[k], mean[k], w) for k, w in old.items()}, alive
