"""Ways to make workers for a run: what `--workers` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

from clients import local
from prfl.config import ConfigError
from prfl.problem import Problem
from prfl.types import Task, Update
from sim.actors import Ray
from sim.workers import Run, Serial, Workers

Pool = Callable[[Problem], Workers]
"""From the problem as it is in this process."""


@dataclass(frozen=True)
class Place:
    """Where a run trains, itself a pool. workers: Ray actors, 0 for one a CPU, None for none: in this process.

    address: of a Ray cluster that runs already; None: one of our own. Raises ConfigError for what does not go together.
    """

    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.workers is None and self.address:
            raise ConfigError("a Ray address is of no use to serial workers, which train in this process")

    def __call__(self, given: Problem) -> Workers:
        if self.workers is None:
            return Serial(trainer(given))
        return Ray(partial(trainer, given), self.workers, self.address)


def trainer(given: Problem) -> Run:
    """What a worker does with tasks of this problem; the actors get its data and load none."""
    return local.Local(given).train_all


@contextmanager
def kept(place: Place) -> Iterator[Pool]:
    """A pool for run after run, one at a time: Ray actors start once."""
    if place.workers is None:
        yield place
        return
    with closing(_Kept(place)) as pool:
        yield pool


class _Kept:
    """Ray actors that start once, and get data only when it is another's."""

    def __init__(self, place: Place):
        self._place = place
        self._ray: Ray | None = None
        self._given: Problem | None = None

    def __call__(self, given: Problem) -> Workers:
        if self._ray is None:
            self._ray = Ray(partial(trainer, given), self._place.workers or 0, self._place.address)
        elif given is self._given:
            self._ray.forget()
        else:
            self._ray.turn(partial(trainer, given))
        self._given = given
        return _Lent(self._ray)

    def close(self) -> None:
        if self._ray is not None:
            self._ray.close()


class _Lent:
    """Workers that their run does not end."""

    def __init__(self, workers: Workers):
        self._workers = workers

    def submit(self, job: int, task: Task) -> None:
        self._workers.submit(job, task)

    def result(self, job: int) -> Update:
        return self._workers.result(job)

    def discard(self, job: int) -> None:
        self._workers.discard(job)

    def close(self) -> None:
        """The next run may have them."""
