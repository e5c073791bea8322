"""PruneFL (Jiang et al., TNNLS 2022): one mask for all, found by one client first, then adapted to what time pays."""

from __future__ import annotations

from dataclasses import replace

from prfl import merge
from prfl.checks import fraction, least, positive, share
from prfl.cut import Cut
from prfl.types import Work
from strategies.method import Method
from strategies.reconfigure import leader, reached, reconfigure, reporting

PAPER = "Jiang et al., TNNLS 2022, arXiv 1909.12326"


def prunefl(
    first: int | str = 0,
    initial: int = 20,
    passes: int = 50,
    begin: float = 0.15,
    every: int = 50,
    part: float = 0.3,
    halving: float = 10_000.0,
    listen: int = 1,
    densest: float = 1.0,
    overhead: float = 1.2493,
    work: Work = Work(),
) -> Method:
    """With `sync` pacing. As published: stage 1 at one client, `passes` over its data between decisions, from an
    accuracy `begin` on (1.5 / classes); then all clients and a decision every `every` versions. A decision keeps of
    every layer all but the `part` of least |w| (halved every `halving` versions) and gives or takes the rest by g^2 / t
    so that the gain per second is best; in its code a weight that comes back has the value it had.

    t: PruneFL's seconds of sending a weight and using it in the local steps, `overhead` of each step on top; ours: by
    multiply-adds, for any model (`strategies.pr_fl`). Also ours: clients report with the tasks of the last `listen`
    versions before a decision (0: all, as much as published, but sent each time and not once); in stage 1 the squared
    sum over its passes, where the reference sums squares of steps; `initial`, the versions it may take (0: no stage 1);
    all data of that client. `first`: its number, or a device class whose first client it is; if it is away, who is
    there. `densest`: no denser than this.
    """
    for name, value in (("part", part), ("begin", begin)):
        fraction("prunefl", name, value)
    number = 0 if isinstance(first, str) else first
    for name, value, bound in (("first", number, 0), ("initial", initial, 0), ("listen", listen, 0)):
        least("prunefl", name, value, bound)
    for name, value in (("passes", passes), ("every", every), ("halving", halving), ("overhead", overhead)):
        positive("prunefl", name, value)
    share("prunefl", "densest", densest)
    own = replace(work, scope="all")
    return Method(
        density=reached(initial > 0),
        cut=Cut(spread="model"),
        merge=merge.masked_mean(),
        work=own,
        remask=reconfigure(own, initial, begin, every, part, halving, densest, overhead),
        among=leader(first),
        amend=reporting(passes, every, listen),
    )
