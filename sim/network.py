"""How long bytes take between the server and a device: independent links, or links that share the server's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Protocol

import numpy as np

from sim.devices import MB, Device

KEEP = 1024
"""Pushed contents that a server remembers; the oldest are pushed anew when they are asked for again."""


class Network(Protocol):
    """Seconds since the start and bytes; calls come in the order of their time `now`.

    All chance comes from the task's `seed`.
    """

    def down(self, now: float, device: Device, parts: Sequence[tuple[Hashable, int]], seed: int) -> float:
        """When the device has received all parts: keys and bytes; the same key and bytes are the same content."""

    def up(self, now: float, device: Device, size: int, seed: int) -> float:
        """When the server has received `size` bytes."""


class Part(Protocol):
    """A network as configured; every run opens its own."""

    def open(self) -> Network: ...


@dataclass(frozen=True)
class links:
    """Every device on its own: latency + bytes / speed, the server without limit.

    `noise`: a task's speed is the device's times the mean of 20 log-normal draws of this sigma (PR-FL).
    """

    noise: float = 0.0

    def __post_init__(self) -> None:
        _sigma("noise", self.noise)

    def open(self) -> Network:
        return self

    def down(self, now: float, device: Device, parts: Sequence[tuple[Hashable, int]], seed: int) -> float:
        link, _ = _factors(seed, 1, self.noise, 0.0)
        return now + device.latency + sum(size for _, size in parts) / (device.down * link)

    def up(self, now: float, device: Device, size: int, seed: int) -> float:
        link, _ = _factors(seed, 2, self.noise, 0.0)
        return now + device.latency + size / (device.up * link)


@dataclass(frozen=True)
class shared:
    """Links that end in one server with limits of its own (PR-FL's network), in bytes per second.

    Down: contents are pushed one after another at `egress`, in the order in which they are asked for; with `multicast`
    each once, for all who ask. A device pulls its parts in order at its own speed, never ahead of the push.
    Up: served at `ingress`, first come first served; an upload ends when its link and the server are both done. *Ours*:
    an upload books its whole turn when it starts, where PR-FL's server drains the bytes as they come in.
    `noise`, `server_noise`: as in `links`, for the device's speed and for the server's (PR-FL: .3 and .1).
    `quantum`: 0, or the time step in seconds in which PR-FL's released simulator pulls: what a device pulls in a step
    is rounded to 0.01 MB there, up to 7 % off (as published: .05).
    """

    egress: float
    ingress: float
    multicast: bool = True
    noise: float = 0.0
    server_noise: float = 0.0
    quantum: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("egress", self.egress), ("ingress", self.ingress)):
            if not value > 0:
                raise ValueError(f"{name} must be above 0 bytes per second, got {value:g}")
        _sigma("noise", self.noise)
        _sigma("server_noise", self.server_noise)
        if not 0 <= self.quantum < inf:
            raise ValueError(f"quantum must be at least 0 seconds, got {self.quantum:g}")

    def open(self) -> Server:
        return Server(self)


class Server:
    """The server's end of one run: what it has pushed and received so far. `egress`: bytes pushed."""

    def __init__(self, part: shared):
        self._part = part
        self._pushed: dict[Hashable, tuple[float, float]] = {}  # start and end by key and bytes
        self._idle_from = 0.0
        self._received = 0.0
        self.egress = 0

    def down(self, now: float, device: Device, parts: Sequence[tuple[Hashable, int]], seed: int) -> float:
        link, server = _factors(seed, 1, self._part.noise, self._part.server_noise)
        speed, done = self._pull(device.down * link), now
        for key, size in parts:
            start, end = self._push(now, key, size, self._part.egress * server)
            done = max(end, max(start, done) + size / speed)
        return done + device.latency

    def up(self, now: float, device: Device, size: int, seed: int) -> float:
        link, server = _factors(seed, 2, self._part.noise, self._part.server_noise)
        self._received = max(self._received, now) + size / (self._part.ingress * server)
        return max(now + size / (device.up * link), self._received) + device.latency

    def _push(self, now: float, key: Hashable, size: int, speed: float) -> tuple[float, float]:
        content = (key, size)
        if content in self._pushed:
            return self._pushed[content]
        start = max(now, self._idle_from)
        self._idle_from = end = start + size / speed
        self.egress += size
        if self._part.multicast:
            self._pushed[content] = (start, end)
            if len(self._pushed) > KEEP:
                del self._pushed[next(iter(self._pushed))]
        return start, end

    def _pull(self, speed: float) -> float:
        quantum = self._part.quantum
        if not quantum:
            return speed
        step = float(np.round(speed / MB * quantum, 2))
        if not step:
            raise ValueError(f"quantum {quantum:g} rounds a link of {speed:g} bytes per second to nothing")
        return step / quantum * MB


def pr_fl(noise: float = 0.3, server_noise: float = 0.1, quantum: float = 0.0) -> shared:
    """PR-FL's server, as published in its code: egress 10, ingress 50 MB (2^20 bytes) per second on average.

    Its clients' links are `sim.devices.pr_fl`. Ours: no rounding unless `quantum` is .05, and one draw of the noise a
    task where the code has one an iteration.
    """
    return shared(10.0 * MB, 50.0 * MB, noise=noise, server_noise=server_noise, quantum=quantum)


TABLE: dict[str, Callable[..., Part]] = {"links": links, "shared": shared, "pr_fl": pr_fl}


def _factors(seed: int, stream: int, link: float, server: float) -> tuple[float, float]:
    """Speed over mean speed of a device's link and of the server, for the task with this seed."""
    if not link and not server:
        return 1.0, 1.0
    normal = np.random.default_rng([seed, stream]).standard_normal((2, 20))
    means = np.exp(normal * [[link], [server]]).mean(axis=1)
    return float(means[0]), float(means[1])


def _sigma(name: str, value: float) -> None:
    if not isfinite(value) or value < 0:
        raise ValueError(f"{name} must be at least 0, got {value:g}")
