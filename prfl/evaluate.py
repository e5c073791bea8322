"""Scores of a model on samples that it did not train on."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prfl import models
from prfl.samples import Samples, batches
from prfl.types import Tree


def evaluate(
    params: Tree, model: nn.Module, samples: Samples, batch: int = 500, calibrate: Samples | None = None
) -> dict[str, float]:
    """Mean cross-entropy `loss`, `accuracy`, with more than five classes `top5`, and the number of `samples`.

    params: of the whole model; a client's part is `mask.apply(params)`. model: a skeleton, left as it was.
    calibrate: BatchNorm's running statistics are first taken anew from these samples, as the mean over batches of
    `batch`, with all weights frozen (as published: HeteroFL). ValueError: no samples; params that do not fit.
    """
    if not len(samples):
        raise ValueError("evaluate: no samples")
    net = deepcopy(model).eval().to(memory_format=torch.channels_last)
    models.load(net, params)
    loss = right = right5 = 0.0
    with torch.inference_mode():
        if calibrate is not None:
            estimate_norms(net, calibrate, batch)
        for at in torch.split(torch.arange(len(samples)), batch):
            x, y = samples.batch(at)
            logits = net(x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += _hits(logits, y, 1)
            right5 += _hits(logits, y, 5)
    scores = {"loss": loss, "accuracy": right} | ({"top5": right5} if logits.shape[1] > 5 else {})
    return {k: v / len(samples) for k, v in scores.items()} | {"samples": float(len(samples))}


def _hits(logits: Tensor, y: Tensor, best: int) -> float:
    """How many labels are among the `best` largest logits."""
    return float((logits.topk(min(best, logits.shape[1])).indices == y[:, None]).sum())


def estimate_norms(net: nn.Module, samples: Samples, batch: int = 500) -> None:
    """Take a network's BatchNorm statistics anew, in place: the mean over batches of `batch` samples."""
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for at in batches(torch.arange(len(samples)), batch, whole=True):
        net(samples.batch(at)[0])
    net.eval()
