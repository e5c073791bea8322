"""What a task asks for: the network to train, and the mini-batches to train it on."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from clients import statistics
from clients.shrink import hollow, shrink, sliced_bits, values
from prfl.masks import Mask
from prfl.models import entries
from prfl.samples import batches
from prfl.types import Task, Tree

_SMALL: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Mask, tuple[nn.Module, Mask]]] = WeakKeyDictionary()
# by model and mask: the skeleton, copied once, and the single weights that are held of it


def received(task: Task, model: nn.Module) -> tuple[nn.Module, Tree, Mask]:
    """The network to train, its values, and which single weights of it are held. ValueError: they do not fit."""
    mask, params = task.mask, task.params
    if {k: v.shape for k, v in entries(model).items()} != {k: v.shape for k, v in params.items()}:
        raise ValueError(f"client {task.client}: the task's parameters do not fit the model")
    if not mask.channels:
        return model, params, mask
    if statistics.needs_dense(task.work):
        return model, params, Mask({k: mask.where(k, v.shape) for k, v in params.items() if not mask.whole(k)})
    known = _SMALL.setdefault(model, WeakKeyDictionary())
    if mask not in known:
        bits = {k: sliced_bits(mask, k) for k in mask.bits}
        known[mask] = hollow(shrink(model, mask)), Mask({k: v for k, v in bits.items() if v is not None})
    small, held = known[mask]
    return small, values(model, mask, params), held


def planned(task: Task, samples: int, whole: bool) -> list[Tensor]:
    """The sample indices of every mini-batch, reshuffled each pass. whole: batches of one are not possible."""
    work = task.work
    if work.batch < 1 or max(work.steps, work.epochs) < 1:
        raise ValueError(f"work: need batch and epochs or steps above 0, got {work.batch}, {work.epochs}, {work.steps}")
    if not samples:
        raise ValueError(f"client {task.client} has no samples to train on")
    if whole and min(samples, work.batch) < 2:
        raise ValueError(
            f"client {task.client}: BatchNorm needs batches of two or more, got {samples} samples, batch {work.batch}"
        )
    generator = torch.Generator().manual_seed(task.seed)
    plan: list[Tensor] = []
    passes = 0
    while len(plan) < work.steps if work.steps else passes < work.epochs:
        plan += batches(torch.randperm(samples, generator=generator), work.batch, whole)
        passes += 1
    return plan[: work.steps] if work.steps else plan
