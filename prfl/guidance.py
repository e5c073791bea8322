"""Which weights matter by how far clients moved them: scores scaled by tensor, masks cut from them (AutoFLIP)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal, Protocol

import torch
from torch import Tensor

from prfl.arrivals import ordered
from prfl.checks import least, share
from prfl.masks import DENSE, Mask
from prfl.optimisers import statistic
from prfl.types import Arrival, Group, Tree

Scaling = Literal["minmax", "robust"]
Unit = Literal["weights", "channels", "hybrid"]
Rule = Literal["mean", "dead"]

Evidence = Mapping[int, tuple[float, Tree]]
"""By client its weight and its votes, shaped like the parameters: 1 for a weight it would keep, 0, NaN for no vote."""


class Agreement(Protocol):
    """From the scores that the mask was cut from to those that the next one is cut from; the same: it stays."""

    def __call__(self, scores: Tree, evidence: Evidence, version: int) -> Tree: ...


@dataclass(frozen=True)
class settled:
    """No agreement is asked for: the mask of the exploration stays."""

    def __call__(self, scores: Tree, evidence: Evidence, version: int) -> Tree:
        return scores


@dataclass(frozen=True)
class votes:
    """score <- score (1 - rate (1 - A)), A: the part of the voters, by weight, that would keep the weight (ours).

    Every `every` versions, of that version's clients. A weight without a vote, as all that are pruned, keeps its score,
    so it comes back when those that are kept fall below it. The formula of AutoFLIP's later versions is not public.
    """

    rate: float = 0.1
    every: int = 10

    def __post_init__(self) -> None:
        share("votes", "rate", self.rate)
        least("votes", "every", self.every, 1)

    def __call__(self, scores: Tree, evidence: Evidence, version: int) -> Tree:
        if version % self.every or not evidence:
            return scores
        out = {}
        for k, score in scores.items():
            cast = [(weight, vote[k]) for weight, vote in evidence.values()]
            yes = sum(weight * vote.nan_to_num(0.0) for weight, vote in cast)
            all_of = sum(weight * (~vote.isnan()).float() for weight, vote in cast)
            assert isinstance(yes, Tensor)
            assert isinstance(all_of, Tensor)
            out[k] = score * (1 - self.rate * torch.where(all_of > 0, 1 - yes / all_of, 0.0))
        return out


def guidance(total: Tree, count: Tree, scaling: Scaling) -> Tree:
    """The unweighted mean deviation of every weight and bias, scaled within its tensor.

    What nobody held (ours) counts as what moved least.
    """
    return {k: _scaled(total[k] / count[k], scaling) for k in total if not statistic(k)}


def mean(deviations: Sequence[Tree], scaling: Scaling) -> Tree:
    """`guidance` of some explorers' squared deviations."""
    count = {k: sum((~t[k].isnan()).float() for t in deviations) for k in deviations[0]}
    total = {k: sum(t[k].nan_to_num(0.0) for t in deviations) for k in deviations[0]}
    return guidance(total, count, scaling)  # type: ignore[arg-type]


def cut(scores: Tree, prune: float, unit: Unit, rule: Rule, groups: tuple[Group, ...] = ()) -> Mask:
    """The mask of what lies above the quantile `prune` of all scores; never nothing of an entry or a group (ours)."""
    if not prune:
        return DENSE
    if unit != "weights" and not groups:
        raise ValueError(f"explored: unit {unit!r} needs a model with channel groups, this one has none")
    threshold = quantile(torch.cat([v.flatten() for v in scores.values()]), prune, interpolate=False)
    bits = {k: v > threshold for k, v in scores.items()}
    mask = Mask() if unit == "weights" else Mask(channels={g: units(g, scores, bits, threshold, rule) for g in groups})
    if unit == "channels":
        return mask
    for k, score in scores.items():
        held = mask.where(k, score.shape)
        bits[k] = bits[k] & held
        if not bits[k].any():
            bits[k].view(-1)[score.masked_fill(~held, -torch.inf).argmax()] = True
    return Mask({k: v for k, v in bits.items() if not v.all()}, mask.channels)


def units(group: Group, scores: Tree, bits: Tree, threshold: float, rule: Rule) -> Tensor:
    """Channels of a group to keep (ours): by what makes a channel, its filters, biases and norms, not by who reads it.

    rule "mean": their mean score is above the threshold; "dead": any of their weights is.
    """
    own = [m for m in group.members if m.axis == 0 and m.entry in scores] or [
        m for m in group.members if m.entry in scores
    ]

    def rows(tree: Tree) -> Tensor:
        parts = (tree[m.entry].movedim(m.axis, 0).narrow(0, m.offset, group.size * m.repeat) for m in own)
        return torch.cat([part.reshape(group.size, -1).float() for part in parts], dim=1)

    average = rows(scores).mean(1)
    keep = average > threshold if rule == "mean" else rows(bits).any(1)
    keep[average.argmax()] |= not bool(keep.any())
    return keep.nonzero().flatten()


def voted(arrivals: Sequence[Arrival], scores: Tree, prune: float, scaling: Scaling) -> Evidence:
    """Every client's votes for the weights it moved most: its own squared moves, scaled and cut as an exploration's."""
    evidence = {}
    for a, update in ordered(arrivals):
        own = {k: _scaled(update.delta[k].square(), scaling) for k in scores}
        threshold = quantile(torch.cat(list(own.values())), prune, interpolate=False)
        none = {k: torch.full_like(v, torch.nan) for k, v in scores.items()}
        vote = {k: update.mask.scatter(k, (v > threshold).float(), none[k]) for k, v in own.items()}
        evidence[a.task.client] = update.weight, vote
    return evidence


def quantile(values: Tensor, share: float, interpolate: bool = True) -> float:
    """As torch.quantile, which in many versions takes 2^24 values at most. Without interpolation: the neighbour below.

    A value is above the quantile just when it is above that neighbour, whatever rounding makes of the mean of two.
    """
    flat = values.flatten()
    at = share * (flat.numel() - 1)
    low = floor(at)
    below = float(flat.kthvalue(low + 1).values)
    if at == low or not interpolate:
        return below
    return below + (float(flat.kthvalue(low + 2).values) - below) * (at - low)


def _scaled(values: Tensor, scaling: Scaling) -> Tensor:
    """One tensor's scores: to [0, 1], or by median and quartiles; a spread of 0 does not divide, NaN is the least."""
    known = values[~values.isnan()]
    if not known.numel():
        return torch.zeros_like(values)
    if scaling == "minmax":
        centre, spread = float(known.min()), float(known.max() - known.min())
    else:
        centre, spread = quantile(known, 0.5), quantile(known, 0.75) - quantile(known, 0.25)
    return (torch.where(values.isnan(), known.min(), values) - centre) / (spread or 1.0)


TABLE: dict[str, Callable[..., Agreement]] = {"settled": settled, "votes": votes}
