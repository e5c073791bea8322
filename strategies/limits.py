"""How much of the model fits into a device's memory, learned from the tasks that it refuses."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from math import ceil

from prfl import cost
from prfl.masks import Mask
from prfl.types import Arrival, Shortage, State

PARTS = 64  # limits are so-and-so many of these parts of the model; less than one is not worth sending


def heeded(state: State, arrival: Arrival) -> tuple[State, Arrival]:
    """The state with the client's new limit if the arrival is a refusal for want of memory, else both as they were.

    The limit is the largest density below the refused one whose task fits, as the server works out what one takes; what
    else the device needs is the difference to what it said, so the first try should do. Where none fits, as with masks
    of single weights, which save no memory of training, the limit is 0 and the arrival's reason says so.
    """
    shortage, task = Shortage.read(arrival.reason), arrival.task
    if arrival.update is not None or shortage is None or not cost.priced(state.params, state.architecture):
        return state, arrival

    def footprint(mask: Mask) -> float:
        return cost.footprint(state.params, mask, state.architecture, task.work)

    room = shortage.available - shortage.needed + footprint(task.mask)
    smaller = range(1, ceil(task.density * PARTS))
    limit = bisect_right(smaller, room, key=lambda parts: footprint(state.rank.mask(parts / PARTS))) / PARTS
    if not limit:
        arrival = replace(arrival, reason=f"{arrival.reason}, and no smaller part of the model fits: left out")
    return replace(state, limits={**state.limits, task.client: limit}), arrival
