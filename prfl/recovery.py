"""Density that comes back: a client that stops improving gets a larger model, and so in the end does everybody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, nan
from typing import Any, Literal

import numpy as np

from prfl.arrivals import ordered
from prfl.checks import choice, least, share
from prfl.types import Arrival, Density, State, Update


@dataclass(frozen=True)
class Plateau:
    """PR-FL's early-stopping counter over scores, larger is better."""

    best: float = -inf
    last: float = nan
    count: int = 0

    def seen(self, score: float) -> Plateau:
        """The counter after a score; the same score as last time is no new information."""
        if score == self.last:
            return self
        if score > self.best:
            return Plateau(score, score)
        return Plateau(self.best, score, self.count + 1)


@dataclass(frozen=True)
class Recovery:
    """Memory of `recover`; `began` is the version at which stage 2 began."""

    first: Any
    floor: float
    floors: Mapping[int, float] = field(default_factory=dict)
    trained: Mapping[int, float] = field(default_factory=dict)  # the share each client last trained at
    scores: Mapping[int, float] = field(default_factory=dict)
    clients: Mapping[int, Plateau] = field(default_factory=dict)
    server: Plateau = Plateau()
    resting: Mapping[int, int] = field(default_factory=dict)  # interval steps left
    pause: int = 0
    climbed: int = 0
    judged: int = -1
    began: int | None = None


@dataclass(frozen=True)
class recover:
    """max(share of `first`, the client's floor, the floor of all); floors only rise (PR-FL stage 2, FedGMR).

    Stage 1 ends for good with the first rise: from then on `first` is asked as of that version and told nothing more,
    so that densities never fall (PR-FL's code; its paper would go on measuring). Who comes later gets what `first`
    gives to those it does not know.

    trigger "plateau": at every interval step (a version that is a multiple of `every`) the latest `metric` of each
    client and the server's `validation` score go through a counter. After `patience` steps without a better score the
    client's floor rises by `step`, or to the next rung of `ladder`, above its share; the floor of all by `step` above
    the least share in use (PR-FL), or to its own next rung (FedGMR). trigger "time": the floor of all rises at each of
    the versions `times`. "mixed": both.
    rest: a raised client is not judged for 2 rest steps, nobody for rest steps after the floor of all rose. forget:
    best scores start anew then, the client's and the server's, or everybody's. FedGMR: rest = patience, forget; PR-FL:
    neither. PR-FL's return to the best checkpoint is left out, as in FedGMR.
    A client that does not report the metric is not judged; ValueError when none ever did.
    """

    first: Density
    step: float = 0.2
    ladder: tuple[float, ...] = ()
    floor: float = 0.1
    patience: int = 10
    every: int = 50
    trigger: Literal["plateau", "time", "mixed"] = "plateau"
    times: tuple[int, ...] = ()
    metric: str = "loss"
    better: Literal["lower", "higher"] = "lower"
    validation: str = "accuracy"  # higher is better
    rest: int = 0
    forget: bool = False

    def __post_init__(self) -> None:
        choice("recover", "trigger", self.trigger, ("plateau", "time", "mixed"))
        choice("recover", "better", self.better, ("lower", "higher"))
        share("recover", "step", self.step)
        share("recover", "floor", self.floor)
        for rung in self.ladder:
            share("recover", "ladder", rung)
        least("recover", "patience", self.patience, 1)
        least("recover", "every", self.every, 1)
        least("recover", "rest", self.rest, 0)
        if self.trigger != "plateau" and not self.times:
            raise ValueError(f"recover: trigger {self.trigger!r} needs times, the versions at which the floor rises")

    def init(self) -> Recovery:
        return Recovery(self.first.init(), self.floor)

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        memory: Recovery = state.density
        version = state.version if memory.began is None else memory.began
        answer = self.first.ask(replace(state, density=memory.first, version=version), client, rng)
        return max(answer, memory.floors.get(client, 0.0), memory.floor)

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Recovery:
        memory: Recovery = state.density
        if memory.began is None:
            memory = replace(memory, first=self.first.tell(replace(state, density=memory.first), arrivals))
        came = ordered(arrivals)
        memory = replace(memory, trained={**memory.trained, **{a.task.client: a.task.density for a, _ in came}})
        if self.trigger != "plateau":
            due = sum(version <= state.version for version in self.times)
            for _ in range(due - memory.climbed):
                memory = self._raise_all(memory, memory.floor, state.version)
            memory = replace(memory, climbed=due)
        if self.trigger != "time":
            told = {a.task.client: self._score(u) for a, u in came if self.metric in u.metrics}
            memory = replace(memory, scores={**memory.scores, **told})
            if came and not memory.scores:
                known = ", ".join(came[0][1].metrics) or "nothing"
                raise ValueError(f"recover: no client reports {self.metric!r}; they report {known}")
            if state.version % self.every == 0 and state.version != memory.judged:
                memory = self._judge(replace(memory, judged=state.version), state)
        return memory

    def _score(self, update: Update) -> float:
        return update.metrics[self.metric] if self.better == "higher" else -update.metrics[self.metric]

    def _judge(self, memory: Recovery, state: State) -> Recovery:
        """One interval step: the server first, then every client that may still grow."""
        if memory.pause:
            return replace(memory, pause=memory.pause - 1)
        if self.validation in state.validation:
            memory = replace(memory, server=memory.server.seen(state.validation[self.validation]))
            if memory.server.count >= self.patience and memory.floor < 1:
                shares = [self._share(memory, client) for client in memory.trained] if not self.ladder else []
                memory = self._raise_all(memory, min(shares, default=memory.floor), state.version)
        resting = {c: max(0, left - (c in memory.scores)) for c, left in memory.resting.items()}
        growing = [c for c in memory.scores if not memory.resting.get(c, 0) and self._share(memory, c) < 1]
        seen = {c: memory.clients.get(c, Plateau()).seen(memory.scores[c]) for c in growing}
        memory = replace(memory, resting=resting, clients={**memory.clients, **seen})
        for client in sorted(c for c in growing if seen[c].count >= self.patience):
            memory = self._raise_client(memory, client, self._above(self._share(memory, client)), state.version)
        return memory

    def _raise_client(self, memory: Recovery, client: int, floor: float, version: int) -> Recovery:
        return replace(
            memory,
            floors={**memory.floors, client: floor},
            clients={**memory.clients, client: self._cleared(memory.clients[client])},
            server=Plateau() if self.forget else memory.server,
            resting={**memory.resting, client: 2 * self.rest},
            began=version if memory.began is None else memory.began,
        )

    def _raise_all(self, memory: Recovery, held: float, version: int) -> Recovery:
        return replace(
            memory,
            floor=self._above(held),
            clients={c: self._cleared(p) for c, p in memory.clients.items()} if self.forget else memory.clients,
            server=self._cleared(memory.server),
            pause=self.rest,
            began=version if memory.began is None else memory.began,
        )

    def _cleared(self, plateau: Plateau) -> Plateau:
        return Plateau() if self.forget else replace(plateau, count=0)

    def _share(self, memory: Recovery, client: int) -> float:
        return max(memory.trained[client], memory.floors.get(client, 0.0), memory.floor)

    def _above(self, held: float) -> float:
        if self.ladder:
            return min((rung for rung in self.ladder if rung > held + 1e-9), default=1.0)
        return min(held + self.step, 1.0)
