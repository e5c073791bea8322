"""Heterogeneous FL with arbitrary masks (Zhou et al., 2022/2023): every task has a mask of its own, by any rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from prfl import density, merge
from prfl.cut import Cut
from prfl.regions import Masks, quarters
from prfl.types import State, Task, Work
from strategies.method import Method, never, rerank

PAPER = "Zhou et al., NeurIPS 2023, arXiv 2310.08670"


def unified(
    masks: Masks = quarters(),
    unit: Literal["weights", "channels"] = "weights",
    fixed: bool = False,
    skip: tuple[str, ...] = (),
    work: Work = Work(),
) -> Method:
    """As published: clients train under arbitrary masks, a weight becomes the plain mean over those that hold it.

    What nobody holds keeps its value (the theory assumes there is none; the authors' code makes it 0). The quarters are
    of |w|, ranked in every version; `fixed`: once, of the first model. unit "channels": quarters of the neurons.
    Published for the first layer alone, here for all (ours) but those that `skip` names. `masks` may be a part of one's
    own. Every run reports the minimum covering index that the bound depends on, of every merge.
    """
    return Method(
        density=density.constant(1.0),
        cut=Cut(unit, skip=skip),
        merge=merge.heterofl(),
        work=work,
        remask=never() if fixed else rerank(),
        amend=masked(masks),
    )


@dataclass(frozen=True)
class masked:
    """The task under the mask that the rule gives it, unless its device has no room for it."""

    masks: Masks

    def __call__(self, state: State, task: Task) -> Task:
        mask = self.masks(state, task)
        share = mask.density(task.params)
        return replace(task, mask=mask, density=share) if share <= task.density else task
