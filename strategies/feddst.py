"""FedDST (Bibikar et al., AAAI 2022): clients move the mask, the server takes the votes and prunes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import cos, pi

import torch

from prfl import density
from prfl.average import average, local, shares
from prfl.checks import fraction, least
from prfl.cut import Cut
from prfl.staleness import FLAT, Staleness
from prfl.types import Arrival, State, Tree, Work
from strategies.method import Method

PAPER = "Bibikar et al., AAAI 2022, arXiv 2112.09824"


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
class voted:
    """sum(a m w) / sum(a m) where sum(a m) is at least `votes`; what clients gave up, and too few hold, becomes zero.

    Notation of `prfl.merge`. As published for clients that all start from one mask. Ours: what the arrivals were never
    given keeps its value, as an old task knows no newer weights; what all of them hold stays, however few they are.
    Memory: where the last merge left weights alive.
    """

    votes: float = 0.0
    staleness: Staleness = FLAT

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Tree]:
        came = shares(state, arrivals, self.staleness, "samples")
        mean, held = average(state.params, ((u.mask, local(t, u), a, a) for t, u, a in came))
        given = {k: torch.zeros_like(v) for k, v in state.params.items()}
        for task in {id(task.mask): task for task, *_ in came}.values():
            for k in state.params:
                task.mask.count_into(k, given[k], 1.0)
        enough = min(self.votes, sum(a for *_, a in came) * (1 - 1e-6))
        alive = {k: (n > 0) & (n >= enough) for k, n in held.items()}
        old = {k: torch.where((given[k] > 0) | (held[k] > 0), 0.0, w) for k, w in state.params.items()}
        return {k: torch.where(alive[k], mean[k], w) for k, w in old.items()}, alive


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


def feddst(
    sparsity: float = 0.8,
    rate: float = 0.01,
    every: int = 15,
    end: int = 200,
    at: float = 0.5,
    votes: float = 0.0,
    work: Work = Work(),
) -> Method:
    """With `sync` pacing. As published: a sparse model with Erdos-Renyi-Kernel layers all along; every `every` versions
    clients give up their least |w| and grow the largest |g| among the others, at a rate that falls like a cosine until
    `end`; weighted mean over those that hold a weight; the union is pruned back to `sparsity` layer by layer.

    Defaults are those of the reference's CIFAR-10 run, `end` half its 400 rounds. `votes`: samples that have to stand
    behind a weight. `at`: the share of the local steps after which the mask moves; recovering from it in the same task
    is a later library's way, the reference moves it last (1.0). Ours: the gradient is that of the next mini-batch's
    step, not of one batch more; layers that are whole stay whole; biases are never cut.
    """
    fraction("feddst", "sparsity", sparsity)
    fraction("feddst", "rate", rate)
    for name, value, bound in (("every", every, 1), ("end", end, 1), ("at", at, 0), ("votes", votes, 0)):
        least("feddst", name, value, bound)
    if at > 1:
        raise ValueError(f"at must be in [0, 1], got {at:g}")
    return Method(
        density=density.constant(1 - sparsity),
        cut=Cut(spread="erk"),
        merge=voted(votes),
        work=moving(replace(work, regrow_at=at), rate, every, end),
        remask=pruned_back(1 - sparsity),
    )
