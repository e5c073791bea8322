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
    """The `score` of a model, given as a skeleton, which is left as it was, and its `params`; see `ready`."""
    return score(ready(params, model, batch, calibrate), samples, batch)


def ready(params: Tree, model: nn.Module, batch: int = 500, calibrate: Samples | None = None) -> nn.Module:
    """A network of its own to be scored. ValueError: params that do not fit.

    params: of the whole model; a client's part is `mask.apply(params)`.
    calibrate: BatchNorm's running statistics are first taken anew from these samples, as the mean over batches of
    `batch`, with all weights frozen (as published: HeteroFL).
    """
    net = deepcopy(model).eval().to(memory_format=torch.channels_last)
    models.load(net, params)
    if calibrate is not None:
        with torch.inference_mode():
            estimate_norms(net, calibrate, batch)
    return net


def score(net: nn.Module, samples: Samples, batch: int = 500, macro: bool = False) -> dict[str, float]:
    """Mean cross-entropy `loss`, `accuracy`, with more than five classes `top5`, and the number of `samples`.

    macro: `precision`, `recall` and `f1` too, each the mean over the classes that occur; 0 for one that is never
    predicted. ValueError: no samples.
    """
    if not len(samples):
        raise ValueError("evaluate: no samples")
    loss = right = right5 = 0.0
    predicted = torch.empty_like(samples.y)
    with torch.inference_mode():
        for at in torch.split(torch.arange(len(samples)), batch):
            x, y = samples.batch(at)
            logits = net(x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += _hits(logits, y, 1)
            right5 += _hits(logits, y, 5)
            predicted[at] = logits.argmax(1)
    scores = {"loss": loss, "accuracy": right} | ({"top5": right5} if logits.shape[1] > 5 else {})
    means = {k: v / len(samples) for k, v in scores.items()} | {"samples": float(len(samples))}
    return means | (_macro(samples.y, predicted) if macro else {})


def _macro(y: Tensor, predicted: Tensor) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    found = precision_recall_fscore_support(y.numpy(), predicted.numpy(), average="macro", zero_division=0.0)
    return dict(zip(("precision", "recall", "f1"), map(float, found[:3]), strict=True))


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
