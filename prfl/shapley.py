"""Shapley values of the updates of one merge, by sampled orders: TMC-Shapley and GTG-Shapley.

The game: v(A), the score of what the arrivals A alone would be merged into, by the method's own merge. The value of an
update is its mean marginal v(prefix + it) - v(prefix) over the orders tried; of a client, the sum over its merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from prfl.checks import choice, least
from prfl.types import Arrival, State, Worth

Metric = Literal["accuracy", "loss"]
Game = Callable[[frozenset[int]], float]
"""v(A), of places in the sequence of arrivals."""

EARLIER = 100  # permutations between two means that TMC compares (Ghorbani & Zou 2019, recalled)
LAST, LEAST = 10, 30  # running means that GTG compares, and permutations before it does
WORST = 1e9  # the loss of a model that computes no number


@dataclass(frozen=True)
class tmc_shapley:
    """Truncated Monte Carlo (Ghorbani & Zou 2019, algorithm 1; there the players are samples).

    Orders are drawn at random; one is left where v(all) - v(prefix) is within `tolerance`, the rest of it adds nothing.
    It ends when the means differ by less than `change` from those of 100 orders before, as a mean share of themselves
    (recalled), or after `permutations` orders (ours). metric "loss": v is minus the loss.
    """

    metric: Metric = "accuracy"
    tolerance: float = 0.001
    change: float = 0.05
    permutations: int = 200
    judged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("tmc_shapley", self.metric)
        least("tmc_shapley", "tolerance", self.tolerance, 0)
        least("tmc_shapley", "change", self.change, 0)
        least("tmc_shapley", "permutations", self.permutations, 1)

    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]:
        v, total, means = game(arrivals, worth, self.metric), np.zeros(len(arrivals)), list[NDArray[np.float64]]()
        while len(means) < self.permutations:
            total = total + marginals(v, rng.permutation(len(arrivals)), self.tolerance)
            means.append(total / (len(means) + 1))
            if len(means) > EARLIER and _off(means[-1 - EARLIER], means[-1]) < self.change:
                break
        return list(map(float, means[-1]))


@dataclass(frozen=True)
class gtg_shapley:
    """Guided truncation gradient (Liu et al. 2022), as two implementations of it agree.

    Where |v(all) - v(nobody)| is within `between` the merge changed nothing and every value is 0. Else orders come in
    groups, one beginning with each update in turn; one is left where v(all) - v(prefix) is within `within`. It ends
    when, after more than max(30, updates) orders, the last ten running means differ by `change` at most from the
    newest, as a mean share of it, or after `permutations` orders (ours). metric "loss": v is minus the loss.
    """

    metric: Metric = "accuracy"
    between: float = 0.01
    within: float = 0.001
    change: float = 0.05
    permutations: int = 200
    judged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("gtg_shapley", self.metric)
        least("gtg_shapley", "between", self.between, 0)
        least("gtg_shapley", "within", self.within, 0)
        least("gtg_shapley", "change", self.change, 0)
        least("gtg_shapley", "permutations", self.permutations, 1)

    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]:
        n, v, means = len(arrivals), game(arrivals, worth, self.metric), list[NDArray[np.float64]]()
        total = np.zeros(n)
        if abs(v(frozenset(range(n))) - v(frozenset())) <= self.between:
            return [0.0] * n
        while len(means) < self.permutations and not self._settled(means):
            first = len(means) % n
            rest = rng.permutation([i for i in range(n) if i != first])
            total = total + marginals(v, [first, *rest], self.within)
            means.append(total / (len(means) + 1))
        return list(map(float, means[-1]))

    def _settled(self, means: Sequence[NDArray[np.float64]]) -> bool:
        enough = bool(means) and len(means) > max(LEAST, len(means[-1]))
        return enough and max(_off(mean, means[-1]) for mean in means[-LAST:]) <= self.change


def game(arrivals: Sequence[Arrival], worth: Worth, metric: Metric) -> Game:
    """v, that scores a coalition once."""

    @cache
    def v(members: frozenset[int]) -> float:
        return scored(worth([arrivals[i] for i in sorted(members)]), metric)

    return v


def marginals(v: Game, order: Sequence[int] | NDArray[np.int64], tolerance: float) -> NDArray[np.float64]:
    """What everybody adds to those before it; 0 from where v(all) - v(prefix) is within `tolerance`."""
    added, members = np.zeros(len(order)), frozenset[int]()
    full, before = v(frozenset(map(int, order))), v(members)
    for i in map(int, order):
        if abs(full - before) < tolerance:
            break
        members |= {i}
        now = v(members)
        added[i], before = now - before, now
    return added


def scored(scores: Mapping[str, float], metric: Metric) -> float:
    """A score, larger is better."""
    if metric == "accuracy":
        return scores["accuracy"]
    return -scores["loss"] if isfinite(scores["loss"]) else -WORST


def check(part: str, metric: str) -> None:
    """Refuse an unknown metric."""
    choice(part, "metric", metric, ("accuracy", "loss"))


def _off(mean: NDArray[np.float64], newest: NDArray[np.float64]) -> float:
    """How far a mean is from the newest, as a mean share of that."""
    return float(np.mean(np.abs(mean - newest) / (np.abs(newest) + 1e-12)))
