"""MyFed (async-FL of NUAA SmartSensing, 2022): FedAsync in which a stale update with much data or news counts more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prfl import density
from prfl.arrivals import key
from prfl.average import away
from prfl.checks import positive, share
from prfl.optimisers import statistic
from prfl.staleness import hinge
from prfl.types import Arrival, State, Tree, Work
from strategies.method import Method, never

PAPER = "NUAA SmartSensing, async-FL, 2022"


def myfed(
    alpha: float = 0.1,
    r: float = 1.0,
    a: float = 10.0,
    b: float = 4.0,
    c: float = 2.0,
    d: float = 2.0,
    work: Work = Work(),
) -> Method:
    """As its code has it, with `one_arrival` pacing and the selector `checkin`; defaults are its configuration's.

    The code fails at the first fresh update, whose factors it never sets: here they are 1 (ours), and so is a factor
    whose update lies below the average. Its clients train with Adam, ours with SGD.
    """
    mixing = rewarded(alpha, r, hinge(a, b), c, d)
    return Method(density=density.constant(1.0), merge=mixing, work=work, remask=never())


@dataclass(frozen=True)
class Seen:
    """Memory of `rewarded`: how many updates there were, the sum of their samples, and of their |w_i - W|^2."""

    updates: int = 0
    samples: float = 0.0
    far: float = 0.0


@dataclass(frozen=True)
class rewarded:
    """W <- W + p m (w_i - W), p = min(1, alpha r s C Q), one arrival after another, missing weights as in `fedasync`.

    s is the hinge. For an update older than its b, with n_i samples and distance q_i = |w_i - W|^2 (ours: over the
    weights that it holds): C = c - mean(n) / n_i if n_i is at least the mean over all updates so far, itself among
    them, Q = d - mean(q) / q_i likewise; else 1.
    """

    alpha: float = 0.1
    r: float = 1.0
    staleness: hinge = hinge()
    c: float = 2.0
    d: float = 2.0

    def __post_init__(self) -> None:
        share("myfed", "alpha", self.alpha)
        for name in ("r", "c", "d"):
            positive("myfed", name, getattr(self, name))

    def init(self) -> Seen:
        return Seen()

    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Seen]:
        params, seen = {k: v.clone() for k, v in state.params.items()}, state.merge
        for arrival in sorted(arrivals, key=lambda one: (one.at, key(one))):
            if (update := arrival.update) is None:
                continue
            moves = {k: away(k, params, arrival.task, update) for k in update.delta}
            far = sum(float(v.double().square().sum()) for k, v in moves.items() if not statistic(k))
            seen = Seen(seen.updates + 1, seen.samples + update.weight, seen.far + far)
            age = state.version - arrival.task.version
            rate = self.alpha * self.r * self.staleness(age)
            if age > self.staleness.b:
                rate *= _reward(self.c, seen.samples / seen.updates, update.weight)
                rate *= _reward(self.d, seen.far / seen.updates, far)
            for k, v in moves.items():
                update.mask.add_into(k, params[k], v, min(1.0, rate))
        return params, seen


def _reward(most: float, mean: float, own: float) -> float:
    """Up to `most` for what is above the mean, 1 below it."""
    return most - mean / own if own >= mean > 0 else 1.0
