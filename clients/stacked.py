"""Several clients' fully connected networks trained at once: their small products are one batched product.

The arithmetic is that of `clients.train`, product by product, so that results are the same to the bit wherever the
library's batched products are: `clients.local` looks whether they are before it relies on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clients.descent import descent
from clients.train import Diverged, check, planned, received, told
from prfl.samples import Samples
from prfl.types import Task, Tree, Update, Work

SIMPLE = ("epochs", "steps", "batch", "lr", "momentum", "weight_decay", "proximal")
"""What may differ from the default in work that is done stacked."""


def stackable(model: nn.Module, work: Work) -> bool:
    """Whether clients of this model can do this work stacked: linear layers with ReLU between, and plain SGD."""
    usual = Work()
    return bool(_layers(model)) and replace(work, **{k: getattr(usual, k) for k in SIMPLE}) == usual


def train(tasks: Sequence[Task], model: nn.Module, samples: Sequence[Samples]) -> list[Update | Diverged]:
    """What `clients.train.train` makes of each task; Diverged in place of an update that came to nothing.

    tasks: of one version, mask and work, see `stackable`. samples: of each task's client, at least one; all of the
    same kind. Clients may have different numbers of them: those whose next batches are equally large step together.
    """
    first, count = tasks[0], [len(s) for s in samples]
    net, values, held = received(first, model)
    start, layers = held.apply(values), _layers(net)
    stack = {k: v.expand(len(tasks), *v.shape).clone() for k, v in start.items()}
    descend = descent(first.work, list(stack.values()), [_shut(held.bits.get(k), v) for k, v in start.items()])
    data = replace(samples[0], x=torch.cat([s.x for s in samples]), y=torch.cat([s.y for s in samples]))
    starts = [sum(count[:i]) for i in range(len(count))]
    plans = [planned(task, n, whole=False) for task, n in zip(tasks, count, strict=True)]
    losses: list[list[float]] = [[] for _ in tasks]
    right = [0] * len(tasks)
    for step in range(max(map(len, plans))):
        for rows in _together([plan[step : step + 1] for plan in plans]):
            at = torch.stack([plans[i][step] + starts[i] for i in range(rows.start, rows.stop)])
            x, y = data.batch(at)
            weights = {k: v[rows] for k, v in stack.items()}
            gradients, means, hits = _gradients(layers, weights, x.flatten(2), y)
            descend([gradients[k] for k in stack], rows)
            for i, loss, hit in zip(range(rows.start, rows.stop), means.tolist(), hits.tolist(), strict=True):
                losses[i].append(loss)
                right[i] += hit
    moves = {k: v - start[k] for k, v in stack.items()}
    ended: list[Update | Diverged] = []
    for i, task in enumerate(tasks):
        delta = {k: held.gather(k, move[i]) for k, move in moves.items()}
        try:
            check(losses[i], delta, task.work)
        except Diverged as reason:
            ended.append(reason)
            continue
        metrics = told(losses[i], [len(at) for at in plans[i]], right[i])
        ended.append(Update(task.client, task.version, delta, task.mask, float(count[i]), metrics))
    return ended


def _layers(model: nn.Module) -> list[str]:
    """The names of the linear layers, if the model is these with ReLU between them and nothing else; else none."""
    if not isinstance(model, nn.Sequential):
        return []
    parts = dict(model.named_children())
    names = [k for k, layer in parts.items() if isinstance(layer, nn.Linear) and layer.bias is not None]
    kinds = [type(layer) for layer in parts.values()]
    return names if kinds == [nn.Flatten, nn.Linear, *(nn.ReLU, nn.Linear) * (len(names) - 1)] else []


def _shut(bits: Tensor | None, value: Tensor) -> Tensor | None:
    return None if bits is None else bits.to(value.dtype)


def _together(batches: Sequence[Sequence[Tensor]]) -> Iterator[slice]:
    """Neighbours whose batches are equally large, as rows; who has no batch left is in none."""
    sizes = [len(batch[0]) if batch else 0 for batch in batches]
    edges = [0]
    for _, same in groupby(sizes):
        edges.append(edges[-1] + len(list(same)))
    return (slice(a, b) for a, b in pairwise(edges) if sizes[a])


def _gradients(layers: Sequence[str], weights: Tree, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Of the mean cross-entropy, by hand; each client's loss, and how many samples it told rightly.

    weights: (S, ...), x: (S, B, inputs), y: (S, B), for S clients with a batch of B samples each.
    """
    inputs = []
    for name in layers:
        x = x if name == layers[0] else x.relu_()
        inputs.append(x)
        x = torch.baddbmm(weights[f"{name}.bias"][:, None], x, weights[f"{name}.weight"].mT)
    logits = x.requires_grad_()
    with torch.enable_grad():
        each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        (slope,) = torch.autograd.grad(each, logits, torch.full_like(each, 1 / y.shape[1]))
    found = {}
    for name, given in zip(reversed(layers), reversed(inputs), strict=True):
        found[f"{name}.weight"] = slope.mT.bmm(given)
        found[f"{name}.bias"] = slope.sum(1)
        if name != layers[0]:
            slope = slope.bmm(weights[f"{name}.weight"]).masked_fill_(given <= 0, 0.0)
    log = logits.detach().log_softmax(2)
    means = torch.stack([F.nll_loss(a, b) for a, b in zip(log, y, strict=True)])  # a mean over rows rounds otherwise
    return found, means, (log.argmax(2) == y).sum(1)
