"""Who is asked to work: parts of the same ask/tell form as the densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from prfl.checks import fraction, least, share
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
    """One after another, by number, beginning after as many as tasks were sent: all equally often while all are there.

    Where somebody is away, the next one takes the turn.
    """

    def init(self) -> None:
        return None

    def ask(self, state: State, idle: Sequence[int], free: int, rng: np.random.Generator) -> Sequence[int]:
        place = {c: i for i, c in enumerate(sorted({*state.classes, *idle}))}
        return sorted(idle, key=lambda c: (place[c] - state.sent) % len(place))[:free]

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


@dataclass(frozen=True)
class checkin:
    """Check-in and scheduler of MyFed (async-FL, 2022), counted in versions; with `one_arrival` pacing.

    Clients whose number mod 100 is below 100 `first` are there at the start; `num` of the others, at random, join at
    version 0 and at every `interval`-th. At every `every`-th version, once, max(share of those there, every + 1) of
    them are asked, at random. Between these versions nobody is asked, unless nobody is at work. What its limit on the
    queue of results would hold back, the pacing's number in flight does (ours).
    """

    first: float = 0.2
    interval: int = 600
    num: int = 200
    every: int = 5
    share: float = 0.1

    def __post_init__(self) -> None:
        fraction("selector checkin", "first", self.first)
        share("selector checkin", "share", self.share)
        for name, bound in (("interval", 1), ("num", 0), ("every", 1)):
            least("selector checkin", name, getattr(self, name), bound)

    def init(self) -> int:
        """Memory: how many tasks had been sent when the version began."""
        return 0

    def ask(self, state: State, idle: Sequence[int], free: int, rng: np.random.Generator) -> Sequence[int]:
        if state.version % self.every or state.sent != state.selector:
            return []
        there = self.there(state, idle)
        ready = [c for c in idle if c in there]
        wanted = max(int(self.share * len(there)), self.every + 1)
        return [ready[i] for i in rng.permutation(len(ready))[: min(free, wanted)]]

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> int:
        return state.sent

    def there(self, state: State, idle: Sequence[int] = ()) -> set[int]:
        """The clients that have checked in by now."""
        known = sorted(state.classes or idle)
        early = {c for c in known if c % 100 < 100 * self.first}
        others = np.random.default_rng((state.seed, 4)).permutation([c for c in known if c not in early])
        return early.union(others[: self.num * (1 + state.version // self.interval)].tolist())


TABLE: dict[str, Callable[..., Selector]] = {
    "random": random,
    "round_robin": round_robin,
    "power_of_choice": power_of_choice,
    "checkin": checkin,
}
