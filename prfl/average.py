"""The one average beneath all merges: packed values of masked models, summed in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from prfl.arrivals import ordered
from prfl.checks import choice
from prfl.masks import Mask
from prfl.staleness import Staleness
from prfl.types import Arrival, State, Task, Tree, Update

Weigh = Literal["samples", "uniform"]

Term = tuple[Mask, Tree, float, float]
"""A mask, packed values of (some of) its entries, the factor they are summed by, and what a holder counts."""


def average(params: Tree, terms: Iterable[Term], over: float | None = None) -> tuple[Tree, Tree]:
    """The terms' sum over `over`, or over what the holders count (None); and where anything counted, as booleans.

    Entries are shaped like `params`; the average of what nobody holds is undefined, see `keep`.
    """
    total = {k: torch.zeros_like(v) for k, v in params.items()}
    count = {k: torch.zeros_like(v) for k, v in params.items()}
    for mask, values, factor, share in terms:
        for k, v in values.items():
            mask.add_into(k, total[k], v, factor)
            if share:
                mask.count_into(k, count[k], share)
    mean = {k: v.div_(count[k] if over is None else over) for k, v in total.items()}
    return mean, {k: n > 0 for k, n in count.items()}


def keep(held: Tree, new: Tree, old: Tree) -> Tree:
    """The new values where held; what nobody holds keeps its old value, to the bit."""
    return {k: torch.where(held[k], new[k], v) for k, v in old.items()}


def weight(update: Update, weigh: Weigh) -> float:
    """n_i: the client's samples, or 1."""
    return update.weight if weigh == "samples" else 1.0


def shares(
    state: State, arrivals: Sequence[Arrival], staleness: Staleness, weigh: Weigh
) -> list[tuple[Task, Update, float]]:
    """Tasks, updates and a_i = n_i s_i, in one order."""
    return [(a.task, u, weight(u, weigh) * staleness(state.version - a.task.version)) for a, u in ordered(arrivals)]


def local(task: Task, update: Update) -> dict[str, Tensor]:
    """w_i: packed local weights."""
    return {k: update.mask.gather(k, task.params[k]) + d for k, d in update.delta.items()}


def away(entry: str, params: Tree, task: Task, update: Update) -> Tensor:
    """w_i - W of one entry, packed: how far the local weights are from `params`."""
    if params is task.params:
        return update.delta[entry]
    gather = update.mask.gather
    return gather(entry, task.params[entry]) - gather(entry, params[entry]) + update.delta[entry]


def check(part: str, weigh: str) -> None:
    """Refuse an unknown way to weigh."""
    choice(part, "weigh", weigh, ("samples", "uniform"))
