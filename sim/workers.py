"""Where the training runs: here and now, or elsewhere (`sim.actors`). Results do not depend on which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from clients.crew import attempt
from prfl.types import Task, Update

Run = Callable[[Sequence[Task]], Sequence[Update | Exception]]
"""Trains tasks, at once where it can; in place of an update that came to nothing, the reason."""

TRIES = 3  # workers a task may cost before it counts as failed


def cores() -> int:
    """Those that this process may use, in a container too."""
    from joblib import cpu_count

    return int(cpu_count())


class Failed(RuntimeError):
    """A task came to nothing; the message is the one-line reason."""


class Workers(Protocol):
    def submit(self, job: int, task: Task) -> None: ...

    def result(self, job: int) -> Update:
        """Blocks until the job is done. Raises Failed."""

    def discard(self, job: int) -> None:
        """Nobody will ask for this job any more."""

    def close(self) -> None: ...


class Serial:
    """In this process, when the result is asked for: dropped work costs nothing."""

    def __init__(self, run: Run):
        self._run, self._tasks = run, dict[int, Task]()

    def submit(self, job: int, task: Task) -> None:
        self._tasks[job] = task

    def result(self, job: int) -> Update:
        return settled(*self._run([self._tasks.pop(job)]))

    def discard(self, job: int) -> None:
        self._tasks.pop(job, None)

    def close(self) -> None:
        self._tasks.clear()


def singly(train: Callable[[Task], Update]) -> Run:
    """One task after another."""
    return lambda tasks: [attempt(train, task) for task in tasks]


def settled(ended: Update | Exception) -> Update:
    """The update, or Failed with a reason of one line; what is no fault of the task is raised as it is."""
    if isinstance(ended, ValueError | RuntimeError | ArithmeticError):
        raise Failed(str(ended).splitlines()[0] if str(ended) else type(ended).__name__) from ended
    if isinstance(ended, Exception):
        raise ended
    return ended
