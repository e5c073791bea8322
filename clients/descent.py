"""One step of SGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prfl.types import Work

Descent = Callable[[list[Tensor]], None]
"""Takes a step on gradients, which it may change."""


def descent(work: Work, values: list[Tensor], masks: Sequence[Tensor | None]) -> Descent:
    """Steps as torch.optim.SGD takes them, in place; proximal penalty, then clipping, then decay.

    values: as they are before the first step. masks: for each of them 1 or 0 in its shape, None where all is held;
    with `Work.regrow` they may be changed between steps. Clipping is by the norm of all gradients together.
    """
    masked = [(i, mask) for i, mask in enumerate(masks) if mask is not None]
    start = [v.clone() for v in values] if work.proximal else []
    velocity = [torch.zeros_like(v) for v in values] if work.momentum else []

    def step(gradients: list[Tensor]) -> None:
        for i, mask in masked:
            gradients[i].mul_(mask)
        if work.proximal:
            torch._foreach_add_(gradients, torch._foreach_sub(values, start), alpha=work.proximal)
        if work.clip:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, (work.clip / (norm + 1e-6)).clamp_(max=1.0))
        if work.weight_decay:
            torch._foreach_add_(gradients, values, alpha=work.weight_decay)
        if work.momentum:
            torch._foreach_mul_(velocity, work.momentum)
            torch._foreach_add_(velocity, gradients)
        torch._foreach_add_(values, velocity or gradients, alpha=-work.lr)
        for i, mask in masked if work.regrow else ():
            values[i].mul_(mask)

    return step
