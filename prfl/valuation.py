"""What an update was worth: by what it does to the model, or by how it differs from the others.

A value belongs to one arrival of one merge; over merges the values of a client's updates add up, so that a value is
what the merge added to the client's (ours: the delta value of the thesis). d_i: an update's move, 0 where its client
holds nothing; n_i: its weight. BatchNorm's running statistics are left aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from prfl.arrivals import key, ordered
from prfl.average import average
from prfl.checks import choice, positive
from prfl.optimisers import statistic
from prfl.shapley import Metric, check, gtg_shapley, scored, tmc_shapley
from prfl.types import Arrival, State, Tree, Update, Valuation, Worth


@dataclass(frozen=True)
class none:
    """No values: what uses them does without."""

    judged: ClassVar[bool] = False

    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]:
        return []


@dataclass(frozen=True)
class loss_decrease:
    """The fall of the loss in the merge, the same for all its updates: FedMP's delta loss.

    by "validation": the global loss, v(all) - v(nobody) on the server, as recalled; "clients": the mean by n_i of the
    loss of their first less their last mini-batch (ours; noisier, but the server needs no data).
    """

    by: Literal["validation", "clients"] = "validation"

    def __post_init__(self) -> None:
        choice("loss_decrease", "by", self.by, ("validation", "clients"))

    @property
    def judged(self) -> bool:
        return self.by == "validation"

    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]:
        if self.judged:
            return [scored(worth(arrivals), "loss") - scored(worth([]), "loss")] * len(arrivals)
        updates = [_update(a) for a in arrivals]
        for u in updates:
            if not {"loss_first", "loss_last"} <= u.metrics.keys():
                known = ", ".join(u.metrics) or "nothing"
                raise ValueError(f"loss_decrease: client {u.client} reports no loss_first and loss_last; only {known}")
        fall = sum(u.weight * (u.metrics["loss_first"] - u.metrics["loss_last"]) for u in updates)
        return [fall / sum(u.weight for u in updates)] * len(updates)


@dataclass(frozen=True)
class accuracy_delta:
    """What the score gains by an update: v(it) - v(nobody), or with against "others" v(all) - v(all but it).

    v(A): the score of what A alone would be merged into; metric "loss": minus the loss.
    """

    against: Literal["nobody", "others"] = "nobody"
    metric: Metric = "accuracy"
    judged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        choice("accuracy_delta", "against", self.against, ("nobody", "others"))
        check("accuracy_delta", self.metric)

    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]:
        if self.against == "nobody":
            before = scored(worth([]), self.metric)
            return [scored(worth([a]), self.metric) - before for a in arrivals]
        full = scored(worth(arrivals), self.metric)
        return [full - scored(worth([b for b in arrivals if b is not a]), self.metric) for a in arrivals]


@dataclass(frozen=True)
class similarity:
    """cos(d_i, m), m = sum(n d / |d|) / sum(n) over the holders of each weight (CGSV, Xu et al. 2021; recalled).

    Directions alone count, so that who moves far does not set what the others are measured by. Ours: compared over the
    weights that the client holds. From -1 to 1; 0 for an update that moved nothing.
    """

    judged: ClassVar[bool] = False

    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]:
        updates = [_update(a) for a in arrivals]
        moves = [_unit(_moves(u)) for u in updates]
        mean, _ = average(state.params, ((u.mask, d, u.weight, u.weight) for u, d in zip(updates, moves, strict=True)))
        values = []
        for u, d in zip(updates, moves, strict=True):
            towards = _unit({k: u.mask.gather(k, mean[k]) for k in d})
            values.append(sum(float(v.double() @ towards[k].double()) for k, v in d.items()))
        return values


@dataclass(frozen=True)
class diversity:
    """det(G + eps I) over that without i's row, less eps; G: the Gram matrix of the d_i / |d_i|.

    The part of the volume (Xu et al. 2021, the determinant of the left Gram matrix) that i's direction adds: the
    squared distance from the span of the others, 1 for one at right angles to all, 0 for a copy. The ratio is ours.
    """

    eps: float = 1e-3
    judged: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("diversity", "eps", self.eps)

    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]:
        gram = np.zeros((len(arrivals), len(arrivals)))
        for rows in _entries(state.params, [_update(a) for a in arrivals]):
            gram += (rows @ rows.T).double().numpy()
        length = np.sqrt(gram.diagonal())
        length[length == 0] = 1.0
        inverse = np.linalg.inv(gram / np.outer(length, length) + self.eps * np.eye(len(arrivals)))
        return [float(1 / x - self.eps) for x in inverse.diagonal()]


@dataclass(frozen=True)
class uncertainty:
    """How much less uncertain the parameters are for an update: mean over the weights of

    1/2 log((c + F) / (c + F - F_i)), F_i = n_i d_i^2, F = sum F_i, c = `prior` times the mean of F (all ours): the gain
    of information about parameters whose precision is the squared moves, as an empirical Fisher diagonal, and c before.
    A weight that few hold gains most from each of them.
    """

    prior: float = 1.0
    judged: ClassVar[bool] = False

    def __post_init__(self) -> None:
        positive("uncertainty", "prior", self.prior)

    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]:
        updates = [_update(a) for a in arrivals]
        n = torch.tensor([[u.weight] for u in updates], dtype=torch.float64)
        total, size = 0.0, 0
        for rows in _entries(state.params, updates):
            total, size = total + float((n * rows.double().square()).sum()), size + rows.shape[1]
        prior = self.prior * total / max(1, size)
        if not prior:
            return [0.0] * len(updates)
        gain = torch.zeros(len(updates), dtype=torch.float64)
        for rows in _entries(state.params, updates):
            fisher = n * rows.double().square()
            both = prior + fisher.sum(dim=0)
            gain -= 0.5 * torch.log1p(-(fisher / both)).sum(dim=1)
        return [float(g) / size for g in gain]


def valued(
    part: Valuation, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
) -> list[Arrival]:
    """The arrivals, those with an update with what it was worth; a value that is no number is 0."""
    came = [a for a, _ in ordered(arrivals)]
    values = part(state, came, worth, rng) if came else []
    known = {key(a): v if isfinite(v) else 0.0 for a, v in zip(came, values, strict=False)}
    return [replace(a, value=known.get(key(a)) if a.update else None) for a in arrivals]


def _update(arrival: Arrival) -> Update:
    if arrival.update is None:
        raise ValueError(f"client {arrival.task.client}: no update to value")
    return arrival.update


def _moves(update: Update) -> Tree:
    return {k: d for k, d in update.delta.items() if not statistic(k)}


def _unit(tree: Tree) -> Tree:
    """Packed values as a vector of length 1; as they are where all are 0."""
    size = sum(float(v.double().square().sum()) for v in tree.values()) ** 0.5
    return {k: v / size for k, v in tree.items()} if size else tree


def _entries(params: Tree, updates: Sequence[Update]) -> Iterator[Tensor]:
    """Of every entry the moves, a row an update."""
    for k, w in params.items():
        if not statistic(k):
            zero = torch.zeros_like(w)
            yield torch.stack([u.mask.scatter(k, u.delta[k], zero).view(-1) for u in updates])


TABLE: dict[str, Callable[..., Valuation]] = {
    "none": none,
    "loss_decrease": loss_decrease,
    "accuracy_delta": accuracy_delta,
    "similarity": similarity,
    "diversity": diversity,
    "uncertainty": uncertainty,
    "tmc_shapley": tmc_shapley,
    "gtg_shapley": gtg_shapley,
}
