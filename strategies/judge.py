"""What scores the global model on the server."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from prfl.evaluate import ready, score
from prfl.problem import Problem
from prfl.types import State, Tree, Work
from strategies.method import Method
from strategies.server import Scores

CALIBRATION = 2000  # training samples that re-estimate static BatchNorm statistics before a test


@dataclass(frozen=True)
class Judge:
    """Scores on the problem's splits; `static`: BatchNorm statistics are re-estimated first (HeteroFL)."""

    problem: Problem
    static: bool

    def __call__(self, state: State, test: bool = True, macro: bool = False) -> Scores:
        """macro: of the test split, precision, recall and F1 over the classes too."""
        net, given = self._net(state.params), self.problem
        validation = score(net, given.validation)
        return Scores(validation, score(net, given.dataset.test, macro=macro)) if test else Scores(validation)

    def local(self, state: State) -> dict[int, dict[str, float]]:
        """Scores on every client's own training part; a client without samples is left out."""
        net, given = self._net(state.params), self.problem
        return {c: score(net, given.samples(c)) for c, part in enumerate(given.parts) if len(part)}

    def steer(self, params: Tree) -> dict[str, float]:
        """Scores of any parameters on the validation split, the only one that may steer a method."""
        return score(self._net(params), self.problem.validation)

    def _net(self, params: Tree) -> nn.Module:
        train = self.problem.dataset.train
        some = train.subset(torch.arange(min(CALIBRATION, len(train)))) if self.static else None
        return ready(params, self.problem.model, calibrate=some)


def judged(method: Method, judge: Judge) -> Method:
    """The method with the judge as its scorer, if it is made of parts and has none of its own."""
    return replace(method, scorer=judge.steer) if isinstance(method, Method) and method.scorer is None else method


def static(method: Method, state: State) -> bool:
    """Whether clients leave BatchNorm statistics to the evaluation."""
    work = method.work if isinstance(method.work, Work) else method.work(state.version)
    return work.statistics == "static"
