"""What a device brings to a task: its model skeleton and its data, built from the experiment alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from torch import nn

from clients import train
from prfl import models, problem
from prfl.config import Experiment
from prfl.data import Samples
from prfl.problem import Problem
from prfl.types import Task, Tree, Update


class Local:
    """`samples(client)`: what that client trains on. `params`: the model's entries, for their names and shapes."""

    def __init__(self, given: Problem):
        self.model: nn.Module = given.model
        self.params: Tree = models.values(given.model)
        self.samples: Callable[[int], Samples] = lru_cache(maxsize=256)(given.samples)

    @staticmethod
    def of(experiment: Experiment, folder: Path | None = None) -> Local:
        """Built from an experiment and the folder where data sets lie."""
        return Local(problem.build(experiment, folder))

    def train(self, task: Task) -> Update:
        """The task's update."""
        return train.train(task, self.model, self.samples(task.client))


def trainer(experiment: Experiment, folder: Path | None = None) -> Callable[[Task], Update]:
    """`Local.train` of an experiment, for a process that has nothing yet."""
    return Local.of(experiment, folder).train
