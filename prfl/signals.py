"""What clients report of their weights, gathered on the server: sums since the last ranking, means settled at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prfl.arrivals import ordered
from prfl.masks import DENSE
from prfl.types import Arrival, Tree


@dataclass(frozen=True)
class Signal:
    """The memory `State.signal`: per weight the sum of the reports and their number, and the last settled mean.

    All trees are shaped like the parameters; `known` is NaN where nobody has reported yet.
    """

    total: Tree
    count: Tree
    known: Tree


def observe(signal: Signal | None, params: Tree, arrivals: Sequence[Arrival]) -> Signal | None:
    """The signal with the arrivals' reports added, one vote each; None while nobody has ever reported."""
    reports = [(a.task, u.mask, u.signal) for a, u in ordered(arrivals) if u.signal is not None]
    if not reports:
        return signal
    old = signal or Signal(_full(params, 0.0), _full(params, 0.0), _full(params, torch.nan))
    total, count = ({k: v.clone() for k, v in tree.items()} for tree in (old.total, old.count))
    for task, kept, report in reports:
        mask = kept if task.work.scope == "kept" else DENSE
        for k, values in report.items():
            mask.add_into(k, total[k], values, 1.0)
            mask.count_into(k, count[k], 1.0)
    return Signal(total, count, old.known)


def settle(signal: Signal) -> Signal:
    """Means of the reports since the last call overwrite `known` where there were any; the sums start anew.

    PR-FL's table of scores at an interval, with a true count of the reports instead of the non-zero ones.
    """
    known = {k: torch.where(n > 0, signal.total[k] / n, signal.known[k]) for k, n in signal.count.items()}
    return Signal(_full(known, 0.0), _full(known, 0.0), known)


def _full(params: Tree, value: float) -> dict[str, torch.Tensor]:
    return {k: torch.full_like(v, value) for k, v in params.items()}
