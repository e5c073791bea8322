"""What an experiment learns: the model, the clients' data, and the splits that judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prfl import config, data, models, partition
from prfl.config import Experiment
from prfl.data import Dataset, Samples


@dataclass(frozen=True)
class Problem:
    """`model`: a skeleton with the initial values. `parts[client]`: indices into the training split."""

    model: nn.Module
    dataset: Dataset
    validation: Samples
    parts: Sequence[Tensor]
    noise: partition.Noise
    seed: int

    def samples(self, client: int) -> Samples:
        """What one client trains on."""
        own = self.dataset.train.subset(self.parts[client])
        return self.noise.apply(own, client, len(self.parts), self.dataset.classes, self.seed)

    @property
    def example(self) -> Tensor:
        """One input, shape (1, C, H, W)."""
        return self.dataset.train.batch(torch.zeros(1, dtype=torch.int64))[0]


def build(experiment: Experiment, folder: Path | None = None) -> Problem:
    """The problem of an experiment; `folder`: where data sets lie. Raises ConfigError and data's own errors."""
    settings = experiment.data
    dataset, validation = _split(experiment, folder)
    split = config.part("partition", settings.partition, partition.TABLE)
    parts = split(dataset.train.y, dataset.natural, settings.clients, experiment.seed)
    noise = config.part("noise", {"name": "noise", **settings.noise}, {"noise": partition.Noise})
    return Problem(_model(experiment, dataset), dataset, validation, parts, noise, experiment.seed)


def _split(experiment: Experiment, folder: Path | None) -> tuple[Dataset, Samples]:
    settings = experiment.data
    dataset = config.part("data set", settings.set, data.TABLE).load(folder, settings.download)
    return data.split_validation(dataset, settings.validation, experiment.seed)


def _model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    make = config.part("model", experiment.model, models.TABLE)
    channels, height, width = dataset.train.batch(torch.zeros(1, dtype=torch.int64))[0].shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        model: nn.Module = make((channels, height, width), dataset.classes)
    return model


def report(given: Problem) -> dict[str, Any]:
    """How the classes are spread over the clients, for the run folder."""
    return partition.report(given.parts, given.dataset.train.y, given.dataset.classes)
