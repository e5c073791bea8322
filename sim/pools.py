"""Ways to make workers for a run: what `--workers` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial

from clients import local
from prfl.problem import Problem
from prfl.types import Task, Update
from sim.actors import Ray
from sim.workers import Run, Serial, Workers

Pool = Callable[[Problem], Workers]
"""From the problem as it is in this process."""


def serial(given: Problem) -> Workers:
    """Training in this process."""
    return Serial(trainer(given))


def ray(workers: int = 0, address: str | None = None) -> Pool:
    """Training on so many Ray actors, 0: one a CPU, of a cluster of our own or the one at `address`."""
    return lambda given: Ray(partial(trainer, given), workers, address)


def trainer(given: Problem) -> Run:
    """What a worker does with tasks of this problem; the actors get its data and load none."""
    return local.Local(given).train


@contextmanager
def kept(workers: int | None, address: str | None = None) -> Iterator[Pool]:
    """A pool for run after run, one at a time, on so many Ray actors, 0: one a CPU; None: in this process."""
    if workers is None:
        yield serial
        return
    with closing(_Kept(workers, address)) as pool:
        yield pool


class _Kept:
    """Ray actors that start once, and get data only when it is another's."""

    def __init__(self, workers: int, address: str | None):
        self._workers, self._address = workers, address
        self._ray: Ray | None = None
        self._given: Problem | None = None

    def __call__(self, given: Problem) -> Workers:
        if self._ray is None:
            self._ray = Ray(partial(trainer, given), self._workers, self._address)
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
