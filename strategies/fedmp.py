"""FedMP (Jiang et al., ICDE 2022): a bandit a client finds the share of filters to prune, so that all end together."""

from prfl import merge
from prfl import valuation as valuations
from prfl.bandits import e_ucb
from prfl.cut import Cut
from prfl.types import Valuation, Work
from strategies.method import Method

PAPER = "Jiang et al., ICDE 2022"


def fedmp(
    discount: float = 0.99,
    width: float = 0.1,
    floor: float = 0.2,
    explore: float = 0.1,
    clamp: float = 0.02,
    valuation: Valuation = valuations.loss_decrease(),
    work: Work = Work(),
) -> Method:
    """With `sync` pacing. As published: filters of least L1 norm are pruned, the same ratio in every layer, from every
    version anew; the reward is delta loss / |T - mean T|; R2SP puts back what was pruned.

    Recalled: the bandit's formulas (E-UCB), R2SP's uniform mean. Ours: every default, as the paper's values of lambda
    (`discount`) and theta (`width`) are unknown; `floor`, the least share kept; the clamp and the scale of rewards;
    that delta loss is of the server's validation split (`valuation`; its other option takes what clients report).
    """
    return Method(
        density=e_ucb(discount, width, floor, explore, clamp),
        cut=Cut(unit="channels", width="linear", by="filter"),
        merge=merge.r2sp(weigh="uniform"),
        valuation=valuation,
        work=work,
    )
