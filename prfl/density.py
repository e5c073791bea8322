"""How much of the model a client holds: a share in (0, 1] per task. Schedules only answer; decisions also learn.

`tell` comes once per merge with the version that the arrivals were merged into. Decisions with a field `every` decide
when that version is a multiple of it, once per version; version 0 counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import cos, pi
from typing import Literal

import numpy as np

from prfl.arrivals import ordered
from prfl.bandits import d_ucb, e_ucb
from prfl.checks import choice, least, share
from prfl.recovery import recover
from prfl.types import Arrival, Density, State


@dataclass(frozen=True)
class constant:
    """The same share for everybody, always."""

    keep: float = 1.0

    def __post_init__(self) -> None:
        share("constant", "keep", self.keep)

    def init(self) -> None:
        return None

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        return self.keep

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> None:
        return None


@dataclass(frozen=True)
class tiers:
    """A share per client: by its device class, or, when levels have no names, in equal contiguous blocks of clients.

    The blocks are those of the clients known now: where clients join, the borders move.
    dynamic: every task draws one of the levels instead, each as likely (HeteroFL's "dynamic" setting).
    """

    levels: Mapping[str, float] | tuple[float, ...] = (1.0, 0.5, 0.25)
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("tiers: levels must name at least one share")
        for level in self._shares():
            share("tiers", "levels", level)

    def init(self) -> None:
        return None

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        if self.dynamic:
            return self._shares()[int(rng.integers(len(self.levels)))]
        if client not in state.classes:
            raise ValueError(f"tiers: client {client} has no device class; {len(state.classes)} clients have one")
        if isinstance(self.levels, Mapping):
            kind = state.classes[client]
            if kind not in self.levels:
                raise ValueError(f"tiers: levels have no device class {kind!r}; have {', '.join(self.levels)}")
            return self.levels[kind]
        place = sum(other < client for other in state.classes)
        return self.levels[place * len(self.levels) // len(state.classes)]

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> None:
        return None

    def _shares(self) -> tuple[float, ...]:
        return tuple(self.levels.values()) if isinstance(self.levels, Mapping) else tuple(self.levels)


@dataclass(frozen=True)
class linear:
    """From `start` to `end` between the versions `first` and `last`, evenly."""

    start: float = 1.0
    end: float = 0.1
    first: int = 0
    last: int = 100

    def __post_init__(self) -> None:
        _ramp("linear", self.start, self.end, self.first, self.last)

    def init(self) -> None:
        return None

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        return _between(self.start, self.end, 1 - _progress(state.version, self.first, self.last))

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> None:
        return None


@dataclass(frozen=True)
class cubic:
    """From `start` to `end` between two versions, fast at first: end + (start - end)(1 - t)^3 (Zhu & Gupta 2017)."""

    start: float = 1.0
    end: float = 0.1
    first: int = 0
    last: int = 100

    def __post_init__(self) -> None:
        _ramp("cubic", self.start, self.end, self.first, self.last)

    def init(self) -> None:
        return None

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        return _between(self.start, self.end, (1 - _progress(state.version, self.first, self.last)) ** 3)

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> None:
        return None


@dataclass(frozen=True)
class cosine:
    """From `start` to `end` between two versions, slow at both ends: end + (start - end)(1 + cos(pi t)) / 2."""

    start: float = 1.0
    end: float = 0.1
    first: int = 0
    last: int = 100

    def __post_init__(self) -> None:
        _ramp("cosine", self.start, self.end, self.first, self.last)

    def init(self) -> None:
        return None

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        left = (1 + cos(pi * _progress(state.version, self.first, self.last))) / 2
        return _between(self.start, self.end, left)

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> None:
        return None


@dataclass(frozen=True)
class Pace:
    """Memory of `by_time`: per client the latest dense-equivalent round times in seconds, and its share."""

    seconds: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    keep: Mapping[int, float] = field(default_factory=dict)
    decided: int = -1  # the version of the last decision


@dataclass(frozen=True)
class by_time:
    """Every client's round to take as long as the fastest device's (PR-FL stage 1); clients not timed get `start`.

    D_i: mean of client i's last `window` round times (seconds from sending to arrival), each divided by the share it
    was run at, hence its time if it were dense; D_ref is the least. T_i = share_i D_i: its time now.
    rule "ratio": D_ref / D_i, the paper's rule, of the rounds run at `start`, or at the most that a client has memory
    for, alone (ours: with later times it would swing back once rounds are equal, and sink to the floor where start-up
    and not size takes the time).
    rule "tuned": share_i (1 - 0.9 r), r = (T_i - T_ref) / T_i, where |r| > 0.05 (PR-FL's code, unrounded).
    rule "eq4": share_i (1 + 0.5 (T_ref - T_i) / T_i) (FedGMR's equation 4). Both take T_ref = start D_ref, the fastest
    device at `start` (published: the present time of client 0). All are cut to [floor, 1].
    """

    floor: float = 0.1
    rule: Literal["ratio", "tuned", "eq4"] = "ratio"
    window: int = 50
    every: int = 50
    start: float = 1.0

    def __post_init__(self) -> None:
        share("by_time", "floor", self.floor)
        share("by_time", "start", self.start)
        choice("by_time", "rule", self.rule, ("ratio", "tuned", "eq4"))
        least("by_time", "window", self.window, 1)
        least("by_time", "every", self.every, 1)

    def init(self) -> Pace:
        return Pace()

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        pace: Pace = state.density
        return pace.keep.get(client, self.start)

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Pace:
        old: Pace = state.density
        seconds = dict(old.seconds)
        for a, _ in ordered(arrivals):
            if self.rule == "ratio" and a.task.density != min(self.start, state.limits.get(a.task.client, 1.0)):
                continue
            dense = max(a.at - a.sent, 1e-9) / a.task.density
            seconds[a.task.client] = (*seconds.get(a.task.client, ()), dense)[-self.window :]
        if state.version % self.every or state.version == old.decided or not seconds:
            return replace(old, seconds=seconds)
        mean = {c: sum(t) / len(t) for c, t in sorted(seconds.items())}
        fastest = min(mean.values())
        keep = {c: self._share(old.keep.get(c, self.start), t, fastest) for c, t in mean.items()}
        return Pace(seconds, keep, state.version)

    def _share(self, old: float, dense: float, reference: float) -> float:
        gap = 1 - self.start * reference / (old * dense)
        if self.rule == "ratio":
            new = reference / dense
        elif self.rule == "tuned":
            new = old * (1 - 0.9 * gap) if abs(gap) > 0.05 else old
        else:
            new = old * (1 - 0.5 * gap)
        return min(1.0, max(new, self.floor))


def _progress(version: int, first: int, last: int) -> float:
    return 1.0 if version >= last else max(0.0, (version - first) / max(1, last - first))


def _between(start: float, end: float, left: float) -> float:
    return end + (start - end) * left


def _ramp(part: str, start: float, end: float, first: int, last: int) -> None:
    share(part, "start", start)
    share(part, "end", end)
    if not 0 <= first <= last:
        raise ValueError(f"{part}: needs 0 <= first <= last, got first={first}, last={last}")


TABLE: dict[str, Callable[..., Density]] = {
    "constant": constant,
    "tiers": tiers,
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
    "by_time": by_time,
    "recover": recover,
    "e_ucb": e_ucb,
    "d_ucb": d_ucb,
}
