"""FedBuff (Nguyen et al., AISTATS 2022): moves are gathered in a buffer and added when it is full."""

from prfl import density, merge
from prfl import staleness as ages
from prfl.staleness import Staleness
from prfl.types import Work
from strategies.method import Method, never

PAPER = "Nguyen et al., AISTATS 2022, arXiv 2106.06639"


def fedbuff(lr: float = 1.0, staleness: Staleness = ages.ROOT, work: Work = Work()) -> Method:
    """With `buffered` pacing: the mean of K moves, as published; damped by 1 / sqrt(1 + staleness), as recalled."""
    moves = merge.fedbuff(lr, staleness=staleness)
    return Method(density=density.constant(1.0), merge=moves, work=work, remask=never())
