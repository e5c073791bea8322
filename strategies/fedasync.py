"""FedAsync (Xie et al., 2019): every update is mixed in as it comes, the staler the less."""

from dataclasses import replace

from prfl import density, merge
from prfl import staleness as ages
from prfl.staleness import Staleness
from prfl.types import Work
from strategies.method import Method, never

PAPER = "Xie et al., 2019, arXiv 1903.03934"


def fedasync(alpha: float = 0.6, staleness: Staleness = ages.ROOT, rho: float = 0.005, work: Work = Work()) -> Method:
    """As published with `one_arrival` pacing; alpha and rho as later implementations have them."""
    mixing = merge.fedasync(alpha, staleness)
    return Method(density=density.constant(1.0), merge=mixing, work=replace(work, proximal=rho), remask=never())
