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
from sim.actors import Actors, Backend
from sim.cluster import Cluster, check
from sim.processes import Processes
from sim.workers import Run, Serial, Workers

Pool = Callable[[Problem], Workers]
"""From the problem as it is in this process."""


@dataclass(frozen=True)
class Place:
    """Where a run trains, itself a pool. workers: actors, 0 for one a CPU, None for none: in this process.

    ray: whether they live on Ray or in processes of this machine, which start in a third of the time; None: on Ray
    where GPUs are shared out or a cluster is joined. address: of a Ray cluster that runs already; None: one of our own.
    device: what each trains on, cpu, cuda or cuda:N; gpus: with cuda on Ray, the share of a GPU that each actor takes.
    Raises ConfigError for what does not go together.
    """

    workers: int | None = None
    address: str | None = None
    device: str = "cpu"
    gpus: float = 1.0
    ray: bool | None = None

    def __post_init__(self) -> None:
        if self.workers is None and self.address:
            raise ConfigError("a Ray address is of no use to serial workers, which train in this process")
        if self.ray is False and self.address:
            raise ConfigError("a Ray address is of no use to workers that are processes of this machine")
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

    def actors(self, given: Problem, backend: Backend | None = None) -> Actors:
        """Actors for this problem. backend: where they live, if it has started already."""
        return Actors(backend or self.backend(), partial(trainer, given, self.device))

    def backend(self) -> Backend:
        """Where actors live. Raises ConfigError."""
        self.check()
        on_ray = bool(self.address) or self.device != "cpu" if self.ray is None else self.ray
        share, workers = 0.0 if self.device == "cpu" else self.gpus, self.workers or 0
        return Cluster(workers, self.address, share) if on_ray else Processes(workers)


def place(kind: str | None, workers: int, address: str | None, device: str, gpus: float) -> Place:
    """What the doors ask for. kind: "processes", "ray", "serial" or None, for what suits. Raises ConfigError."""
    if kind == "serial":
        return Place(None, address, device, gpus)
    if kind not in ("processes", "ray", None) or workers < 0:
        raise ConfigError(f'workers: "processes", "ray", "serial" or a number of them above 0, got {kind or workers!r}')
    return Place(workers, address, device, gpus, None if kind is None else kind == "ray")


def trainer(given: Problem, device: str = "cpu") -> Run:
    """What a worker does with tasks of this problem; the actors get its data and load none."""
    return local.Local(given, device).train_all


@contextmanager
def kept(place: Place) -> Iterator[Pool]:
    """A pool for run after run, one at a time: actors start once, while the first problem is built.

    Raises ConfigError, as `Place.check`.
    """
    if place.workers is None:
        place.check()
        yield place
        return
    with closing(_Kept(place)) as pool:
        yield pool


class _Kept:
    """Actors that start once, and get data only when it is another's."""

    def __init__(self, place: Place):
        self._place, self._backend = place, place.backend()
        self._actors: Actors | None = None
        self._given: Problem | None = None

    def __call__(self, given: Problem) -> Workers:
        if self._actors is None:
            self._actors = self._place.actors(given, self._backend)
        elif given is self._given:
            self._actors.forget()
        else:
            self._actors.turn(partial(trainer, given, self._place.device))
        self._given = given
        return _Lent(self._actors)

    def close(self) -> None:
        (self._actors or self._backend).close()


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
