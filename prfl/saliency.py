"""What matters: scores shaped like the parameters, larger is kept longer; always finite.

A score of the clients' report falls back on magnitude |w| while nothing is known. A weight that nobody has reported yet
(NaN) comes below every observed one of the model, larger |w| first (PR-FL's fill of unobserved weights; placing them
below is ours, since its factor, the least observed score, was often 0 and then left them unordered).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal
from zlib import crc32

import torch
from torch import Tensor

from prfl.types import Saliency, Tree

_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class magnitude:
    """|w|.

    >>> magnitude()({"w": torch.tensor([-2.0, 1.0])}, None)
    {'w': tensor([2., 1.])}
    """

    needs: ClassVar[str] = ""

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        return {k: v.abs() for k, v in params.items()}


@dataclass(frozen=True)
class gradient:
    """|g|, the size of the clients' mean gradient."""

    needs: ClassVar[str] = "gradient"

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        return _scored(params, signal, lambda w, g: g.abs())


@dataclass(frozen=True)
class gradient2:
    """g^2 as the clients report it, already squared (PruneFL, PR-FL)."""

    needs: ClassVar[str] = "gradient2"

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        return _scored(params, signal, lambda w, g2: g2)


@dataclass(frozen=True)
class taylor:
    """|w g|, the first-order change of the loss when the weight becomes zero (Molchanov et al. 2019)."""

    needs: ClassVar[str] = "gradient"

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        return _scored(params, signal, lambda w, g: (w * g).abs())


@dataclass(frozen=True)
class signal:
    """The clients' report as it is, whichever `report` asks for: "gradient", "gradient2" or "change"."""

    report: Literal["gradient", "gradient2", "change"] = "gradient2"

    def __post_init__(self) -> None:
        if self.report not in ("gradient", "gradient2", "change"):
            raise ValueError(f"signal: report must be one of gradient, gradient2, change, got {self.report!r}")

    @property
    def needs(self) -> str:
        return self.report

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        return _scored(params, signal, lambda w, reported: reported)


@dataclass(frozen=True)
class order:
    """Minus the sum of a weight's indices: the leading channels of every group win (HeteroFL, FjORD).

    >>> order()({"w": torch.zeros(2, 3)}, None)
    {'w': tensor([[ 0., -1., -2.],
            [-1., -2., -3.]])}
    """

    needs: ClassVar[str] = ""

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        return {k: _order(v) for k, v in params.items()}


@dataclass(frozen=True)
class random:
    """Uniform in [0, 1), the same at every call: `seed` and an entry's name and shape settle its scores."""

    seed: int = 0
    needs: ClassVar[str] = ""

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        def draw(entry: str) -> torch.Generator:
            return torch.Generator().manual_seed(crc32(f"{self.seed}/{entry}".encode()))

        return {k: torch.rand(v.shape, generator=draw(k)) for k, v in params.items()}


def _order(tensor: Tensor) -> Tensor:
    scores = torch.zeros(tensor.shape)
    for axis, size in enumerate(tensor.shape):
        scores -= torch.arange(size).view([-1 if a == axis else 1 for a in range(tensor.dim())])
    return scores


def _scored(params: Tree, signal: Tree | None, score: Callable[[Tensor, Tensor], Tensor]) -> Tree:
    """score(w, reported) where reported; below it, by |w|, where not; |w| everywhere before the first report."""
    scores = {k: score(w, signal[k]).clamp(-_MAX, _MAX) for k, w in params.items() if k in signal} if signal else {}
    seen = {k: ~v.isnan() for k, v in scores.items()}
    observed = [v[seen[k]] for k, v in scores.items() if seen[k].any()]
    if not observed:
        return {k: v.abs() for k, v in params.items()}
    if len(scores) == len(params) and all(bool(s.all()) for s in seen.values()):
        return scores
    low, high = min(float(v.min()) for v in observed), max(float(v.max()) for v in observed)
    gap = max(1e-3 * max(high - low, abs(low)), 1e-30)  # small, so that sums over channels keep their order
    top = max([float(v.abs().max()) for v in params.values() if v.numel()] + [1e-30])
    below = {k: (low - gap * (2 - w.abs() / top)).clamp(-_MAX, _MAX) for k, w in params.items()}
    return {k: torch.where(seen[k], scores[k], below[k]) if k in scores else below[k] for k in params}


TABLE: dict[str, Callable[..., Saliency]] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "gradient2": gradient2,
    "taylor": taylor,
    "signal": signal,
    "order": order,
    "random": random,
}
