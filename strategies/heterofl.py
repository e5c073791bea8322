"""HeteroFL (Diao et al., ICLR 2021): every client trains the leading channels it has room for."""

from collections.abc import Mapping
from dataclasses import replace

from prfl import density, merge, saliency
from prfl.cut import Cut
from prfl.types import Work
from strategies.method import Method, never

PAPER = "Diao et al., ICLR 2021, arXiv 2010.01264"


def heterofl(
    levels: Mapping[str, float] | tuple[float, ...] = (1.0, 0.5, 0.25, 0.125, 0.0625),
    head: tuple[str, ...] = (),
    clip: float = 1.0,
    work: Work = Work(),
) -> Method:
    """As published: leading slices, scaler, static BatchNorm, masked cross-entropy, mean over the holders.

    `levels`: shares of the channels, by device class or in equal blocks of clients. `head`: entries of the output
    layer, averaged row by row over the clients that have the class. The model is tested after a pass over training
    samples that sets BatchNorm's statistics.
    """
    return Method(
        density=density.tiers(levels),
        saliency=saliency.order(),
        cut=Cut(unit="channels", width="linear"),
        merge=merge.heterofl(head),
        work=replace(work, statistics="static", scaler=True, absent="zero", clip=clip),
        remask=never(),
    )
