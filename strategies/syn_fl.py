"""Syn-FL: synchronous training of whole models, the baseline of FedMP (Jiang et al., ICDE 2022)."""

from typing import Literal

from prfl import density, merge
from prfl.types import Work
from strategies.method import Method, never

PAPER = "baseline in Jiang et al., ICDE 2022"


def syn_fl(weigh: Literal["samples", "uniform"] = "uniform", work: Work = Work()) -> Method:
    """With `sync` pacing: FedAvg in rounds, as recalled. A uniform mean, as R2SP's, so that FedMP differs in nothing
    but pruning (ours; weigh "samples" is `fedavg`).
    """
    return Method(density=density.constant(1.0), merge=merge.fed_avg(weigh=weigh), remask=never(), work=work)
