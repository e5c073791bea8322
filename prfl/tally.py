"""What a run adds up to, event by event: bytes, densities, staleness, scores; the source of table and summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any


@dataclass
class Tally:
    """Fed with the events of a run. `classes[client]`: device class, as far as it is known before anybody joins.

    `drop_late`: a merge gives up what is at work.
    """

    classes: dict[int, str]
    drop_late: bool = False
    version: int = 0
    at: float = 0.0
    updates: int = 0
    failed: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    density_sum: float = 0.0
    staleness: float = 0.0  # running mean of the latest arrivals
    scores: Mapping[str, float] = field(default_factory=dict)
    best: float = 0.0  # best validation accuracy
    scored: float = -inf  # when the latest evaluation was
    density: dict[str, float] = field(default_factory=dict)  # latest, by device class
    trained: dict[str, int] = field(default_factory=dict)  # updates used, by device class
    latest: dict[int, float] = field(default_factory=dict)  # latest density, by client
    at_work: set[int] = field(default_factory=set)  # clients whose answer is awaited
    merges: int = 0
    covering_sum: int = 0  # of the minimum covering indices of all merges
    covering_least: float = inf
    used: dict[int, int] = field(default_factory=dict)  # updates used, by client
    busy: dict[int, float] = field(default_factory=dict)  # seconds of computing, by client, where they are known
    radio: dict[int, float] = field(default_factory=dict)  # seconds of sending and receiving, the same
    personal: dict[int, float] = field(default_factory=dict)  # accuracy of a client's own model as it came last

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.at = max(self.at, event["at"])
        getattr(self, f"_{event['kind']}")(event)

    def _join(self, e: Mapping[str, Any]) -> None:
        self.classes[e["client"]] = e["class"]

    def _send(self, e: Mapping[str, Any]) -> None:
        self.at_work.add(e["client"])
        name = self.classes[e["client"]]
        self.density[name] = e["density"]
        self.latest[e["client"]] = e["density"]

    def _arrival(self, e: Mapping[str, Any]) -> None:
        self.at_work.discard(e["client"])
        self.bytes_up += e["bytes_up"]
        self.bytes_down += e["bytes_down"]
        for seconds, name in ((self.busy, "busy"), (self.radio, "radio")):
            if name in e:
                seconds[e["client"]] = seconds.get(e["client"], 0.0) + e[name]
        if not e["used"]:
            self.failed += 1
            return
        if "held_out" in e:
            self.personal[e["client"]] = e["held_out"]
        name = self.classes[e["client"]]
        self.updates += 1
        self.density_sum += e["density"]
        self.staleness += 0.1 * (e["staleness"] - self.staleness)
        self.trained[name] = self.trained.get(name, 0) + 1
        self.used[e["client"]] = self.used.get(e["client"], 0) + 1

    def _merge(self, e: Mapping[str, Any]) -> None:
        self.version = e["version"]
        self.merges += 1
        self.covering_sum += e.get("covering", 0)
        self.covering_least = min(self.covering_least, e.get("covering", 0))
        if self.drop_late:
            self.at_work.clear()

    def _resume(self, e: Mapping[str, Any]) -> None:
        """A broken run goes on: what was lost has cost, and nobody is waited for any more."""
        self.bytes_up += e["bytes_up"]
        self.bytes_down += e["bytes_down"]
        self.failed += e["updates"]
        self.at_work.clear()

    def _evaluation(self, e: Mapping[str, Any]) -> None:
        self.scores = {k: v for k, v in e.items() if k not in ("kind", "at", "version")}
        self.best = max(self.best, self.scores["validation_accuracy"])
        self.scored = e["at"]

    @property
    def mean_density(self) -> float:
        """Over the updates used."""
        return self.density_sum / max(1, self.updates)

    @property
    def mean_covering(self) -> float:
        """Over the merges."""
        return self.covering_sum / max(1, self.merges)

    @property
    def final_density(self) -> float:
        """Over the clients, each by its latest task."""
        return sum(self.latest.values()) / max(1, len(self.latest))
