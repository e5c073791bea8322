"""Many clients' tasks at once: those that are alike are trained stacked where that comes to the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from clients import stacked
from prfl.samples import Samples
from prfl.types import Task, Update

STACK = 16  # clients that train at once: more of them leave the processor's cache


def attempt(train: Callable[[Task], Update], task: Task) -> Update | Exception:
    """The update, or what went wrong."""
    try:
        return train(task)
    except Exception as reason:
        return reason


class Crew:
    """Trains tasks of one model: what `train` makes of each, to the bit; it trains as `clients.train` does, on the CPU.

    Whether stacked training comes to the same is a matter of the processor's library, so the first tasks of every kind
    are trained both ways; where a bit differs, that kind is trained one by one from then on.
    """

    def __init__(self, model: nn.Module, samples: Callable[[int], Samples], train: Callable[[Task], Update]):
        self._model, self._samples, self._train = model, samples, train
        self._exact: dict[Hashable, bool] = {}

    def __call__(self, tasks: Sequence[Task]) -> list[Update | Exception]:
        """In the tasks' order; in place of an update that failed, the reason."""
        done: dict[int, Update | Exception] = {}
        for at in _alike(tasks):
            done.update(zip(at, self._together([tasks[i] for i in at]), strict=True))
        return [done[i] for i in range(len(tasks))]

    def _together(self, tasks: Sequence[Task]) -> Sequence[Update | Exception]:
        kind = self._kind(tasks)
        if kind is None or self._exact.get(kind) is False:
            return [attempt(self._train, task) for task in tasks]
        ended = stacked.train(tasks, self._model, [self._samples(task.client) for task in tasks])
        if kind not in self._exact:
            singly = [attempt(self._train, task) for task in tasks]
            self._exact[kind] = all(map(_same, ended, singly))
            return singly
        return ended

    def _kind(self, tasks: Sequence[Task]) -> Hashable | None:
        """Of tasks that can be trained stacked, else None."""
        params, mask, work = tasks[0].params, tasks[0].mask, tasks[0].work
        if len(tasks) < 2 or not stacked.stackable(self._model, work):
            return None
        if not all(len(self._samples(task.client)) for task in tasks):
            return None
        alike = replace(work, lr=1.0)  # a learning rate that falls with every version is no new kind
        return tuple(mask.shape(k, v.shape) for k, v in params.items()), bool(mask.bits), alike


def _alike(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """The places of tasks that have version, mask and work in common, at most `STACK` at a time."""
    groups: dict[Hashable, list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault((id(task.params), id(task.mask), task.work), []).append(i)
    for at in groups.values():
        yield from (at[i : i + STACK] for i in range(0, len(at), STACK))


def _same(one: Update | Exception, other: Update | Exception) -> bool:
    """Whether training ended the same way, to the bit."""
    if isinstance(one, Exception) or isinstance(other, Exception):
        return str(one) == str(other)
    return one.metrics == other.metrics and all(torch.equal(v, other.delta[k]) for k, v in one.delta.items())
