"""When work is sent and when updates are merged: a few numbers cover sync, semi-sync, async and buffered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Pacing:
    """in_flight: clients at work at once. goal: updates that make a merge. refill: free places before new work is sent.

    deadline: seconds after the last merge (or after the work was sent) when what there is gets merged, goal or not.
    drop_late: work still under way at a merge is given up. max_staleness: versions; an older update is refused.
    once: whose update waits for the merge waits too, and is not asked again before it.
    """

    in_flight: int
    goal: float
    refill: int = 1
    deadline: float = inf
    drop_late: bool = False
    max_staleness: float = inf
    once: bool = False

    def __post_init__(self) -> None:
        if self.in_flight < 1:
            raise ValueError(f"pacing: in_flight must be at least 1, got {self.in_flight}")
        if not 1 <= self.refill <= self.in_flight:
            raise ValueError(f"pacing: refill must be from 1 to in_flight ({self.in_flight}), got {self.refill}")
        if self.goal < 1 or (self.goal > self.in_flight and self.drop_late and self.deadline == inf):
            raise ValueError(f"pacing: goal {self.goal:g} can not be reached with {self.in_flight} in flight")
        if self.deadline <= 0:
            raise ValueError(f"pacing: deadline must be above 0 seconds, got {self.deadline:g}")
        if self.max_staleness < 0:
            raise ValueError(f"pacing: max_staleness must be at least 0, got {self.max_staleness:g}")
        if self.goal == inf and self.deadline == inf:
            raise ValueError("pacing: without a goal there must be a deadline")


def sync(clients: int, over: int = 0, deadline: float = inf) -> Pacing:
    """Rounds of `clients` updates out of `clients + over` asked (over-selection, Bonawitz et al. 2019)."""
    return Pacing(clients + over, clients, clients + over, deadline, drop_late=True)


def one_arrival(in_flight: int, max_staleness: float = inf) -> Pacing:
    """Every update is merged by itself (FedAsync, Xie et al. 2019)."""
    return Pacing(in_flight, 1, max_staleness=max_staleness)


def buffered(in_flight: int, goal: int, max_staleness: float = inf) -> Pacing:
    """Merged when `goal` updates have come, whoever is still at work (FedBuff, Nguyen et al. 2022)."""
    return Pacing(in_flight, goal, max_staleness=max_staleness)


def window(in_flight: int, seconds: float, max_staleness: float = inf) -> Pacing:
    """Merged every so many seconds, with what has come, an update a client (FedFix, Fraboni et al. 2023)."""
    return Pacing(in_flight, inf, deadline=seconds, max_staleness=max_staleness, once=True)


TABLE: dict[str, Callable[..., Pacing]] = {
    "sync": sync,
    "one_arrival": one_arrival,
    "buffered": buffered,
    "window": window,
    "pacing": Pacing,
}
