"""What a device brings to a task: its model skeleton and its data, built from the experiment alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from clients import accelerator, train
from clients.crew import Crew, attempt
from prfl import models, problem
from prfl.config import Experiment
from prfl.data import Samples
from prfl.partition import Partition
from prfl.problem import Problem
from prfl.types import Task, Tree, Update


class Local:
    """`samples(client)`: what that client trains on. `params`: the model's entries, for their names and shapes.

    device: what it trains on, as `accelerator.found` knows it. Raises ConfigError.
    """

    def __init__(self, given: Problem, device: str = "cpu"):
        self._device = accelerator.found(device)
        self.model: nn.Module = given.model
        self.params: Tree = models.values(given.model)
        self._clients = len(given.parts)
        self._samples: Callable[[int], Samples] = lru_cache(maxsize=256)(given.samples)
        self._crew = Crew(given.model, self.samples, self.train)

    @staticmethod
    def of(experiment: Experiment, folder: Path | None = None, own: bool = False, device: str = "cpu") -> Local:
        """Built from an experiment and the folder where data sets lie; `own`: all that lies there is this device's.

        Without `own` the device cuts its part out as the simulation does, which takes the partitioners of `prfl[sim]`.
        """
        return Local(problem.build(undivided(experiment) if own else experiment, folder), device)

    def samples(self, client: int) -> Samples:
        """A client's training samples. Raises ValueError for one that the experiment does not have."""
        if not 0 <= client < self._clients:
            raise ValueError(f"no client {client}: the experiment's data has {self._clients} (data.clients)")
        return self._samples(client)

    def train(self, task: Task) -> Update:
        """The task's update."""
        return train.train(task, self.model, self.samples(task.client), self._device)

    def train_all(self, tasks: Sequence[Task]) -> list[Update | Exception]:
        """What `train` makes of each task, to the bit, and sooner; in place of an update that failed, the reason."""
        together = self._device == accelerator.CPU
        return self._crew(tasks) if together else [attempt(self.train, task) for task in tasks]


def undivided(experiment: Experiment) -> Experiment:
    """The same experiment where all data is one's own: of a device, or the server's to judge by."""
    data = experiment.data.model_copy(update={"partition": f"{__name__}:whole"})
    return experiment.model_copy(update={"data": data})


def whole() -> Partition:
    """No partition: every client sees all samples."""

    def split(labels: Tensor, natural: Tensor | None, clients: int, seed: int) -> list[Tensor]:
        return [torch.arange(len(labels))] * clients

    return split
