"""A method is a value: six parts behind three verbs (init, assign, step). The loop needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np

from prfl import merge, saliency, signals, valuation
from prfl.cut import Cut, Ranking
from prfl.density import constant
from prfl.types import Architecture, Arrival, Density, Merge, Saliency, Scorer, State, Task, Tree, Valuation, Work

Plan = Callable[[int], Work]
"""What clients do, by version."""


class Remask(Protocol):
    """When the ranking is renewed, and in which versions clients are asked to report for it."""

    def listens(self, version: int) -> bool: ...
    def __call__(self, method: Method, state: State, arrivals: Sequence[Arrival]) -> State: ...


@dataclass(frozen=True)
class rerank:
    """Rank anew every so many versions; the masks of all densities stay frozen in between.

    Clients send their statistic with the tasks of the last `listen` versions before that (0: with every task).
    """

    every: int = 1
    listen: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.listen < 0:
            raise ValueError(f"rerank: every >= 1 and listen >= 0 wanted, got {self.every} and {self.listen}")

    def listens(self, version: int) -> bool:
        return not self.listen or version % self.every >= self.every - self.listen

    def __call__(self, method: Method, state: State, arrivals: Sequence[Arrival]) -> State:
        if state.version % self.every:
            return state
        signal = None if state.signal is None else signals.settle(state.signal)
        scores = method.saliency(state.params, None if signal is None else signal.known)
        return replace(state, signal=signal, rank=method.ranking(scores, state.params, state.architecture))


@dataclass(frozen=True)
class never:
    """The ranking of the start is kept: position-based and static masks."""

    def listens(self, version: int) -> bool:
        return False

    def __call__(self, method: Method, state: State, arrivals: Sequence[Arrival]) -> State:
        return state


def unchanged(state: State, task: Task) -> Task:
    """The task as it is."""
    return task


@dataclass(frozen=True)
class Method:
    """The parts of a method. `costs`: what one kept weight of each entry costs, by architecture; divides scores.

    scorer: what scores models on the server, for the valuations that ask for it; a run brings its own.
    among: who of the idle may be asked (None: all), with so many others at work or waiting to be merged; somebody while
    there are none. amend: the last word on a task.
    """

    density: Density = field(default_factory=constant)
    saliency: Saliency = field(default_factory=saliency.magnitude)
    merge: Merge = field(default_factory=merge.masked_mean)
    cut: Cut = field(default_factory=Cut)
    work: Work | Plan = field(default_factory=Work)
    remask: Remask = field(default_factory=rerank)
    costs: Callable[[Architecture], Mapping[str, float]] | None = None
    valuation: Valuation = field(default_factory=valuation.none)
    scorer: Scorer | None = None
    among: Callable[[State, Sequence[int], int], Sequence[int]] | None = None
    amend: Callable[[State, Task], Task] = unchanged

    def init(
        self,
        params: Tree,
        architecture: Architecture | None = None,
        classes: Mapping[int, str] | None = None,
        seed: int = 0,
    ) -> State:
        """The state before any task. `classes`: every client's device class. Ranked without any report."""
        architecture = architecture or Architecture()
        rank = self.ranking(self.saliency(params, None), params, architecture)
        memories = self.density.init(), self.merge.init()
        return State(0, params, rank, architecture, classes or {}, None, *memories, seed=seed)

    def assign(self, state: State, client: int, rng: np.random.Generator) -> Task:
        """A task at the client's density, or its limit; the task's seed is drawn from `rng`."""
        share = min(self.density.ask(state, client, rng), state.limits.get(client, 1.0))
        work = self.work if isinstance(self.work, Work) else self.work(state.version)
        if self.saliency.needs and self.remask.listens(state.version):
            work = replace(work, report=cast(Any, self.saliency.needs))
        seed = int(rng.integers(2**63))
        task = Task(client, state.version, state.params, state.rank.mask(share), work, seed, share)
        return self.amend(state, task)

    def step(self, state: State, arrivals: Sequence[Arrival]) -> State:
        """The next version from all arrivals since the last one, the failed among them."""
        arrivals = self.valued(state, arrivals)
        came = [a for a in arrivals if a.update is not None]
        params, memory = self.merge(state, came)
        signal = signals.observe(state.signal, state.params, came)
        learned = self.density.tell(state, arrivals)
        state = replace(state, version=state.version + 1, params=params, merge=memory, signal=signal, density=learned)
        return self.remask(self, state, came)

    def valued(self, state: State, arrivals: Sequence[Arrival]) -> Sequence[Arrival]:
        """The arrivals with what each update was worth. ValueError: a scorer is needed, and there is none."""
        scorer = self.scorer
        if self.valuation.judged and scorer is None:
            name = type(self.valuation).__name__
            raise ValueError(f"valuation: {name} needs scores of models on the server: the method has no scorer")

        def worth(some: Sequence[Arrival]) -> Mapping[str, float]:
            assert scorer is not None
            return scorer(self.merge(state, some)[0] if some else state.params)

        draws = np.random.default_rng((state.seed, 2, state.version))
        return valuation.valued(self.valuation, state, arrivals, worth, draws)

    def ranking(self, scores: Tree, params: Tree, architecture: Architecture) -> Ranking:
        """Scores as the ranking that masks are cut from."""
        costs = self.costs(architecture) if self.costs else None
        return self.cut.rank(scores, params, architecture.groups, costs)
