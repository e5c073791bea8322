"""Merge weights that go with what a client's updates have been worth, as the method's valuation says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prfl.arrivals import ordered
from prfl.checks import fraction, share
from prfl.types import Arrival, Merge, State, Tree


@dataclass(frozen=True)
class Standing:
    """Memory of `by_value`: the inner merge's, and every client's standing."""

    inner: Any
    clients: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class by_value:
    """The inner merge with weights n_i max(floor, r_i / max_j r_j) over the arrivals j; as it is where no r is above 0.

    r: a client's standing, r <- rho r + (1 - rho) value, at first its value (CGSV, Xu et al. 2021; rho is recalled).
    How weights go with it is ours: no update is silenced, and scales of valuations do not matter. Arrivals without a
    value keep their weight; so do coalitions that are merged to be scored.
    """

    inner: Merge
    rho: float = 0.95
    floor: float = 0.1

    def __post_init__(self) -> None:
        fraction("by_value", "rho", self.rho)
        share("by_value", "floor", self.floor)
        if getattr(self.inner, "weigh", "samples") != "samples":
            raise ValueError("by_value: its inner merge must weigh by samples, or values would not count")

    def init(self) -> Standing:
        return Standing(self.inner.init())

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Standing]:
        standing = dict(state.merge.clients)
        came = ordered(arrivals)
        for a, _ in came:
            if a.value is not None:
                old = standing.get(a.task.client, a.value)
                standing[a.task.client] = self.rho * old + (1 - self.rho) * a.value
        top = max((standing.get(a.task.client, 0.0) for a, _ in came), default=0.0)
        weighed = [
            replace(a, update=replace(u, weight=u.weight * max(self.floor, standing[a.task.client] / top)))
            if top > 0 and a.value is not None
            else a
            for a, u in came
        ]
        params, inner = self.inner(replace(state, merge=state.merge.inner), weighed)
        return params, Standing(inner, standing)
