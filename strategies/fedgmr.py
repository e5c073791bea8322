"""FedGMR (Ma et al., 2025): sub-models sized to the links, restored rung by rung when they stop improving."""

from collections.abc import Mapping
from typing import Literal

from prfl import density, saliency, staleness
from prfl.cache import buff_mask_fed_avg
from prfl.cut import Cut
from prfl.recovery import recover
from prfl.types import Work
from strategies.method import Method, rerank
from strategies.pr_fl import seconds, weighed

PAPER = "Ma et al., 2025, arXiv 2512.05372"

LADDER = (0.05, 0.1, 0.2, 0.5, 1.0)


def fedgmr(
    levels: Mapping[str, float] | tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.05),
    ladder: tuple[float, ...] = LADDER,
    core: float = 0.02,
    every: int = 25,
    patience: int = 5,
    trigger: Literal["plateau", "time", "mixed"] = "plateau",
    horizon: int = 1000,
    a: float = 0.6,
    unit: Literal["weights", "channels"] = "weights",
    work: Work = Work(),
) -> Method:
    """As released: densities start at `levels` (by device class or in blocks of clients), ranked by |w| per cost.

    A client that has not improved for `patience` checks, one every `every` versions, climbs to the next rung of
    `ladder`; the server's plateau lifts everybody. trigger "time": rungs at fixed shares of `horizon` versions.
    The cache of all clients is the paper's; the release merges arrivals only. unit "channels" is ours.
    """
    return Method(
        density=recover(
            density.tiers(levels),
            ladder=ladder,
            patience=patience,
            every=every,
            floor=min(ladder),
            trigger=trigger,
            times=tuple(round(horizon * part) for part in (0.2, 0.4, 0.6, 0.8, 1.0)),
            rest=patience,
            forget=True,
        ),
        saliency=saliency.magnitude(),
        cut=Cut(unit, "layer") if unit == "channels" else Cut(spread="model", floor=core, core="magnitude"),
        merge=buff_mask_fed_avg("growing", staleness.polynomial(a), weighed(work)),
        work=work,
        remask=rerank(every),
        costs=seconds(work) if unit == "weights" else None,
    )
