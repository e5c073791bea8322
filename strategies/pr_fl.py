"""PR-FL (Ma, 2024): small nested models first, capacity given back on a plateau, merged over a cache of all clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

from prfl import density, saliency, staleness
from prfl.average import Weigh
from prfl.cache import buff_mask_fed_avg
from prfl.cut import Cut
from prfl.recovery import recover as regrow
from prfl.types import Architecture, Work
from strategies.method import Method, rerank

PAPER = "Ma, 2024, arXiv 2403.15439"

SEND = 5.5616e-6  # seconds to send one weight (PruneFL's coefficient, as published)
COMPUTE = {True: 6.0e-10, False: 3.2e-9}  # seconds a multiply-add, convolution or not: PruneFL's for FEMNIST, over macs
STEPS = 5  # local steps of a round, as published

Score = Literal["last_batch_g2", "accumulated_g2", "magnitude", "change"]


def pr_fl(
    floor: float = 0.1,
    core: float = 0.05,
    every: int = 10,
    patience: int = 10,
    step: float = 0.2,
    a: float = 0.6,
    rule: Literal["ratio", "tuned", "eq4"] = "ratio",
    score: Score = "accumulated_g2",
    growth: Literal["score", "score_per_cost"] = "score_per_cost",
    cache: Literal["growing", "frozen"] = "growing",
    listen: int = 1,
    unit: Literal["weights", "channels"] = "weights",
    multiple: int = 1,
    recover: bool = True,
    work: Work = Work(),
) -> Method:
    """Mostly the paper's semantics by default; the code's are rule="tuned", score="last_batch_g2", cache="frozen".

    From the code by default too: growth by score per cost, the core by magnitude, scores normalised by client. Ours:
    gradients are summed before they are squared, as in PruneFL; plateaus are those of a client's own training loss and
    of the merged model's validation accuracy (published: of accuracies).

    floor: rho_min, the least density of stage 1. core: share of every layer kept by magnitude. every: versions between
    rankings, density steps and plateau checks. patience: checks without improvement before a density rises by `step`.
    growth: the rest is ranked by score, or by score per cost of a weight. listen: versions before a ranking whose tasks
    ask for the statistic (0: all; ours, since its bytes are counted). unit "channels" is ours, as
    is `multiple`: see `Cut`.
    """
    first = density.by_time(floor=floor, rule=rule, window=every, every=every)
    return Method(
        density=regrow(first, step=step, patience=patience, every=every, floor=floor) if recover else first,
        saliency=REPORTS[score],
        cut=Cut(unit, "layer", multiple=multiple)
        if unit == "channels"
        else Cut(spread="model", floor=core, core="magnitude"),
        merge=buff_mask_fed_avg(cache, staleness.polynomial(a), weighed(work)),
        work=replace(work, normalise=True, window="last" if score == "last_batch_g2" else "all"),
        remask=rerank(every, listen),
        costs=seconds(work) if growth == "score_per_cost" and unit == "weights" else None,
    )


def steps(work: Work) -> int:
    """Local steps of a task. Epochs, which are longer for some than for others, count as the published steps (ours)."""
    return work.steps or STEPS * work.epochs


def weighed(work: Work) -> Weigh:
    """By the samples that a client processes, as PR-FL's code does: with so many steps they are the same for all."""
    return "uniform" if work.steps else "samples"


REPORTS: Mapping[Score, saliency.magnitude | saliency.signal] = {
    "last_batch_g2": saliency.signal("gradient2"),
    "accumulated_g2": saliency.signal("gradient2"),
    "magnitude": saliency.magnitude(),
    "change": saliency.signal("change"),
}


def seconds(work: Work) -> Callable[[Architecture], Mapping[str, float]]:
    """What a kept weight costs a client and round: sent once, used in every local step (PR-FL's c_l)."""
    samples = steps(work) * work.batch

    def per_weight(architecture: Architecture) -> Mapping[str, float]:
        return {k: SEND + 3 * samples * macs * COMPUTE[macs > 1] for k, macs in architecture.macs.items()}

    return per_weight
