"""Arrivals in one order: what is summed over a batch must not depend, to the bit, on the order it came in."""

from __future__ import annotations

from collections.abc import Sequence

from prfl.types import Arrival, Update


def key(arrival: Arrival) -> tuple[int, int, float, int]:
    """Client, version, when it was sent, seed of the task: no two tasks share all of them."""
    return arrival.task.client, arrival.task.version, arrival.sent, arrival.task.seed


def ordered(arrivals: Sequence[Arrival]) -> list[tuple[Arrival, Update]]:
    """The arrivals that brought an update, with it, in the order of `key`: a client's newest comes last."""
    return [(a, a.update) for a in sorted(arrivals, key=key) if a.update is not None]
