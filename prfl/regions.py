"""Arbitrary masks: which regions of a ranking, or which weights at all, a task is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from prfl.checks import share
from prfl.masks import Mask, prunable
from prfl.types import State, Task

QUARTERS = {
    "1": (True, True, True, True),
    "2": (True, False, True, True),
    "3": (True, True, False, True),
    "4": (True, True, True, False),
    "5": (True, True, False, False),
    "6": (True, False, True, False),
    "7": (True, False, False, True),
}
"""Client types of arXiv 2201.11803's experiments, by which quarters they hold, best first; 5 to 7 are ours."""


class Masks(Protocol):
    """A task's mask, of any kind; `state.sent` is the task's number, and draws come from its seed."""

    def __call__(self, state: State, task: Task) -> Mask: ...


@dataclass(frozen=True)
class quarters:
    """The n-th task is of type `setting[n]`, over and over: with rounds of as many clients one each, as published."""

    setting: str = "1111223344"

    def __post_init__(self) -> None:
        if not self.setting or set(self.setting) - QUARTERS.keys():
            raise ValueError(f"quarters: setting must be made of {''.join(QUARTERS)}, got {self.setting!r}")

    def __call__(self, state: State, task: Task) -> Mask:
        return state.rank.regions(QUARTERS[self.setting[state.sent % len(self.setting)]])


@dataclass(frozen=True)
class scattered:
    """Every task draws its own weights, each kept with the chance `keep` (ours); at least one of every entry."""

    keep: float = 0.5

    def __post_init__(self) -> None:
        share("scattered", "keep", self.keep)

    def __call__(self, state: State, task: Task) -> Mask:
        draw = torch.Generator().manual_seed(task.seed)
        bits = {}
        for k, v in task.params.items():
            if prunable(v):
                luck = torch.rand(v.shape, generator=draw)
                bits[k] = (luck < self.keep) | (luck == luck.min())
        return Mask({k: kept for k, kept in bits.items() if not bool(kept.all())})


TABLE: dict[str, Callable[..., Masks]] = {"quarters": quarters, "scattered": scattered}
