"""An actor that trains; how tasks go to it and results come back: tensors by reference, unless they are small."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any

import numpy as np
import torch

from clients import memory
from prfl.masks import Mask
from prfl.types import Task, Tree, Update, Work
from sim.workers import Failed, settled


@dataclass(frozen=True)
class Small:
    """A value in place of a reference to it."""

    key: int
    value: Any = field(compare=False)


@dataclass(frozen=True)
class Order:
    """A task as it goes to an actor: tensors by reference, unless they are small."""

    job: int
    client: int
    version: int
    params: Any
    mask: Any
    work: Work
    seed: int
    density: float


@dataclass(frozen=True)
class Result:
    job: int
    update: tuple[float, dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray] | None] | None
    mask: tuple[dict[str, np.ndarray], list[tuple[Any, np.ndarray]]] | None  # only where it is not the task's
    reason: str = ""


class Actor:
    """Holds model and data; params and masks are read once per version and ranking."""

    def __init__(self, fetch: Callable[[Any], Any], make: tuple[Any], path: list[str]):
        """`fetch` reads references. `path`: where the driver finds modules.

        `make` comes in a tuple, or Ray would read it before the path is set.
        """
        sys.path += [place for place in path if place not in sys.path]
        torch.set_num_threads(1)
        memory.hold()
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._fetch = fetch
        self.turn(make)
        self._params = lru_cache(maxsize=8)(lambda ref: tree_in(self._read(ref)))
        self._mask = lru_cache(maxsize=64)(lambda ref: mask_in(self._read(ref)))
        gc.freeze()  # what is here by now stays: looking through it again takes a third of a second

    def turn(self, make: tuple[Any]) -> None:
        """To another training."""
        self._run = self._read(*make)()

    def train(self, orders: list[Order]) -> tuple[list[Result], float]:
        """The results, and the seconds it took."""
        began = perf_counter()
        tasks = [
            Task(o.client, o.version, self._params(o.params), self._mask(o.mask), o.work, o.seed, o.density)
            for o in orders
        ]
        done = [_result(o.job, task, u) for o, task, u in zip(orders, tasks, self._run(tasks), strict=True)]
        return done, perf_counter() - began

    def _read(self, ref: Any) -> Any:
        return ref.value if isinstance(ref, Small) else self._fetch(ref)


def _result(job: int, task: Task, ended: Update | Exception) -> Result:
    try:
        u = settled(ended)
    except Failed as reason:
        return Result(job, None, None, str(reason))
    signal = None if u.signal is None else tree_out(u.signal)
    own = None if u.mask is task.mask else mask_out(u.mask)
    return Result(job, (u.weight, dict(u.metrics), tree_out(u.delta), signal), own)


def tree_out(tree: Tree) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in tree.items()}


def tree_in(tree: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in tree.items()}


def mask_out(mask: Mask) -> tuple[dict[str, np.ndarray], list[tuple[Any, np.ndarray]]]:
    return tree_out(mask.bits), [(group, kept.numpy()) for group, kept in mask.channels.items()]


def mask_in(stored: tuple[dict[str, np.ndarray], list[tuple[Any, np.ndarray]]]) -> Mask:
    bits, channels = stored
    return Mask(tree_in(bits), {group: torch.from_numpy(kept) for group, kept in channels})
