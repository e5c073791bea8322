"""Updates weighed by their clients' data: the less its classes are like everybody's, the less an update counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2
from typing import Any

from prfl.arrivals import ordered
from prfl.checks import positive
from prfl.types import Arrival, Merge, State, Tree, Update

Shares = Mapping[str, float]

MOST = 1e15  # samples of a class that a client may claim


@dataclass(frozen=True)
class by_quality:
    """The inner merge with n_i / (D_i + eps) for n_i: it has to weigh by samples.

    D_i: Jensen-Shannon divergence, base 2, of the client's classes from those of all arrivals of the merge, by samples.
    The weight is FedDUAP's for pruning rates (Zhang et al. 2022, section FedAP; eps as in its code), with all devices'
    classes; for updates, and per merge, it is ours. Clients tell their classes with `Work.labels`; one that does not
    counts as if it had nothing in common with the others, D = 1.
    """

    inner: Merge
    eps: float = 1e-4

    def __post_init__(self) -> None:
        positive("by_quality", "eps", self.eps)

    def init(self) -> Any:
        return self.inner.init()

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Any]:
        told = [_classes(update) for _, update in ordered(arrivals)]
        everybody: dict[str, float] = {}
        for classes in told:
            for name, samples in sorted(classes.items()):
                everybody[name] = everybody.get(name, 0.0) + samples
        weighed = [_weighed(a, everybody, self.eps) for a in arrivals]
        return self.inner(state, weighed)


def divergence(p: Shares, q: Shares) -> float:
    """Jensen-Shannon divergence of two histograms of any size, base 2, in [0, 1]; 1 where one is empty."""
    whole, other = sum(p.values()), sum(q.values())
    if not whole or not other:
        return 1.0
    total = 0.0
    for name in sorted({*p, *q}):
        x, y = p.get(name, 0.0) / whole, q.get(name, 0.0) / other
        total += sum(v * log2(2 * v / (x + y)) / 2 for v in (x, y) if v)
    return min(1.0, max(0.0, total))


def _classes(update: Update) -> dict[str, float]:
    return {name: min(n, MOST) for name, n in update.metrics.items() if name.startswith("class/") and n > 0}


def _weighed(arrival: Arrival, everybody: Shares, eps: float) -> Arrival:
    update = arrival.update
    if update is None:
        return arrival
    weight = update.weight / (divergence(_classes(update), everybody) + eps)
    return replace(arrival, update=replace(update, weight=weight))
