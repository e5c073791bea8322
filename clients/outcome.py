"""What training came to: its metrics, or that it diverged."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from prfl.types import Tree, Work


class Diverged(ValueError):
    """Local training came to values that are not finite."""


def check(losses: Sequence[float], delta: Tree, work: Work) -> None:
    """Raises Diverged where a step's loss or a weight is not finite."""
    for step, loss in enumerate(losses, 1):
        if not isfinite(loss):
            raise Diverged(f"loss became {loss:g} at step {step} (lr {work.lr:g})")
    if not isfinite(sum(float(v.sum()) for v in delta.values())):
        raise Diverged(f"weights became infinite or nan at step {len(losses)} (lr {work.lr:g})")


def told(losses: Sequence[float], sizes: Sequence[int], right: int) -> dict[str, float]:
    """The metrics of every update, from each step's mean loss and batch size, and the samples told rightly."""
    seen, steps = sum(sizes), len(sizes)
    mean = sum(v * n for v, n in zip(losses, sizes, strict=True)) / seen
    means = {"loss": mean, "loss_first": losses[0], "loss_last": losses[-1], "accuracy": right / seen}
    return means | {"samples": float(seen), "steps": float(steps)}
