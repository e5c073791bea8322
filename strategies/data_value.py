"""The bandit with data value: discounted UCB over a client's densities, paid and weighed by what its data is worth."""

from typing import Literal

from prfl import merge
from prfl import valuation as valuations
from prfl.bandits import d_ucb
from prfl.cut import Cut
from prfl.standing import by_value
from prfl.types import Valuation, Work
from strategies.method import Method

PAPER = "after Jiang et al., ICDE 2022; Garivier & Moulines, 2011"


def data_value(
    arms: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0),
    valuation: Valuation = valuations.similarity(),
    discount: float = 0.99,
    xi: float = 1.0,
    explore: float = 0.1,
    clamp: float = 0.02,
    rho: float = 0.95,
    least: float = 0.1,
    unit: Literal["weights", "channels"] = "channels",
    work: Work = Work(),
) -> Method:
    """With `sync` pacing, or any. A thesis' plan, not a published method: D-UCB on every client's pruning rate with the
    reward delta value / |T - mean T|, and merge weights linked to data value.

    D-UCB's index is as published. Ours: arms, `explore`, the clamp and the scale of rewards; delta value is what a
    merge adds to a client's value, as `valuation` has it; weights are samples times a client's standing over the best
    of the merge, `least` at least; pruned parts count as what they were (FedMP's R2SP); filters by their L1 norm.
    """
    cut = Cut(unit, width="linear", by="filter") if unit == "channels" else Cut()
    return Method(
        density=d_ucb(arms, discount, xi, explore, clamp),
        merge=by_value(merge.r2sp(), rho, least),
        valuation=valuation,
        cut=cut,
        work=work,
    )
