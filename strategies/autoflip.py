"""AutoFLIP (Interno et al., 2024): clients explore the loss first; what moves least is pruned before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from prfl import merge
from prfl.checks import fraction, least
from prfl.cut import Cut
from prfl.exploration import Exploration, explored
from prfl.guidance import Agreement, Rule, Scaling, Unit, settled
from prfl.optimisers import momentum
from prfl.types import Arrival, State, Task, Work
from strategies.method import Method

PAPER = "Interno et al., 2024, arXiv 2405.10271"


def autoflip(
    prune: float = 0.3,
    explorers: float = 1.0,
    epochs: int = 150,
    patience: int = 40,
    scaling: Scaling = "minmax",
    beta: float = 0.9,
    unit: Unit = "weights",
    rule: Rule = "mean",
    participants: bool = False,
    warm: bool = False,
    agreement: Agreement = settled(),
    work: Work = Work(),
) -> Method:
    """As described, from what is public of the paper and, for defaults, of the commands of its code.

    Versions before training: a share `explorers` of the clients, drawn at random, trains a copy of the first model for
    `epochs` at most, or until `patience` epochs bring no smaller loss (0: never). Of the squared deviations from that
    model the unweighted mean is scaled within each tensor; what does not lie above the quantile `prune` of all scores
    is cut, biases too. Then FedAvg from the first model, masked, with server momentum `beta` as an average.

    Ours: `unit` "channels" and "hybrid" with their `rule`, `agreement`, tensors that never vanish, and that masks by
    `participants` follow from the explorations of those merged last (described: of those at work now). `warm`: training
    starts from the explorers' mean; with prune=0 this is FedAvg with the same start, the control.
    """
    least("autoflip", "epochs", epochs, 1)
    least("autoflip", "patience", patience, 0)
    fraction("autoflip", "beta", beta)
    average = momentum(merge.masked_mean(), beta, lr=1 - beta) if beta else merge.masked_mean()
    part = explored(average, prune, explorers, scaling, unit, rule, participants, warm, agreement)
    search = replace(work, epochs=epochs, steps=0, patience=patience)
    cut = Cut(spread="model") if unit == "weights" else Cut(unit="channels", by="filter")
    return Method(merge=part, cut=cut, work=work, remask=informed(), among=fresh(part), amend=assigned(search))


TRIES = 2  # tasks for every explorer that is wanted, on average


@dataclass(frozen=True)
class fresh:
    """While the model is explored, only as many are asked as are wanting, at random, and nobody twice.

    When so many tasks were sent that those wanting are not likely to answer any more, or nobody else is there, one who
    has explored is asked: a merge that brings nobody new ends the phase (ours).
    """

    part: explored

    def __call__(self, state: State, idle: Sequence[int], busy: int) -> Sequence[int]:
        memory: Exploration = state.merge
        if memory.began is not None:
            return idle
        known = set(idle).intersection(memory.clients)
        others = sorted(set(idle) - known)
        wanting = self.part.wanted(state) - len(memory.clients) - busy
        if known and not busy and (not others or state.sent >= TRIES * self.part.wanted(state)):
            others, wanting = sorted(known), 1
        drawn = np.random.default_rng((state.seed, 3, state.sent)).permutation(others)
        return sorted(drawn[: max(wanting, not busy)].tolist())


@dataclass(frozen=True)
class assigned:
    """A task of the phase: the search over all that a device has room for, or training under the mask."""

    search: Work

    def __call__(self, state: State, task: Task) -> Task:
        memory: Exploration = state.merge
        if memory.began is None:
            return replace(task, work=self.search)
        return replace(task, mask=memory.mask, density=memory.share) if task.density >= memory.share else task


@dataclass(frozen=True)
class informed:
    """Ranked once, by the exploration: what a device without room for the mask gets is cut from it."""

    def listens(self, version: int) -> bool:
        return False

    def __call__(self, method: Method, state: State, arrivals: Sequence[Arrival]) -> State:
        memory: Exploration = state.merge
        if memory.began != state.version:
            return state
        scores = {k: memory.scores.get(k, v) for k, v in state.params.items()}
        return replace(state, rank=method.ranking(scores, state.params, state.architecture))
