"""The one average beneath all merges: packed values of masked models, summed in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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


TINY = torch.finfo(torch.float32).tiny

OPEN = 8  # masks whose sums are kept apart at a time: those of all tiers, or of the latest of many clients' own


def average(params: Tree, terms: Iterable[Term], over: float | None = None) -> tuple[Tree, Callable[[], Tree]]:
    """The terms' sum over `over`, or over what the holders count (None); and what they count, made when asked for.

    Entries are shaped like `params`, to be edited at will. What nobody holds has count 0 and mean -0.0, which changes
    nothing when added; an average of weights has to leave it out, see `keep`. Terms that share a mask are summed and
    counted as they are packed, which takes a fifth of the time, and spread over the model once; where there is but one
    mask they are divided so too. They may be made one by one: none is held for long.
    """
    total = {k: torch.full_like(v, -0.0) for k, v in params.items()}
    sums: dict[Mask, dict[str, _Sum]] = {}
    held: list[tuple[Mask, dict[str, float]]] = []

    def spread(mask: Mask) -> None:
        entries = sums.pop(mask)
        for k, part in entries.items():
            mask.add_into(k, total[k], part.values, part.factor)
        held.append((mask, {k: part.share for k, part in entries.items()}))

    for mask, values, factor, share in terms:
        if mask not in sums and len(sums) == OPEN:
            spread(next(iter(sums)))
        entries = sums.setdefault(mask, {})
        for k, v in values.items():
            if k in entries:
                entries[k].add(v, factor, share)
            else:
                entries[k] = _Sum(v, factor, share)
    alone = over is None and len(sums) == 1 and not held
    for part in chain.from_iterable(entries.values() for entries in sums.values()) if alone else ():
        part.divide()
    for mask in list(sums):
        spread(mask)
    if not alone:
        count = _count(params, held, TINY) if over is None else None
        for k, v in total.items():
            v.div_(over or 1.0 if count is None else count[k])
    return total, lambda: _count(params, held, 0.0)


@dataclass
class _Sum:
    """Packed values of one entry, to be multiplied by `factor`: one client's own, or from the second on their sum."""

    values: Tensor
    factor: float
    share: float
    own: bool = True

    def add(self, values: Tensor, factor: float, share: float) -> None:
        self._settle()
        self.values.add_(values, alpha=factor)
        self.share += share

    def divide(self) -> None:
        """By what the holders count."""
        self._settle()
        self.values.div_(self.share or 1.0)

    def _settle(self) -> None:
        if self.own:
            self.values, self.factor, self.own = self.values * self.factor, 1.0, False


def _count(params: Tree, held: Sequence[tuple[Mask, Mapping[str, float]]], start: float) -> Tree:
    """What the holders count, added to `start`."""
    count = {k: torch.full_like(v, start) for k, v in params.items()}
    for mask, shares in held:
        for k, share in shares.items():
            if share:
                mask.count_into(k, count[k], share)
    return count


def keep(count: Tree, new: Tree, old: Tree) -> Tree:
    """The new values where somebody holds them; what nobody holds keeps its old value, to the bit."""
    return {k: torch.where(count[k] > 0, new[k], v) for k, v in old.items()}


def weight(update: Update, weigh: Weigh) -> float:
    """n_i: the client's samples, or 1."""
    return update.weight if weigh == "samples" else 1.0


def shares(
    state: State, arrivals: Sequence[Arrival], staleness: Staleness, weigh: Weigh
) -> list[tuple[Task, Update, float]]:
    """Tasks, updates and a_i = n_i s_i, in one order."""
    return [(a.task, u, weight(u, weigh) * staleness(state.version - a.task.version)) for a, u in ordered(arrivals)]


def together(votes: Sequence[tuple[Task, Update, float, float]]) -> list[tuple[Task, Update, float, float]]:
    """Those that share a mask side by side, so that its sum stays in the cache; in their order otherwise."""
    first: dict[Mask, int] = {}
    return sorted(votes, key=lambda vote: first.setdefault(vote[1].mask, len(first)))


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
