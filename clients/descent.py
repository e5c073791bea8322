"""One step of SGD, of one client or of several whose weights are stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prfl.types import Work

Descent = Callable[[list[Tensor], slice | None], None]
"""Takes a step on gradients that it may change; of stacked weights, the rows that they are of."""


def descent(work: Work, values: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Descent:
    """Steps as torch.optim.SGD takes them, in place; proximal penalty, then clipping, then decay.

    values: as they are before the first step. masks: for each of them 1 or 0 in its shape (that of a row where values
    are stacked), None where all is held; with `Work.regrow` they may be changed between steps. Clipping is by the norm
    of all gradients together, so it is not for stacked values.
    """
    masked = [(i, mask) for i, mask in enumerate(masks) if mask is not None]
    start = [v.clone() for v in values] if work.proximal else []
    velocity = [torch.zeros_like(v) for v in values] if work.momentum else []

    def step(gradients: list[Tensor], rows: slice | None = None) -> None:
        now, before, moving = (_part(tensors, rows) for tensors in (values, start, velocity))
        for i, mask in masked:
            gradients[i].mul_(mask)
        if work.proximal:
            torch._foreach_add_(gradients, torch._foreach_sub(now, before), alpha=work.proximal)
        if work.clip:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (work.clip / (norm + 1e-6)).clamp_(max=1.0))
        if work.weight_decay:
            torch._foreach_add_(gradients, now, alpha=work.weight_decay)
        if work.momentum:
            torch._foreach_mul_(moving, work.momentum)
            torch._foreach_add_(moving, gradients)
        torch._foreach_add_(now, moving or gradients, alpha=-work.lr)
        for i, mask in masked if work.regrow else ():
            now[i].mul_(mask)

    return step


def _part(tensors: Sequence[Tensor], rows: slice | None) -> list[Tensor]:
    return list(tensors) if rows is None else [t[rows] for t in tensors]
