"""Exploration before training: a merge that first gathers how far clients move each weight, then trains (AutoFLIP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from prfl.arrivals import ordered
from prfl.checks import choice, fraction, share
from prfl.guidance import Agreement, Rule, Scaling, Unit, cut, guidance, mean, settled, voted
from prfl.masks import DENSE, Mask
from prfl.optimisers import Moments
from prfl.types import Arrival, Merge, State, Tree


@dataclass(frozen=True)
class Exploration:
    """Memory of `explored`. Trees are shaped like the parameters; `each` only where masks follow the participants."""

    clients: tuple[int, ...] = ()  # who has explored
    total: Tree = field(default_factory=dict)  # sum of squared deviations
    count: Tree = field(default_factory=dict)  # of so many explorers
    moved: Tree = field(default_factory=dict)  # sum of deviations
    each: Mapping[int, Tree] = field(default_factory=dict)  # squared deviations by explorer, NaN where it held nothing
    began: int | None = None  # the first version that is trained
    scores: Tree = field(default_factory=dict)
    mask: Mask = DENSE
    share: float = 1.0  # the mask's density
    inner: Any = None


@dataclass(frozen=True)
class explored:
    """A merge in two phases: explorers' deviations until there are enough, then `inner`, and the mask on what it gives.

    share: of the clients that explore; those who have no memory at all are not waited for, and the first merge that
    brings nobody new ends the phase, enough or not. The rest: see `autoflip`. An answer to a task of the first phase
    that comes in the second is left out.
    """

    inner: Merge
    prune: float = 0.3
    share: float = 1.0
    scaling: Scaling = "minmax"
    unit: Unit = "weights"
    rule: Rule = "mean"
    participants: bool = False
    warm: bool = False
    agreement: Agreement = field(default_factory=settled)

    def __post_init__(self) -> None:
        fraction("explored", "prune", self.prune)
        share("explored", "share", self.share)
        choice("explored", "scaling", self.scaling, ("minmax", "robust"))
        choice("explored", "unit", self.unit, ("weights", "channels", "hybrid"))
        choice("explored", "rule", self.rule, ("mean", "dead"))

    def init(self) -> Exploration:
        return Exploration()

    def wanted(self, state: State) -> int:
        """How many have to explore."""
        clients = len(state.classes)
        able = clients - sum(not limit for limit in state.limits.values())
        return max(1, min(round(self.share * clients), able))

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Exploration]:
        memory: Exploration = state.merge
        if memory.began is None:
            known = len(memory.clients)
            memory = heard(memory, state.params, arrivals, self.participants)
            more = known < len(memory.clients) < self.wanted(state)
            return (state.params, memory) if more else self._begun(memory, state)
        came = [a for a in arrivals if a.task.version >= (memory.began or 0)]
        if not came:
            return state.params, memory
        params, inner = self.inner(replace(state, merge=memory.inner), came)
        if isinstance(inner, Moments):
            inner = replace(inner, first=memory.mask.apply(inner.first))
        return memory.mask.apply(params), self._refined(replace(memory, inner=inner), state, came)

    def _begun(self, memory: Exploration, state: State) -> tuple[Tree, Exploration]:
        """The first parameters and mask of training: all that the explorers did not move enough is cut."""
        memory = self._masked(memory, guidance(memory.total, memory.count, self.scaling), state)
        params = state.params
        if self.warm:
            params = {k: v + memory.moved[k] / memory.count[k].clamp(min=1) for k, v in params.items()}
        bare = Exploration()  # sums have served
        memory = replace(memory, total=bare.total, count=bare.count, moved=bare.moved, began=state.version + 1)
        return memory.mask.apply(params), replace(memory, inner=self.inner.init())

    def _masked(self, memory: Exploration, scores: Tree, state: State) -> Exploration:
        mask = cut(scores, self.prune, self.unit, self.rule, state.architecture.groups)
        return replace(memory, scores=scores, mask=mask, share=mask.density(state.params))

    def _refined(self, memory: Exploration, state: State, came: Sequence[Arrival]) -> Exploration:
        if not self.prune:
            return memory
        if self.participants:
            trees = [memory.each[a.task.client] for a, _ in ordered(came) if a.task.client in memory.each]
            return self._masked(memory, mean(trees, self.scaling), state) if trees else memory
        if isinstance(self.agreement, settled):
            return memory
        scores = self.agreement(memory.scores, voted(came, memory.scores, self.prune, self.scaling), state.version)
        return memory if scores is memory.scores else self._masked(memory, scores, state)


def heard(memory: Exploration, params: Tree, arrivals: Sequence[Arrival], each: bool) -> Exploration:
    """The memory with the deviations of explorers not heard before: what they sent is what each weight moved."""
    old = (memory.total, memory.count, memory.moved)
    sums = [{k: tree[k].clone() if k in tree else torch.zeros_like(v) for k, v in params.items()} for tree in old]
    total, count, moved = sums
    clients, apart = list(memory.clients), dict(memory.each)
    for a, update in ordered(arrivals):
        if a.task.client in clients:
            continue
        clients.append(a.task.client)
        for k, d in update.delta.items():
            update.mask.add_into(k, total[k], d.square(), 1.0)
            update.mask.count_into(k, count[k], 1.0)
            update.mask.add_into(k, moved[k], d, 1.0)
        if each:
            unknown = {k: torch.full_like(v, torch.nan) for k, v in params.items()}
            apart[a.task.client] = {k: update.mask.scatter(k, d.square(), unknown[k]) for k, d in update.delta.items()}
    return replace(memory, clients=tuple(clients), total=total, count=count, moved=moved, each=apart)
