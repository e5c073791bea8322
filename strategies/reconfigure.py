"""One mask for all that is decided anew by what its weights gain per second: first by one client alone (PruneFL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from prfl.reconfiguration import reconfigured
from prfl.types import Arrival, State, Task, Tree, Work
from strategies.method import Method
from strategies.pr_fl import seconds, steps

CALM, QUIET = 0.1, 5  # stage 1 ends when so many decisions in a row change the density by a tenth at most


@dataclass(frozen=True)
class Reached:
    """Memory: the share that all hold. `alone`: stage 1 is under way, `begun`: it prunes, `quiet`: calm decisions.

    parked: the values that weights had when they were removed.
    """

    keep: float = 1.0
    alone: bool = False
    begun: bool = False
    quiet: int = 0
    parked: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class reached:
    """The share that was decided last, the same for everybody. alone: one client decides first."""

    alone: bool

    def init(self) -> Reached:
        return Reached(alone=self.alone)

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        memory: Reached = state.density
        return memory.keep

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Reached:
        memory: Reached = state.density
        return memory


@dataclass(frozen=True)
class leader:
    """Stage 1: the first client, or who is there in its place, and nobody beside it.

    first: its number, or a device class whose first client it is.
    """

    first: int | str

    def __call__(self, state: State, idle: Sequence[int], busy: int) -> Sequence[int]:
        if not state.density.alone or not idle:
            return idle
        wanted = [c for c in idle if self.first in (c, state.classes.get(c))]
        return [] if busy else [*wanted, *idle][:1]


@dataclass(frozen=True)
class reporting:
    """Squared gradients are asked for in stage 1, with so many passes, and in the last `listen` versions of `every`."""

    passes: int
    every: int
    listen: int

    def __call__(self, state: State, task: Task) -> Task:
        if state.density.alone:
            return replace(task, work=replace(task.work, epochs=self.passes, steps=0, report="gradient2"))
        last = not self.listen or state.version % self.every >= self.every - self.listen
        return replace(task, work=replace(task.work, report="gradient2")) if last else task


@dataclass(frozen=True)
class reconfigure:
    """Decide on the mask of all: in stage 1 at each version, then every so many; options as of `prunefl`."""

    work: Work
    initial: int
    begin: float
    every: int
    part: float
    halving: float
    densest: float
    overhead: float

    def listens(self, version: int) -> bool:
        return False

    def __call__(self, method: Method, state: State, arrivals: Sequence[Arrival]) -> State:
        memory: Reached = state.density
        right = max((a.update.metrics.get("accuracy", 0.0) for a in arrivals if a.update is not None), default=0.0)
        begun = memory.begun or right >= self.begin
        if begun if memory.alone else state.version % self.every == 0:
            state = self._decided(method, state)
        quiet = memory.quiet + 1 if begun and abs(state.density.keep / memory.keep - 1) <= CALM else 0
        alone = memory.alone and quiet < QUIET and state.version < self.initial
        return replace(
            state,
            params=state.rank.mask(state.density.keep).apply(state.params),
            signal=None if memory.alone else state.signal,
            density=replace(state.density, alone=alone, begun=begun, quiet=quiet),
        )

    def _decided(self, method: Method, state: State) -> State:
        """A new mask from what was reported since the last one, if anything was; the parameters with all values."""
        memory: Reached = state.density
        if state.signal is None:
            return state
        old = state.rank.mask(memory.keep)
        part = self.part if memory.alone else self.part * 0.5 ** (state.version / self.halving)
        costs, constant = seconds(self.work)(state.architecture), self.overhead * steps(self.work)
        chosen = reconfigured(state.params, old, state.signal.total, costs, constant, part, self.densest)
        full = {k: old.scatter(k, old.gather(k, v), memory.parked.get(k, v)) for k, v in state.params.items()}
        rank = method.ranking(chosen.scores, state.params, state.architecture)
        memory = replace(memory, keep=chosen.share, parked=full)
        return replace(state, params=full, rank=rank, density=memory, signal=None)
