"""FedFix (Fraboni et al., JMLR 2023): what has come is merged at fixed times, whoever is still at work."""

from prfl import density
from prfl import staleness as ages
from prfl.cache import mask_fed_avg
from prfl.staleness import Staleness
from prfl.types import Work
from strategies.method import Method, never
from strategies.pr_fl import weighed

PAPER = "Fraboni et al., JMLR 2023, arXiv 2206.10189"


def fedfix(eta: float | None = None, staleness: Staleness = ages.PR_FL, work: Work = Work()) -> Method:
    """With `window` pacing. The mixing is PR-FL's baseline of this name: the arrivals' mean, by their staleness' mass.

    `eta` fixes the mixing weight instead. Fraboni et al. weigh clients by how often they answer; this does not.
    """
    mixing = mask_fed_avg(eta, staleness, weighed(work))
    return Method(density=density.constant(1.0), merge=mixing, work=work, remask=never())
