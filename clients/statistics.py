"""What a client reports beside its weights: gradients, squared gradients or changes, as `Work.report` asks."""

from __future__ import annotations

import torch
from torch import Tensor

from prfl.masks import Mask
from prfl.types import Task, Tree, Work


def needs_gradient(work: Work) -> bool:
    """Whether the gradients of the local steps have to be collected."""
    return work.report in ("gradient", "gradient2")


def needs_dense(work: Work) -> bool:
    """Whether that includes the gradients of weights which the client does not hold."""
    return needs_gradient(work) and work.scope == "all"


def collect(total: list[Tensor] | None, gradients: list[Tensor]) -> list[Tensor]:
    """The running sum of gradients, in place after the first; `gradients` may be changed afterwards."""
    if total is None:
        return [g.clone() for g in gradients]
    torch._foreach_add_(total, gradients)
    return total


def report(task: Task, held: Mask, gradient: Tree, change: Tree, samples: int) -> Tree:
    """The statistic per trainable entry, packed in mask order or, with `Work.scope` "all", flat over the whole entry.

    gradient: of the loss alone (no proximal term, decay, clipping or mask) in the shapes of the trained network, whose
    kept weights are `held`; the sum over `Work.window`, which is all local steps (as published: PruneFL sums before it
    squares) or the last mini-batch (as published: PR-FL). change: local minus received values, packed, whatever the
    window. samples: seen in the task, repeats included.

    "gradient" is that gradient with its sign, "gradient2" its square times `samples` (as published: both), "change"
    the absolute change, zero where nothing is held. `Work.normalise` scales the values of all entries jointly.
    """
    work = task.work
    if work.report == "change":
        signal = {k: v.abs() for k, v in change.items()}
        if work.scope == "all":
            signal = {k: task.mask.scatter(k, v, torch.zeros(task.params[k].shape)).view(-1) for k, v in signal.items()}
    else:
        signal = {k: g.reshape(-1) if work.scope == "all" else held.gather(k, g) for k, g in gradient.items()}
        if work.report == "gradient2":
            signal = {k: g.square().mul_(samples) for k, g in signal.items()}
    return normalised(signal) if work.normalise else signal


def normalised(signal: Tree) -> dict[str, Tensor]:
    """Min-max scaled to [0, 1] over all entries together (as published: PR-FL); all zero if all values are equal."""
    low = min((float(v.min()) for v in signal.values() if len(v)), default=0.0)
    high = max((float(v.max()) for v in signal.values() if len(v)), default=0.0)
    return {k: (v - low) / ((high - low) or 1.0) for k, v in signal.items()}
