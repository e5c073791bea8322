"""Energy: what a device draws in its three states, and what that comes to over a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite

from pydantic import ConfigDict, with_config


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Watts:
    """Power of the whole device while it waits, computes, and sends or receives."""

    idle: float
    busy: float
    radio: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{field.name} must be at least 0, got {value:g}")

    def joules(self, busy: float, radio: float, idle: float = 0.0) -> float:
        """Energy of so many seconds of computing, of sending and receiving, and of waiting."""
        return busy * self.busy + radio * self.radio + idle * self.idle


def by_class(
    classes: Mapping[int, str],
    busy: Mapping[int, float],
    radio: Mapping[int, float],
    seconds: float,
    watts: Mapping[str, Watts],
) -> dict[str, dict[str, float]]:
    """Joules by device class, split into `busy`, `radio` and `idle`; a class without watts is left out.

    busy, radio: seconds by client. Idle is the rest of the run's `seconds`, of every client, asked or not. Tasks under
    way at the end are not in it, as their bytes are not.
    """
    out: dict[str, dict[str, float]] = {}
    for client, name in sorted(classes.items()):
        if name in watts:
            total = out.setdefault(name, {"busy": 0.0, "radio": 0.0, "idle": 0.0})
            working, sending = busy.get(client, 0.0), radio.get(client, 0.0)
            total["busy"] += watts[name].joules(working, 0.0)
            total["radio"] += watts[name].joules(0.0, sending)
            total["idle"] += watts[name].joules(0.0, 0.0, max(0.0, seconds - working - sending))
    return out
