"""Several clients' fully connected networks trained at once: their small products are one batched product.

Forward and backward passes are written out, and gradients are added where they belong by the product that makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from math import isfinite

import torch
from torch import Tensor, nn

from clients.asked import planned, received
from clients.outcome import Diverged, check, told
from prfl.samples import Samples
from prfl.types import Task, Tree, Update, Work

SIMPLE = ("epochs", "steps", "batch", "lr", "momentum", "weight_decay", "proximal")
"""What may differ from the default in work that is done stacked."""

Descent = Callable[[str, Tensor, Tensor, slice], None]
"""A step of one entry, of the clients in these rows, whose gradient is left^T right."""


def stackable(model: nn.Module, work: Work) -> bool:
    """Whether clients of this model can do this work stacked: linear layers with ReLU between, and plain SGD."""
    usual = Work()
    return bool(_layers(model)) and replace(work, **{k: getattr(usual, k) for k in SIMPLE}) == usual


def train(tasks: Sequence[Task], model: nn.Module, samples: Sequence[Samples]) -> list[Update | Diverged]:
    """What `clients.train.train` makes of each task, but for rounding; Diverged in place of what came to nothing.

    tasks: of one version, mask and work, see `stackable`. samples: of each task's client, at least one; all of the
    same kind. Clients may have different numbers of them: those whose next batches are equally large step together.
    """
    first, count = tasks[0], [len(s) for s in samples]
    net, values, held = received(first, model)
    start, layers = held.apply(values), _layers(net)
    stack = {k: v.expand(len(tasks), *v.shape).clone() for k, v in start.items()}
    descend = _descent(first.work, stack, start, held.bits)
    data = replace(samples[0], x=torch.cat([s.x for s in samples]), y=torch.cat([s.y for s in samples]))
    plans = [planned(task, n, whole=False) for task, n in zip(tasks, count, strict=True)]
    losses: list[list[float]] = [[] for _ in tasks]
    right = [0] * len(tasks)
    for rows, at in _together(plans, count):
        x, y = data.batch(at)
        means, hits = _learn(layers, {k: v[rows] for k, v in stack.items()}, x.flatten(2), y, descend, rows)
        for i, loss, hit in zip(range(rows.start, rows.stop), means.tolist(), hits.tolist(), strict=True):
            losses[i].append(loss)
            right[i] += hit
    moves = {k: v.sub_(start[k]) for k, v in stack.items()}
    sums = torch.stack([v.flatten(1).sum(1) for v in moves.values()]).sum(0).tolist()
    ended: list[Update | Diverged] = []
    for i, task in enumerate(tasks):
        delta = {k: held.gather(k, move[i]) for k, move in moves.items()}
        if not isfinite(sums[i] + sum(losses[i])):
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


def _together(plans: Sequence[Sequence[Tensor]], count: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Step by step, neighbours whose batches are equally large: their rows, and (S, B) indices of all samples in a row.

    Who has no batch left is in none. count: samples of each client.
    """
    longest = max(map(len, plans))
    steps = [[plan[step] if step < len(plan) else plan[0][:0] for plan in plans] for step in range(longest)]
    sizes = [[len(batch) for batch in batches] for batches in steps]
    starts = torch.tensor([sum(count[:i]) for i in range(len(count))] * longest)
    index = torch.cat([batch for batches in steps for batch in batches])
    index += starts.repeat_interleave(torch.tensor(sizes).flatten())
    done = 0
    for row in sizes:
        low = 0
        for size, same in groupby(row):
            rows = slice(low, low + len(list(same)))
            if size:
                yield rows, index[done : done + size * (rows.stop - low)].view(-1, size)
            done, low = done + size * (rows.stop - low), rows.stop


def _descent(work: Work, stack: Tree, start: Tree, bits: Tree) -> Descent:
    """Steps as torch.optim.SGD takes them, in place. bits: what is held of an entry, all else stays 0."""
    plain = not (work.momentum or work.weight_decay or work.proximal)
    velocity = {} if plain else {k: torch.zeros_like(v) for k, v in stack.items()}
    shut = {k: v.to(start[k].dtype) for k, v in bits.items()}

    def step(k: str, left: Tensor, right: Tensor, rows: slice) -> None:
        now = stack[k][rows]
        if plain:
            _as_matrix(now).baddbmm_(left.mT, right, alpha=-work.lr)
        else:
            moving = velocity[k][rows]
            _as_matrix(moving).baddbmm_(left.mT, right, beta=work.momentum)
            if work.weight_decay:
                moving.add_(now, alpha=work.weight_decay)
            if work.proximal:
                moving.add_(now - start[k], alpha=work.proximal)
            now.add_(moving, alpha=-work.lr)
        if k in shut:
            now.mul_(shut[k])

    return step


def _as_matrix(value: Tensor) -> Tensor:
    """A bias is a column."""
    return value[..., None] if value.dim() == 2 else value


def _learn(
    layers: Sequence[str], weights: Tree, x: Tensor, y: Tensor, descend: Descent, rows: slice
) -> tuple[Tensor, Tensor]:
    """A step on the mean cross-entropy; each client's loss, and how many samples it told rightly, before the step.

    weights: (S, ...), x: (S, B, inputs), y: (S, B), for S clients with a batch of B samples each.
    """
    inputs = []
    for name in layers:
        x = x if name == layers[0] else x.relu_()
        inputs.append(x)
        x = torch.baddbmm(weights[f"{name}.bias"][:, None], x, weights[f"{name}.weight"].mT)
    log, label = x.log_softmax(2), y[..., None]
    slope = log.exp().scatter_add_(2, label, x.new_full(label.shape, -1.0)).div_(y.shape[1])
    ones = x.new_ones(*y.shape, 1)
    for name, given in zip(reversed(layers), reversed(inputs), strict=True):
        up = slope
        if name != layers[0]:
            slope = up.bmm(weights[f"{name}.weight"]).masked_fill_(given <= 0, 0.0)
        descend(f"{name}.weight", up, given, rows)
        descend(f"{name}.bias", up, ones, rows)
    return log.gather(2, label).mean((1, 2)).neg(), (log.argmax(2) == y).sum(1)
