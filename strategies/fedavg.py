"""FedAvg (McMahan et al., AISTATS 2017): dense models, averaged by their number of samples."""

from prfl import density, merge
from prfl.types import Work
from strategies.method import Method, never

PAPER = "McMahan et al., AISTATS 2017, arXiv 1602.05629"


def fedavg(work: Work = Work()) -> Method:
    """As published with `sync` pacing. The merge takes weights as they come, however old."""
    return Method(density=density.constant(1.0), merge=merge.fed_avg(), work=work, remask=never())
