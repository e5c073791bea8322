"""Ways to make workers for a run: what `--workers` names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from clients import local
from prfl.problem import Problem
from sim.actors import Ray
from sim.workers import Run, Serial, Workers

Pool = Callable[[Problem], Workers]
"""From the problem as it is in this process."""


def serial(given: Problem) -> Workers:
    """Training in this process."""
    return Serial(trainer(given))


def ray(workers: int, address: str | None = None) -> Pool:
    """Training on so many Ray actors, of a cluster of our own or the one at `address`."""
    return lambda given: Ray(partial(trainer, given), workers, address)


def trainer(given: Problem) -> Run:
    """What a worker does with tasks of this problem; the actors get its data and load none."""
    return local.Local(given).train
