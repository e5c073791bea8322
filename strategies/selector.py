"""Who is asked to work: parts of the same ask/tell form as the densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from prfl.types import Arrival, Selector, State


@dataclass(frozen=True)
class random:
    """Uniformly among the idle clients, without replacement (McMahan et al. 2017)."""

    def init(self) -> None:
        return None

    def ask(self, state: State, idle: Sequence[int], free: int, rng: np.random.Generator) -> Sequence[int]:
        return [idle[i] for i in rng.permutation(len(idle))[:free]]

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> None:
        return None


@dataclass(frozen=True)
class round_robin:
    """Whoever was asked longest ago, so that all are asked equally often."""

    def init(self) -> None:
        return None

    def ask(self, state: State, idle: Sequence[int], free: int, rng: np.random.Generator) -> Sequence[int]:
        clients = max(1, len(state.classes))
        return sorted(idle, key=lambda c: (c - state.sent) % clients)[:free]

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> None:
        return None


@dataclass(frozen=True)
class power_of_choice:
    """Of `candidates` drawn at random, those with the largest last loss (Cho et al. 2022); unseen ones first."""

    candidates: int = 20

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"selector power_of_choice: candidates must be at least 1, got {self.candidates}")

    def init(self) -> Mapping[int, float]:
        return {}

    def ask(self, state: State, idle: Sequence[int], free: int, rng: np.random.Generator) -> Sequence[int]:
        drawn = [idle[i] for i in rng.permutation(len(idle))[: max(free, self.candidates)]]
        return sorted(drawn, key=lambda c: -state.selector.get(c, inf))[:free]

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Mapping[int, float]:
        losses = {a.task.client: a.update.metrics["loss"] for a in arrivals if a.update is not None}
        return {**state.selector, **losses}


TABLE: dict[str, Callable[..., Selector]] = {
    "random": random,
    "round_robin": round_robin,
    "power_of_choice": power_of_choice,
}
