"""FjORD (Horvath et al., NeurIPS 2021): nested widths, a narrower one drawn for every mini-batch."""

from collections.abc import Mapping
from dataclasses import replace

from prfl import density, saliency
from prfl.cut import Cut
from prfl.merge import heterofl
from prfl.types import Work
from strategies.method import Method, never

PAPER = "Horvath et al., NeurIPS 2021, arXiv 2102.13451"


def fjord(
    levels: Mapping[str, float] | tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2),
    rungs: int = 5,
    distil: bool = True,
    work: Work = Work(),
) -> Method:
    """With `sync` pacing. As published: a client receives the leading channels up to its tier's width; every mini-batch
    trains a width drawn from k / `rungs` up to that, the same in all layers, and with `distil` its own width too, whose
    outputs the drawn one learns from. Every weight is averaged over the clients that own it, by their samples.

    The default widths are the reference code's; so is the loss: CE(y, f_own), then CE(softmax(f_own), f_drawn), without
    the paper's weight and temperature (recalled as 1). Ours: `levels` by device class or in equal blocks of clients;
    BatchNorm uses batch statistics only, and the test takes them anew from training samples, where each width should
    have its own: training is the same, but no client has statistics of a narrower width.
    """
    if rungs < 1:
        raise ValueError(f"rungs must be 1 or more, got {rungs}")
    return Method(
        density=density.tiers(levels),
        saliency=saliency.order(),
        cut=Cut(unit="channels", width="linear", named=True),
        merge=heterofl(weigh="samples"),
        work=replace(work, rungs=rungs, distil=distil, statistics="static"),
        remask=never(),
    )
