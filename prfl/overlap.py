"""What masks have in common, and how far apart they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

import torch

from prfl.masks import Mask, prunable
from prfl.types import Tree


def nested(small: Mask, big: Mask, params: Tree) -> bool:
    """Whether `big` holds all that `small` holds."""
    cut = {k: v.shape for k, v in params.items() if not big.whole(k)}
    return all(bool((small.where(k, shape) <= big.where(k, shape)).all()) for k, shape in cut.items())


def coverage(masks: Sequence[Mask], params: Tree) -> Tree:
    """How many of the masks hold each weight, int32 in the entry's shape."""
    out = {k: torch.zeros(v.shape, dtype=torch.int32) for k, v in params.items()}
    for mask in masks:
        for k, total in out.items():
            mask.count_into(k, total, 1)
    return out


def covered(masks: Sequence[Mask], params: Tree) -> float:
    """Share of the prunable weights that at least one of the masks holds."""
    apart = {id(mask): mask for mask in masks}.values()  # many clients may share one
    densest = max((mask.density(params) for mask in apart), default=0.0)
    nested = len({id(mask.ranking) for mask in apart}) == 1 and all(mask.ranking is not None for mask in apart)
    return densest if nested or densest in (0.0, 1.0) else union(list(apart), params).density(params)


def covering(masks: Sequence[Mask], params: Tree) -> int:
    """How many of the masks hold the weight that the fewest hold: the minimum covering index (arXiv 2201.11803).

    Counted over all entries, and whole masks first: of nested masks only these hold the weight that goes first. Of
    others, entry by entry, until one has a weight that no further mask holds.
    """
    apart = [mask for mask in masks if not mask.dense]
    if not apart or (apart[0].origin and all(mask.origin is apart[0].origin for mask in apart)):
        return len(masks) - len(apart)
    least, times = len(masks), Counter(map(id, apart))
    distinct = {id(mask): mask for mask in apart}
    for k in sorted(params, key=lambda k: params[k].numel()):
        cut = {i: mask for i, mask in distinct.items() if not mask.whole(k)}
        whole = len(masks) - sum(times[i] for i in cut)
        if whole < least and params[k].numel():
            held = torch.zeros(params[k].shape, dtype=torch.int32)
            for i, mask in cut.items():
                mask.count_into(k, held, times[i])
            least = min(least, whole + int(held.min()))
        if least == len(masks) - len(apart):
            break
    return least


def distance(a: Mask, b: Mask, params: Tree) -> float:
    """Normalised Hamming distance over the prunable weights, in [0, 1]."""
    shapes = {k: v.shape for k, v in params.items() if prunable(v)}
    cut = {k: shape for k, shape in shapes.items() if not (a.whole(k) and b.whole(k))}
    differ = sum(int((a.where(k, shape) ^ b.where(k, shape)).count_nonzero()) for k, shape in cut.items())
    return differ / max(1, sum(prod(shape) for shape in shapes.values()))


def union(masks: Sequence[Mask], params: Tree) -> Mask:
    """What at least one of the masks holds, as a mask of single weights; nothing at all if there is no mask."""
    cut = {k: v for k, v in params.items() if not any(m.whole(k) for m in masks)}
    return Mask({k: n > 0 for k, n in coverage(masks, cut).items()})
