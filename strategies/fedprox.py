"""FedProx (Li et al., MLSys 2020): FedAvg whose clients are held near the weights they received."""

from dataclasses import replace

from prfl import density, merge
from prfl.types import Work
from strategies.method import Method, never

PAPER = "Li et al., MLSys 2020, arXiv 1812.06127"


def fedprox(mu: float = 0.01, work: Work = Work()) -> Method:
    """As published: mu/2 ||w - w_received||^2 is added to every client's loss."""
    if mu < 0:
        raise ValueError(f"mu must be 0 or more, got {mu:g}")
    near = replace(work, proximal=mu)
    return Method(density=density.constant(1.0), merge=merge.fed_avg(), work=near, remask=never())
