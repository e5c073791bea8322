"""FedDST (Bibikar et al., AAAI 2022): clients move the mask, the server takes the votes and prunes back."""

from __future__ import annotations

from dataclasses import replace

from prfl import density
from prfl.checks import fraction, least
from prfl.cut import Cut
from prfl.types import Work
from prfl.votes import voted
from strategies.method import Method
from strategies.moves import moving, pruned_back

PAPER = "Bibikar et al., AAAI 2022, arXiv 2112.09824"


def feddst(
    sparsity: float = 0.8,
    rate: float = 0.01,
    every: int = 15,
    end: int = 200,
    at: float = 0.5,
    votes: float = 0.0,
    work: Work = Work(),
) -> Method:
    """With `sync` pacing. As published: a sparse model with Erdos-Renyi-Kernel layers all along; every `every` versions
    clients give up their least |w| and grow the largest |g| among the others, at a rate that falls like a cosine until
    `end`; weighted mean over those that hold a weight; the union is pruned back to `sparsity` layer by layer.

    Defaults are those of the reference's CIFAR-10 run, `end` half its 400 rounds. `votes`: samples that have to stand
    behind a weight. `at`: the share of the local steps after which the mask moves; recovering from it in the same task
    is a later library's way, the reference moves it last (1.0). Ours: the gradient is that of the next mini-batch's
    step, not of one batch more; layers that are whole stay whole; biases are never cut.
    """
    fraction("feddst", "sparsity", sparsity)
    fraction("feddst", "rate", rate)
    for name, value, bound in (("every", every, 1), ("end", end, 1), ("at", at, 0), ("votes", votes, 0)):
        least("feddst", name, value, bound)
    if at > 1:
        raise ValueError(f"at must be in [0, 1], got {at:g}")
    return Method(
        density=density.constant(1 - sparsity),
        cut=Cut(spread="erk"),
        merge=voted(votes),
        work=moving(replace(work, regrow_at=at), rate, every, end),
        remask=pruned_back(1 - sparsity),
    )
