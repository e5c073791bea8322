"""What scores the global model on the server."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prfl.evaluate import evaluate
from prfl.problem import Problem
from prfl.types import State, Work
from strategies.method import Method
from strategies.server import Scores

CALIBRATION = 2000  # training samples that re-estimate static BatchNorm statistics before a test


@dataclass(frozen=True)
class Judge:
    """Scores on the problem's splits; `static`: BatchNorm statistics are re-estimated first (HeteroFL)."""

    problem: Problem
    static: bool

    def __call__(self, state: State, test: bool = True) -> Scores:
        given, dataset = self.problem, self.problem.dataset
        some = dataset.train.subset(torch.arange(min(CALIBRATION, len(dataset.train)))) if self.static else None
        splits = (given.validation, dataset.test) if test else (given.validation,)
        return Scores(*(evaluate(state.params, given.model, split, calibrate=some) for split in splits))


def static(method: Method, state: State) -> bool:
    """Whether clients leave BatchNorm statistics to the evaluation."""
    work = method.work if isinstance(method.work, Work) else method.work(state.version)
    return work.statistics == "static"
