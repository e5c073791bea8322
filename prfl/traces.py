"""A finished run as its folder tells it: scores against time, bytes and energy, every task, every client."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from prfl import store
from prfl.config import ConfigError, name
from prfl.energy import Watts
from prfl.specs import explain
from prfl.tally import Tally

AXES = ("seconds", "bytes", "joules")
"""What accuracy is set against."""


@dataclass(frozen=True)
class Point:
    """The model at one evaluation: `accuracy` on the validation split, and what it had cost until then.

    bytes: down and up. joules: of computing, sending and receiving; None where a device's power or times are unknown.
    """

    version: int
    seconds: float
    bytes: float
    joules: float | None
    accuracy: float


@dataclass(frozen=True)
class Span:
    """A task from its sending to its arrival, in seconds of the run. `used`: its update was merged."""

    client: int
    start: float
    end: float
    density: float
    staleness: int
    used: bool


@dataclass(frozen=True)
class Trace:
    """A finished run. `coverage`: seconds, and the share of the weights that the merged updates held together."""

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    clients: Mapping[int, Mapping[str, Any]]
    points: Sequence[Point]
    spans: Sequence[Span]
    coverage: Sequence[tuple[float, float]]

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @property
    def method(self) -> str:
        return name(self.config.get("method", "own"))

    @property
    def real(self) -> bool:
        """Whether its time was the wall clock's."""
        return bool((self.config.get("devices") or {}).get("name") == "real")

    def device(self, client: int) -> str:
        """A client's device class."""
        return str(self.clients[client]["class"])

    def first(self, target: float) -> Point | None:
        """The first evaluation at which the accuracy was there."""
        return next((p for p in self.points if p.accuracy >= target), None)

    @property
    def best(self) -> float:
        """Highest accuracy of all evaluations."""
        return max((p.accuracy for p in self.points), default=0.0)


def read(folder: Path, watts: Mapping[str, Watts] | None = None) -> Trace:
    """The run in a folder; `watts` by device class are laid over those it ran with. ConfigError: none, or no end."""
    summary, clients = store.summary(folder), store.clients(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    power = {**_power(config), **(watts or {})}
    points: list[Point] = []
    spans: list[Span] = []
    coverage: list[tuple[float, float]] = []
    tally = _Known({c: str(row["class"]) for c, row in clients.items()}, power)
    for event in store.events(folder):
        tally(event)
        if event["kind"] == "arrival":
            start = event["at"] - event["seconds"]
            numbers = event["density"], event["staleness"], event["used"]
            spans.append(Span(event["client"], start, event["at"], *numbers))
        elif event["kind"] == "evaluation":
            cost = event["at"], float(tally.sums.bytes_up + tally.sums.bytes_down), tally.joules
            points.append(Point(event["version"], *cost, event["validation_accuracy"]))
        elif event["kind"] == "merge" and "coverage" in event:
            coverage.append((event["at"], event["coverage"]))
    for client, device in tally.sums.classes.items():
        clients.setdefault(client, {"class": device, "updates": tally.sums.used.get(client, 0)})
    return Trace(folder, config, summary, clients, points, spans, coverage)


class _Known:
    """A tally of events of any age, with energy as far as every task's is known."""

    def __init__(self, classes: dict[int, str], power: Mapping[str, Watts]):
        self.sums, self._power = Tally(classes), power
        self.joules: float | None = 0.0

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["kind"] in ("send", "arrival"):
            self.sums.classes.setdefault(event["client"], "unknown")
        if event["kind"] == "arrival" and self.joules is not None:
            watts = self._power.get(self.sums.classes[event["client"]])
            there = watts is not None and "busy" in event and "radio" in event
            self.joules = self.joules + watts.joules(event["busy"], event["radio"]) if watts and there else None
        self.sums(event)


def powers(profiles: Path | None) -> dict[str, Watts]:
    """Watts by device class from a file of device profiles. Raises ConfigError."""
    if profiles is None:
        return {}
    try:
        found = yaml.safe_load(profiles.read_text(encoding="utf-8"))
        return {str(k): _WATTS.validate_python(p["watts"]) for k, p in found.items() if p.get("watts")}
    except OSError as error:
        raise ConfigError(f"no device file {profiles}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ConfigError(f"{profiles}: no device profiles: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise ConfigError(f"{profiles}: watts: {explain(error)}") from None


def expand(folders: Sequence[Path]) -> list[Path]:
    """Run folders, and for a folder of runs the finished ones below it. ConfigError: there are none."""
    found: list[Path] = []
    for folder in folders:
        if (folder / "events.jsonl").is_file():
            found.append(folder)
            continue
        below = sorted(path.parent for path in folder.glob("*/**/summary.json"))
        if not below:
            raise ConfigError(f"{folder} holds no finished run")
        found += below
    return list(dict.fromkeys(found))


def grouped(traces: Sequence[Trace]) -> dict[str, list[Trace]]:
    """Runs that differ in their seed only are one group, under the shortest label that tells it from the others."""
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        same = {k: v for k, v in trace.config.items() if k not in ("seed", "name", "metrics")}
        groups.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(trace)
    every = [group[0] for group in groups.values()]
    for label in (
        lambda t: t.method,
        lambda t: f"{t.method}, {name(t.config['pacing'])}",
        lambda t: f"{t.method}, {t.config['name']}",
        lambda t: t.folder.parent.name,
        lambda t: str(t.folder),
    ):
        labels = [label(t) for t in every]
        if len(set(labels)) == len(labels):
            break
    return {x: sorted(group, key=lambda t: t.seed) for x, group in zip(labels, groups.values(), strict=True)}


def _power(config: Mapping[str, Any]) -> dict[str, Watts]:
    """Watts by device class, of a run's own profiles."""
    profiles = (config.get("devices") or {}).get("profiles")
    found = profiles if isinstance(profiles, dict) else {}
    return {name: _WATTS.validate_python(p["watts"]) for name, p in found.items() if p.get("watts")}


_WATTS = TypeAdapter(Watts)
