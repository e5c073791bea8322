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
class change:
    """How far clients moved the weight, the mean of |local - received|."""

    needs: ClassVar[str] = "change"

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        return _scored(params, signal, lambda w, moved: moved)


@dataclass(frozen=True)
class l1_filter:
    """sum |w| of the filter or neuron that a weight belongs to, biases apart (Li et al. 2017), over its weights.

    All weights of a filter have one score: with `Cut(unit="channels", by="filter")` a channel's is the filter's norm.

    >>> l1_filter()({"w": torch.tensor([[1.0, -3.0], [0.5, 0.5]])}, None)
    {'w': tensor([[2.0000, 2.0000],
            [0.5000, 0.5000]])}
    """

    needs: ClassVar[str] = ""

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        return {k: _spread(v.abs().flatten(1).sum(1), v) if v.dim() > 1 else v.abs() for k, v in params.items()}


@dataclass(frozen=True)
class gdp:
    """|sum w g + b dL/db| of the filter or neuron that a weight belongs to, over its weights (GDP, Lin et al. 2018).

    The change of the loss when the whole filter becomes zero. As published with
    `Cut(unit="channels", by="filter", spread="model", width="linear")`, one order of all filters of the network, and
    `Work.scope` "all", so that filters that were cut are scored too and can come back. The mean over clients is taken
    of g, before the product (published: of the score). A filter is scored by those of its weights that were reported.
    """

    needs: ClassVar[str] = "gradient"

    def __call__(self, params: Tree, signal: Tree | None) -> Tree:
        products = {k: (params[k] * g).clamp(-_MAX, _MAX) for k, g in (signal or {}).items() if k in params}
        scores = {}
        for k, v in products.items():
            if v.dim() > 1:
                total = (
                    v.flatten(1).nansum(1)
                    + products.get(f"{k.removesuffix('weight')}bias", v.new_zeros(1)).nan_to_num()
                )
                unseen = v.isnan().flatten(1).all(1)
                scores[k] = _spread(total.abs().masked_fill(unseen, torch.nan), v)
        return _scored(params, products | scores, lambda w, score: score.abs())


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


def _spread(filters: Tensor, over: Tensor) -> Tensor:
    """A value a filter, dealt out evenly to its weights."""
    return (filters / over[0].numel()).view([-1] + [1] * (over.dim() - 1)).expand_as(over).clone()


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
    "change": change,
    "l1_filter": l1_filter,
    "gdp": gdp,
    "signal": signal,
    "order": order,
    "random": random,
}
