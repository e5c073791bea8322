"""How arrivals become the next parameters; every merge names its denominator and says where staleness acts.

Notation: W current weights, w_i local weights of arrival i, d_i their move since the task was sent, m_i its mask,
n_i its weight (samples, or 1), s_i its staleness factor, a_i = n_i s_i. Equations hold entry by entry. In all of them
what nobody holds keeps its old value, and arrivals are summed in one order, so that a batch's order does not matter.

`masked_mean`, `fedbuff` and `fedasync` do not divide by s_i: staleness damps the step, one stale update alone moves the
model less. The others divide by the sum with s_i: staleness sets the shares. BatchNorm's running statistics are
averaged as weights even where the rest is as moves (ours): old moves added up could make a variance negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch

from prfl.arrivals import key, ordered
from prfl.average import Term, Weigh, average, away, check, keep, local, shares, together, weight
from prfl.cache import buff_fed_avg, buff_mask_fed_avg, mask_fed_avg
from prfl.checks import choice, positive, share
from prfl.masks import DENSE, Mask
from prfl.optimisers import adam, momentum, statistic
from prfl.quality import by_quality
from prfl.staleness import FLAT, ROOT, Staleness
from prfl.standing import by_value
from prfl.types import Arrival, Merge, State, Task, Tree, Update
from prfl.votes import voted


@dataclass(frozen=True)
class masked_mean:
    """Mean of the moves: W + lr * sum(n s m d) / denominator; staleness damps the step (ours).

    What a weight that a client lacks counts as:
    `missing` "holders": nothing, the denominator is sum(n m); "residual": a weight that did not move, sum(n);
    "zero": a weight that became zero (it moved by -W), sum(n).
    """

    missing: Literal["holders", "residual", "zero"] = "holders"
    staleness: Staleness = FLAT
    weigh: Weigh = "samples"
    lr: float = 1.0

    def __post_init__(self) -> None:
        choice("masked_mean", "missing", self.missing, ("holders", "residual", "zero"))
        check("masked_mean", self.weigh)
        positive("masked_mean", "lr", self.lr)

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, None]:
        tasks = [(a.task, u) for a, u in ordered(arrivals)]
        counts = [weight(u, self.weigh) for _, u in tasks]
        factors = [n * self.staleness(state.version - t.version) for (t, _), n in zip(tasks, counts, strict=True)]
        votes = together([(t, u, f, n) for (t, u), f, n in zip(tasks, factors, counts, strict=True)])
        terms = ((u.mask, self._moves(state.params, t, u), f, n) for t, u, f, n in votes)
        step, count = average(state.params, terms, None if self.missing == "holders" else sum(counts))
        gone = sum(factors) / sum(counts) if self.missing == "zero" and any(counts) else 0.0
        for k, w in state.params.items():
            if gone:
                step[k].sub_(w, alpha=gone)
            step[k].mul_(min(self.lr, 1.0) if statistic(k) else self.lr).add_(w)
        return keep(count(), step, state.params) if gone else step, None

    def _moves(self, params: Tree, task: Task, update: Update) -> Tree:
        moves = {k: away(k, params, task, update) if statistic(k) else d for k, d in update.delta.items()}
        if self.missing != "zero":
            return moves
        return {k: d + update.mask.gather(k, params[k]) for k, d in moves.items()}


@dataclass(frozen=True)
class fedbuff:
    """W + lr * sum(n s m d) / K over the K arrivals of the buffer; staleness damps the step.

    FedBuff (Nguyen et al. 2022), as published for dense models with weigh "uniform" (n = 1); with "samples" K becomes
    sum(n). Missing weights are ours: "everyone" divides by all K, "holders" by those that hold the weight.
    """

    lr: float = 1.0
    missing: Literal["everyone", "holders"] = "everyone"
    staleness: Staleness = ROOT
    weigh: Weigh = "uniform"

    def __post_init__(self) -> None:
        choice("fedbuff", "missing", self.missing, ("everyone", "holders"))
        check("fedbuff", self.weigh)
        positive("fedbuff", "lr", self.lr)

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, None]:
        missing: Literal["holders", "residual"] = "holders" if self.missing == "holders" else "residual"
        return masked_mean(missing, self.staleness, self.weigh, self.lr)(state, arrivals)


@dataclass(frozen=True)
class fed_avg:
    """sum(a m w) / sum(a): a missing weight counts as a zero weight; staleness sets the shares.

    FedAvg (McMahan et al. 2017) when models are dense; "FA" of FedGMR when they are not.
    """

    staleness: Staleness = FLAT
    weigh: Weigh = "samples"

    def __post_init__(self) -> None:
        check("fed_avg", self.weigh)

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, None]:
        if all(a.update is None or a.update.mask.dense for a in arrivals):  # the same, and weights need not be made
            return gradient_avg(self.staleness, self.weigh)(state, arrivals)
        votes = shares(state, arrivals, self.staleness, self.weigh)
        terms = ((u.mask, local(t, u), a, a) for t, u, a in votes)
        mean, count = average(state.params, terms, sum(a for *_, a in votes))
        return keep(count(), mean, state.params), None


@dataclass(frozen=True)
class r2sp:
    """sum(a (m w + (1 - m) W_i)) / sum(a): a missing weight counts as what it was when the task was sent, W_i.

    Residual recovery of FedMP (Jiang et al. 2022); its average is recalled as weigh "uniform". `gradient_avg` fills
    with the current W instead, so that a stale client's old residual has no vote; both agree while all start from W.
    Staleness sets the shares.
    """

    staleness: Staleness = FLAT
    weigh: Weigh = "samples"

    def __post_init__(self) -> None:
        check("r2sp", self.weigh)

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, None]:
        votes = shares(state, arrivals, self.staleness, self.weigh)
        old = ((t.params, a) for t, _, a in votes if t.params is not state.params)
        residuals = ((DENSE, {k: (v - state.params[k]).flatten() for k, v in w.items()}, a, 0.0) for w, a in old)
        terms: list[Term] = [(u.mask, u.delta, a, a) for _, u, a in votes]
        step, count = average(state.params, chain(terms, residuals), sum(a for *_, a in votes))
        return keep(count(), {k: w + step[k] for k, w in state.params.items()}, state.params), None


@dataclass(frozen=True)
class gradient_avg:
    """W + sum(a m (w - W)) / sum(a): a missing weight counts as the current one; staleness sets the shares.

    "GA" of FedGMR. It differs from `r2sp` in the residual, which is the current W and not the task's.
    """

    staleness: Staleness = FLAT
    weigh: Weigh = "samples"

    def __post_init__(self) -> None:
        check("gradient_avg", self.weigh)

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, None]:
        votes = shares(state, arrivals, self.staleness, self.weigh)
        terms = ((u.mask, {k: away(k, state.params, t, u) for k in u.delta}, a, a) for t, u, a in votes)
        step, _ = average(state.params, terms, sum(a for *_, a in votes))
        return {k: step[k].add_(w) for k, w in state.params.items()}, None


@dataclass(frozen=True)
class fedasync:
    """W <- (1 - alpha' m) W + alpha' m w, alpha' = alpha s, one arrival after another in the order they came.

    FedAsync (Xie et al. 2019), as published for dense models and one arrival a merge; no denominator, staleness damps
    the step. The age of every arrival of a batch is counted from the version before the batch (ours).
    """

    alpha: float = 0.6
    staleness: Staleness = ROOT

    def __post_init__(self) -> None:
        share("fedasync", "alpha", self.alpha)

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, None]:
        params = {k: v.clone() for k, v in state.params.items()}
        for a in sorted(arrivals, key=lambda a: (a.at, key(a))):
            if a.update is not None:
                rate = self.alpha * self.staleness(state.version - a.task.version)
                for k in a.update.delta:
                    a.update.mask.add_into(k, params[k], away(k, params, a.task, a.update), rate)
        return params, None


@dataclass(frozen=True)
class heterofl:
    """sum(a m w) / sum(a m), by default the plain mean over the holders (HeteroFL, Diao et al. 2021).

    head: names of the output layer's entries; their row c is averaged only over clients that hold class c, which they
    say in the metrics as "class/<c>" above 0. A client that names no class counts in every row.
    """

    head: tuple[str, ...] = ()
    staleness: Staleness = FLAT
    weigh: Weigh = "uniform"

    def __post_init__(self) -> None:
        check("heterofl", self.weigh)

    def init(self) -> None:
        return None

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, None]:
        for k in self.head:
            if k not in state.params:
                raise ValueError(f"heterofl: the model has no entry {k!r} for its head; has {', '.join(state.params)}")
        votes = shares(state, arrivals, self.staleness, self.weigh)
        mean, count = average(state.params, (term for vote in votes for term in self._terms(*vote)))
        return keep(count(), mean, state.params), None

    def _terms(self, task: Task, update: Update, a: float) -> Iterable[Term]:
        values = local(task, update)
        head = self.head if any(m.startswith("class/") for m in update.metrics) else ()
        yield update.mask, {k: v for k, v in values.items() if k not in head}, a, a
        for k in head:
            full = update.mask.scatter(k, values[k], torch.zeros_like(task.params[k]))
            rows = torch.tensor([update.metrics.get(f"class/{c}", 0.0) > 0 for c in range(len(full))])
            mask = Mask({k: update.mask.where(k, full.shape) & rows.view([-1] + [1] * (full.dim() - 1))})
            yield mask, {k: mask.gather(k, full)}, a, a


TABLE: dict[str, Callable[..., Merge]] = {
    "masked_mean": masked_mean,
    "fedbuff": fedbuff,
    "fed_avg": fed_avg,
    "mask_fed_avg": mask_fed_avg,
    "buff_mask_fed_avg": buff_mask_fed_avg,
    "buff_fed_avg": buff_fed_avg,
    "r2sp": r2sp,
    "gradient_avg": gradient_avg,
    "fedasync": fedasync,
    "heterofl": heterofl,
    "momentum": momentum,
    "adam": adam,
    "by_quality": by_quality,
    "by_value": by_value,
    "voted": voted,
}
