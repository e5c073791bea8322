"""How fast this device trains: operations per second by layer kind, and what a mini-batch and a task take besides.

A mini-batch takes `step` seconds plus the operations of its convolutions and of its linear layers at a rate each. All
three come from timing the experiment's own model and work, and the same model at an eighth of its width.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log
from pathlib import Path
from statistics import median, stdev
from typing import Any

import torch
from torch import Tensor, nn

from clients.local import Local
from clients.train import train
from prfl import config, cost, groups, masks, models
from prfl.config import Experiment
from prfl.samples import Samples
from prfl.types import Architecture, Task, Work
from strategies import table

RUNS = 5
NARROW = 8


@dataclass(frozen=True)
class Timed:
    """A model's training: a mini-batch's operations by kind and its seconds; a task's besides; those of all `runs`."""

    flops: Mapping[str, float]
    step: float
    task: float = 0.0
    runs: Sequence[float] = ()


@dataclass(frozen=True)
class Training:
    """Operations per second by layer kind; seconds of a mini-batch and of a task besides; sigma of the log of times."""

    flops: Mapping[str, float]
    step: float
    task: float
    jitter: float


def training(experiment: Experiment, folder: Path | None = None, seconds: float = 1.0) -> Training:
    """How fast this device trains the experiment's model, from runs of so many seconds. Raises ValueError."""
    work, local = work_of(experiment), Local.of(experiment, folder, own=True)
    own = local.samples(0)
    some = own.subset(torch.arange(min(len(own), max(4 * work.batch, 128))))

    def timed(model: nn.Module, samples: Samples = some) -> Timed:
        return _timed(model, samples, work, seconds)

    whole, spec = timed(local.model), narrow(experiment.model)
    if spec is None:
        return fit(whole)
    thin = Local.of(experiment.model_copy(update={"model": spec}), folder, own=True).model
    small = timed(thin)
    if not all(whole.flops.values()):
        return fit(whole, small)
    parts = [_Linears(model) for model in (local.model, thin)]
    return fit(whole, small, *(timed(part, part.samples(some)) for part in parts))


def fit(whole: Timed, small: Timed | None = None, linear: Timed | None = None, least: Timed | None = None) -> Training:
    """From a model's times, those of it narrow, and those of the linear layers of both.

    Where times contradict each other less is told apart: without a narrow model that is quicker `step` is 0, without
    linear layers that save a part of what the whole model saves all kinds have one rate.
    """
    jitter = stdev([log(t) for t in whole.runs]) if len(whole.runs) > 1 else 0.0
    known = {kind: amount for kind, amount in whole.flops.items() if amount}
    if small is None or small.step >= whole.step:
        return Training(dict.fromkeys(known, sum(known.values()) / whole.step), 0.0, whole.task, jitter)
    gain, saved = {kind: amount - small.flops[kind] for kind, amount in known.items()}, whole.step - small.step
    rates = dict.fromkeys(known, sum(gain.values()) / saved)
    if linear and least and 0 < (part := linear.step - least.step) < saved:
        rates = {"conv": gain["conv"] / (saved - part), "linear": gain["linear"] / part}
    busy = sum(amount / rates[kind] for kind, amount in known.items())
    over = max(1.0, busy / whole.step)
    rates = {kind: rate * over for kind, rate in rates.items()}
    return Training(rates, whole.step - busy / over, whole.task, jitter)


def narrow(model: config.Spec) -> dict[str, Any] | None:
    """The model at an eighth of its width; None when it has no option that is one."""
    spec = config.spelled(model, models.TABLE)
    widths: dict[str, Any] = {k: _less(spec[k]) for k in ("width", "channels", "hidden") if k in spec}
    return {**spec, **widths} if widths else None


def work_of(experiment: Experiment) -> Work:
    """What the experiment's method has clients do in its first version."""
    work = table.method(experiment.method, config.work(experiment.work)).work
    return work if isinstance(work, Work) else work(0)


class _Linears(nn.Module):
    """A net of a model's linear layers; they get an input that needs a gradient, as behind convolutions."""

    def __init__(self, model: nn.Module):
        super().__init__()
        found = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.widths = [m.in_features for m in found]
        self.layers = nn.ModuleList([nn.Linear(m.in_features, m.out_features, m.bias is not None) for m in found])
        self.scale = nn.Parameter(torch.ones(()))

    def samples(self, like: Samples) -> Samples:
        """Random inputs, with these labels."""
        return Samples(torch.randn(len(like), self.widths[0], 1, 1), like.y)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) * self.scale
        for width, layer in zip(self.widths, self.layers, strict=True):
            if x.shape[1] != width:  # layers that do not follow each other
                x = x.mean(1, keepdim=True).expand(-1, width)
            x = layer(x).relu()
        return x


def _timed(model: nn.Module, samples: Samples, work: Work, seconds: float) -> Timed:
    """Training on these samples: a first task, one that tells how many steps fill the time, then the runs."""
    params = models.values(model)
    batch = min(work.batch, len(samples))
    architecture = Architecture(macs=groups.macs(model, samples.batch(torch.arange(1))[0]))
    forward = cost.flops_by_kind(params, masks.DENSE, architecture)
    flops = {kind: cost.TRAINING * batch * amount for kind, amount in forward.items()}

    def run(steps: int) -> float:
        task = Task(0, 0, params, masks.DENSE, replace(work, steps=steps, lr=1e-6), 0)
        start = time.perf_counter()
        train(task, model, samples)
        return time.perf_counter() - start

    run(2)
    steps = 4
    while (took := run(steps)) < seconds / 8:
        steps *= 2
    steps = max(steps, ceil(steps * seconds / took))
    pairs = [(run(steps), run(1)) for _ in range(RUNS)]
    step = median([(long - short) / (steps - 1) for long, short in pairs])
    return Timed(flops, step, max(0.0, median([short for _, short in pairs]) - step), [long for long, _ in pairs])


def _less(width: Any) -> Any:
    if isinstance(width, list | tuple):
        return [_less(w) for w in width]
    return max(1, width // NARROW) if isinstance(width, int) else width / NARROW
