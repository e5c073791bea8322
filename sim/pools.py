"""Ways to make workers for a run: what `--workers` names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial

from clients import accelerator, local
from prfl.config import ConfigError
from prfl.problem import Problem
from prfl.types import Task, Update
from sim.actors import Ray
from sim.cluster import check
from sim.workers import Run, Serial, Workers

Pool = Callable[[Problem], Workers]
"""From the problem as it is in this process."""


@dataclass(frozen=True)
class Place:
    """Where a run trains, itself a pool. workers: Ray actors, 0 for one a CPU, None for none: in this process.

    address: of a Ray cluster that runs already; None: one of our own. device: what each trains on, cpu, cuda or cuda:N;
    gpus: with cuda, the share of a GPU that each actor takes. Raises ConfigError for what does not go together.
    """

    workers: int | None = None
    address: str | None = None
    device: str = "cpu"
    gpus: float = 1.0

    def __post_init__(self) -> None:
        if self.workers is None and self.address:
            raise ConfigError("a Ray address is of no use to serial workers, which train in this process")
        if not 0 < self.gpus <= 1:
            raise ConfigError(f"a worker takes a share of one GPU, above 0 and at most 1; got {self.gpus:g}")

    def __call__(self, given: Problem) -> Workers:
        return Serial(trainer(given, self.device)) if self.workers is None else self.actors(given)

    def check(self) -> None:
        """Raises ConfigError where there is no cluster at the address, or here no such device."""
        if self.address:
            check(self.address)
        else:
            accelerator.found(self.device)

    def actors(self, given: Problem) -> Ray:
        """Ray actors for this problem."""
        self.check()
        share = 0.0 if self.device == "cpu" else self.gpus
        return Ray(partial(trainer, given, self.device), self.workers or 0, self.address, share)


def trainer(given: Problem, device: str = "cpu") -> Run:
    """What a worker does with tasks of this problem; the actors get its data and load none."""
    return local.Local(given, device).train_all


@contextmanager
def kept(place: Place) -> Iterator[Pool]:
    """A pool for run after run, one at a time: Ray actors start once. Raises ConfigError, as `Place.check`."""
    place.check()
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
            self._ray = self._place.actors(given)
        elif given is self._given:
            self._ray.forget()
        else:
            self._ray.turn(partial(trainer, given, self._place.device))
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
