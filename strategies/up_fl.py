"""UP-FL: uniform pruning, the baseline of FedMP (Jiang et al., ICDE 2022) that prunes all clients by one ratio."""

from prfl import density, merge
from prfl.cut import Cut
from prfl.types import Work
from strategies.method import Method

PAPER = "baseline in Jiang et al., ICDE 2022"


def up_fl(ratio: float = 0.3, work: Work = Work()) -> Method:
    """With `sync` pacing. No description of its own could be found; as recalled: one ratio for all, filters of least L1
    norm, and FedMP's recovery of what was pruned (R2SP, uniform mean).

    ratio: of every layer's filters, in [0, 1); 0.3 did best in FedMP's figure of uniform ratios. It is found by search.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio:g}")
    return Method(
        density=density.constant(1 - ratio),
        merge=merge.r2sp(weigh="uniform"),
        cut=Cut(unit="channels", width="linear", by="filter"),
        work=work,
    )
