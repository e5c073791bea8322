"""What a device costs in time, bytes and energy: profiles from `devices.yaml`, fleets of them, and a task's luck."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle, islice
from math import exp, inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from prfl.energy import Watts

MB = 2**20
"""Bytes; the unit of PR-FL's link lists."""

SHIPPED = Path(__file__).with_name("devices.yaml")


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Device:
    """One device of a class. Bytes, seconds, watts; a multiply-add is two floating-point operations.

    `flops[kind]`: what training (forward and backward) really reaches per second in layers of this kind. `memory`: RAM.
    `latency`: one way. `startup`: per task, before computing. `step`: what a mini-batch takes besides its operations,
    which is what remains of a very small model. `failure`: chance that a task gives no answer.
    `jitter`: sigma of a log-normal factor of median 1 on the compute time.
    `availability`: windows (from, to) within every `period` in which the device takes tasks; none: always.
    `sparse`: kernels that skip zeros, so that weight masks save compute. `watts`: None where nobody knows.
    """

    name: str
    flops: Mapping[str, float]
    memory: int
    down: float
    up: float
    latency: float = 0.0
    startup: float = 0.0
    step: float = 0.0
    watts: Watts | None = None
    failure: float = 0.0
    jitter: float = 0.0
    availability: tuple[tuple[float, float], ...] = ()
    period: float = 86400.0
    sparse: bool = False
    source: str = ""
    measured: bool = False

    def __post_init__(self) -> None:
        for kind, rate in self.flops.items():
            if not rate > 0:
                raise ValueError(f"flops of {kind} must be above 0, got {rate:g}")
        for name in ("memory", "down", "up", "period"):
            _check(self, name, above=True)
        for name in ("latency", "startup", "step", "jitter"):
            _check(self, name)
        _check(self, "failure", high=1)
        edges = [edge for window in self.availability for edge in window]
        empty = any(start >= end for start, end in self.availability)
        if edges and (empty or edges != sorted(edges) or edges[0] < 0 or edges[-1] > self.period):
            raise ValueError(f"availability must be ascending windows within 0 and {self.period:g}, got {edges}")

    def seconds(self, flops: Mapping[str, float], steps: float = 0) -> float:
        """Compute time of this many operations by layer kind, in so many mini-batches. ValueError: no rate."""
        try:
            return sum(amount / self.flops[kind] for kind, amount in flops.items()) + steps * self.step
        except KeyError as kind:
            raise ValueError(f"device {self.name}: no rate for {kind}; have {', '.join(self.flops)}") from None

    def available(self, at: float) -> float:
        """The earliest time from `at` on when the device takes a task."""
        if not self.availability:
            return at
        passed = at // self.period
        for start, end in self.availability:
            if at < passed * self.period + end:
                return max(at, passed * self.period + start)
        return (passed + 1) * self.period + self.availability[0][0]


class Draw(NamedTuple):
    """The luck of one task: whether it fails, and the factor on its compute time."""

    failed: bool
    slowdown: float


_STEADY = Draw(False, 1.0)


def draw(device: Device, seed: int) -> Draw:
    """The luck of the task with this seed on this device; it depends on nothing else."""
    if not device.failure and not device.jitter:
        return _STEADY
    rng = np.random.default_rng([seed, 0])
    failed, normal = rng.random() < device.failure, rng.standard_normal()
    return Draw(bool(failed), exp(device.jitter * normal))


def load(own: Path | Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Device]:
    """The shipped profiles by name, a user's own (a file, or what one would hold) laid over them field by field.

    A new name needs all fields without a default, and `source`. Raises ValueError, one line.
    """
    profiles = _read(SHIPPED)
    changes = _read(own) if isinstance(own, Path) else own or {}
    where = own.name if isinstance(own, Path) else "experiment" if own else SHIPPED.name
    for name, values in changes.items():
        old = profiles.get(name, {})
        if old:
            old = {**old, "source": f"{where}; what it leaves out: {old['source']}", "measured": False}
        profiles[name] = _merged(old, values)
    return {name: _profile(where, name, values) for name, values in profiles.items()}


def fleet(
    mix: Mapping[str, float] | Sequence[str],
    clients: int,
    seed: int,
    profiles: Mapping[str, Device],
    spread: float = 0.0,
) -> tuple[Device, ...]:
    """A device for every client.

    `mix`: shares by profile, met exactly up to whole clients (largest remainder), in an order shuffled by the seed; or
    one profile's name a client. `spread`: sigma of a log-normal factor of median 1 on each device's speed.
    """
    if missing := [name for name in mix if name not in profiles]:
        raise ValueError(f"no device {missing[0]!r}; have {', '.join(profiles)}")
    if not (isfinite(spread) and spread >= 0):
        raise ValueError(f"spread must be at least 0, got {spread:g}")
    rng = np.random.default_rng(seed)
    if isinstance(mix, Mapping):
        names = [name for name, n in zip(mix, _whole(mix, clients), strict=True) for _ in range(n)]
        names = [names[i] for i in rng.permutation(clients)]
    else:
        names = list(mix)
    if len(names) != clients:
        raise ValueError(f"a list of devices names one for each of the {clients} clients, got {len(names)}")
    speed = np.exp(spread * rng.standard_normal(clients)).tolist()
    return tuple(
        replace(profiles[name], flops={kind: rate * x for kind, rate in profiles[name].flops.items()})
        if spread
        else profiles[name]
        for name, x in zip(names, speed, strict=True)
    )


def links(
    down: Sequence[float],
    up: Sequence[float],
    compute: Mapping[str, float] | None = None,
    startup: float = 0.0,
    clients: int = 0,
) -> tuple[Device, ...]:
    """Devices given by their link speeds in MB (2^20 bytes) per second, one for every pair, or so many `clients`.

    For more clients than pairs the list starts over. `compute`: operations per second by layer kind; None: computing
    takes no time but `startup`, as in PR-FL. Classes are link0, link1, ... in order; equal pairs are one class.
    """
    if len(down) != len(up) or not down:
        raise ValueError(f"links need as many speeds down as up, got {len(down)} and {len(up)}")
    if clients < 0:
        raise ValueError(f"links need 0 clients (one for every pair) or more, got {clients}")
    pairs = list(zip(down, up, strict=True))
    classes = {pair: f"link{i}" for i, pair in enumerate(dict.fromkeys(pairs))}
    rates = dict.fromkeys(("conv", "linear"), inf) if compute is None else compute
    devices = [
        Device(classes[d, u], rates, 2**40, d * MB, u * MB, startup=startup, source="link speeds given")
        for d, u in pairs
    ]
    return tuple(islice(cycle(devices), clients or len(devices)))


def pr_fl(clients: int = 0) -> tuple[Device, ...]:
    """The ten clients of PR-FL's FEMNIST, CIFAR-10, MNIST and Tiny-ImageNet runs: mean links, as published."""
    down, up = (20, 18, 12, 10, 6, 4, 2.5, 2, 2, 1.5), (5, 4, 3, 2.5, 1.5, 1, 0.6, 0.5, 0.5, 0.4)
    return links(down, up, clients=clients)


def stale(
    bands: tuple[int, ...] = (10, 10, 10, 5, 5, 5, 5),
    step: int = 1,
    shuffle: bool = False,
    seed: int = 0,
    compute: Mapping[str, float] | None = None,
) -> tuple[Device, ...]:
    """Devices that differ in a delay alone, whole seconds a task: the stale list of async-FL, as in its code.

    The first `bands[0]` have none, the next `bands[1]` one from 0 to `step`, the next from there to twice that, and so
    on, drawn with both ends. Classes are stale0, stale1, ... by band. The delay comes before computing; links take no
    time, and neither does computing unless `compute` gives operations per second by layer kind.
    """
    if step < 1 or not bands or min(bands) < 0:
        raise ValueError(f"stale needs a step of 1 or more and bands of 0 or more, got {step} and {list(bands)}")
    rng, rates = np.random.default_rng(seed), dict.fromkeys(("conv", "linear"), inf) if compute is None else compute
    devices = [
        Device(f"stale{band}", rates, 2**40, INSTANT, INSTANT, startup=float(delay), source="delays given")
        for band, size in enumerate(bands)
        for delay in (rng.integers((band - 1) * step, band * step, size, endpoint=True) if band else [0] * size)
    ]
    return tuple(devices[i] for i in rng.permutation(len(devices))) if shuffle else tuple(devices)


INSTANT = 1e15
"""Bytes per second of a link that takes no time."""

TABLE: dict[str, Callable[..., tuple[Device, ...]]] = {"links": links, "pr_fl": pr_fl, "stale": stale}
"""Fleets given by their links, client by client."""

_DEVICE = TypeAdapter(Device)


def _check(part: object, name: str, high: float = inf, above: bool = False) -> None:
    value = getattr(part, name)
    if not (isfinite(value) and 0 <= value <= high) or (above and value == 0):
        bounds = "above 0" if above else "at least 0" if high == inf else f"within 0 and {high:g}"
        raise ValueError(f"{name} must be {bounds}, got {value:g}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ValueError(f"no device file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise ValueError(f"{path.name}: a device file maps names to fields")
    return {str(name): values for name, values in found.items()}


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {k: _merged(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return {**old, **new, **both}


def _profile(where: str, name: str, values: Mapping[str, Any]) -> Device:
    known = [f.name for f in fields(Device) if f.name != "name"]
    if extra := [key for key in values if key not in known]:
        raise ValueError(f"{where}: {name}: no field {extra[0]!r}; have {', '.join(known)}")
    if not values.get("source"):
        raise ValueError(f"{where}: {name}: source must say where the numbers come from")
    try:
        return _DEVICE.validate_python({**values, "name": name})
    except ValidationError as errors:
        first = errors.errors()[0]
        at = "".join(f"{part}: " for part in first["loc"])
        raise ValueError(f"{where}: {name}: {at}{first['msg'].removeprefix('Value error, ')}") from None


def _whole(mix: Mapping[str, float], clients: int) -> list[int]:
    """Clients by profile: the whole part of its share, and one more for the largest remainders."""
    total = sum(mix.values())
    if clients < 1 or not 0 < total < inf or min(mix.values()) < 0:
        raise ValueError(
            f"a mix needs shares of at least 0, one above, for 1 client or more; got {dict(mix)} for {clients}"
        )
    shares = [round(share / total * clients, 9) for share in mix.values()]
    counts = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in order[: clients - sum(counts)]:
        counts[i] += 1
    return counts
