"""Where the training runs: here and now, or elsewhere (`sim.actors`). Results do not depend on which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from prfl.types import Task, Update

Run = Callable[[Task], Update]
TRIES = 3  # workers a task may cost before it counts as failed


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
        return attempt(self._run, self._tasks.pop(job))

    def discard(self, job: int) -> None:
        self._tasks.pop(job, None)

    def close(self) -> None:
        self._tasks.clear()


def attempt(run: Run, task: Task) -> Update:
    """The task's update, or Failed with a reason of one line."""
    try:
        return run(task)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise Failed(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
