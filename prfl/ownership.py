"""Masks that are a client's own: the server remembers the one that each came back with (Sub-FedAvg)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prfl.arrivals import ordered
from prfl.masks import Mask, prunable
from prfl.overlap import nested
from prfl.types import Arrival, State, Task

Masks = Mapping[int, Mask]


@dataclass(frozen=True)
class own:
    """Every client holds what it has not pruned yet. Memory: the mask that each came back with last.

    A mask that is not nested in the task's, or leaves nothing of an entry, is not taken.
    """

    def init(self) -> Masks:
        return {}

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        masks: Masks = state.density
        return masks[client].density(state.params) if client in masks else 1.0

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Masks:
        came = {a.task.client: u.mask for a, u in ordered(arrivals) if u.mask is a.task.mask or _fair(a.task, u.mask)}
        return {**state.density, **came}


@dataclass(frozen=True)
class personal:
    """The client's own mask, unless it has no memory for it; hybrid: ValueError without a BatchNorm to prune by."""

    hybrid: bool

    def __call__(self, state: State, task: Task) -> Task:
        if self.hybrid and not any(group.scale for group in state.architecture.groups):
            raise ValueError("sub_fedavg: hybrid prunes channels by BatchNorm's scale, and this model has no BatchNorm")
        mask = state.density.get(task.client)
        if mask is None or mask.density(state.params) > state.limits.get(task.client, 1.0):
            return task
        return replace(task, mask=mask)


def _fair(task: Task, mask: Mask) -> bool:
    """Whether the mask is a smaller one of the task's."""
    shapes = {k: v.shape for k, v in task.params.items() if prunable(v)}
    return all(mask.count(k, shape) for k, shape in shapes.items()) and nested(mask, task.mask, task.params)
