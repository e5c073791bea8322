"""What a stale update is worth: a factor in (0, 1] of its age.

Age s counts versions: `state.version - task.version`, 0 when the client trained from the current parameters.
PR-FL counts t = max(n - v, 1) from one, so its t is s + 1 here and its default is `polynomial(0.6)`; its hinge acts on
t - 1 = s, so it is `hinge(a, 2)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from prfl.checks import least


class Staleness(Protocol):
    """From an age in versions to a factor in (0, 1], 1 when fresh, never rising."""

    def __call__(self, age: int) -> float: ...


@dataclass(frozen=True)
class constant:
    """1 at every age."""

    def __call__(self, age: int) -> float:
        return 1.0


@dataclass(frozen=True)
class polynomial:
    """(1 + s) ** -a (FedAsync, Xie et al. 2019, section 5.2); a = 0.5 is FedBuff's 1 / sqrt(1 + s).

    >>> polynomial(0.5)(3)
    0.5
    """

    a: float = 0.5

    def __post_init__(self) -> None:
        least("polynomial", "a", self.a, 0)

    def __call__(self, age: int) -> float:
        return float((1 + age) ** -self.a)


@dataclass(frozen=True)
class hinge:
    """1 up to age b, then 1 / (a (s - b) + 1) (FedAsync, Xie et al. 2019, section 5.2).

    >>> hinge(a=10, b=4)(5)
    0.09090909090909091
    """

    a: float = 10.0
    b: float = 4.0

    def __post_init__(self) -> None:
        least("hinge", "a", self.a, 0)
        least("hinge", "b", self.b, 0)

    def __call__(self, age: int) -> float:
        return 1.0 if age <= self.b else 1.0 / (self.a * (age - self.b) + 1.0)


FLAT = constant()
ROOT = polynomial(0.5)
PR_FL = polynomial(0.6)

TABLE: dict[str, Callable[..., Staleness]] = {"constant": constant, "polynomial": polynomial, "hinge": hinge}
