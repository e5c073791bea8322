"""Ordered dropout: the narrower networks inside a client's own, each the leading channels of it (FjORD)."""

from __future__ import annotations

from math import ceil

from prfl.cut import NOISE
from prfl.masks import Mask


def ladder(density: float, rungs: int) -> tuple[float, ...]:
    """The widths that a step may train: every k / rungs below `density`, and `density` itself, ascending."""
    return (*(k / rungs for k in range(1, rungs) if k / rungs < density - NOISE), density)


def leading(mask: Mask, width: float, own: float) -> Mask:
    """The first ceil(width * size) kept channels of every group, of a mask cut at the width `own`.

    A group of which the mask keeps more than its share is one that is never cut, and stays as it is.
    """
    channels = {}
    for group, kept in mask.channels.items():
        whole = len(kept) > ceil(own * group.size - NOISE)
        channels[group] = kept if whole else kept[: max(1, ceil(width * group.size - NOISE))]
    return Mask(mask.bits, channels)
