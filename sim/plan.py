"""An experiment before it runs: its parts as objects, all that can be checked without training, every default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from prfl import config, cost, data, groups, masks, merge, models, partition
from prfl.codec import Codec
from prfl.config import ConfigError, Experiment
from prfl.problem import Problem
from prfl.types import Selector, State
from sim import devices, network
from sim.devices import Device
from strategies import pacing as pacings
from strategies import selector as selectors
from strategies import table
from strategies.method import Method
from strategies.pacing import Pacing


@dataclass(frozen=True)
class Parts:
    """An experiment's parts as objects."""

    method: Method
    pacing: Pacing
    selector: Selector
    fleet: tuple[Device, ...]
    network: network.Part
    codec: Codec
    residual: bool

    @property
    def classes(self) -> dict[int, str]:
        """Every client's device class."""
        return {client: device.name for client, device in enumerate(self.fleet)}


def parts(experiment: Experiment) -> Parts:
    """Everything that can be checked without data or model. Raises ConfigError."""
    clients = experiment.data.clients
    pacing: Pacing = config.part("pacing", experiment.pacing, pacings.TABLE)
    if pacing.drop_late and clients < pacing.goal < inf:
        raise ConfigError(f"pacing: rounds of {pacing.goal:g} updates can not be had from {clients} clients")
    for kind, spec, rows in (("data set", experiment.data.set, data.TABLE), ("model", experiment.model, models.TABLE)):
        config.part(kind, spec, rows)
    config.part("partition", experiment.data.partition, partition.TABLE)
    return Parts(
        table.method(experiment.method, config.work(experiment.work)),
        pacing,
        config.part("selector", experiment.selector, selectors.TABLE),
        _fleet(experiment),
        config.part("network", experiment.devices.network, network.TABLE),
        config.part("codec", {"name": "codec", **experiment.codec}, {"codec": Codec}),
        experiment.residual,
    )


def start(built: Parts, given: Problem) -> State:
    """The state before any task, after a rehearsal of what comes: costs, masks, tasks, the merge. Raises ValueError."""
    params = models.values(given.model)
    architecture = groups.architecture(given.model, given.example)
    state = built.method.init(params, architecture, built.classes, given.seed)
    forward = cost.flops_by_kind(params, masks.DENSE, architecture)
    for device in built.fleet:
        device.seconds({kind: flops for kind, flops in forward.items() if flops})
    for client in {name: client for client, name in built.classes.items()}.values():
        task = built.method.assign(state, client, np.random.default_rng(given.seed))
        if built.residual and task.mask.ranking is None:
            raise ConfigError("residual: the method's masks are not cut from one ranking")
    if type(getattr(built.method, "merge", None)) in merge.TABLE.values():
        built.method.merge(state, ())  # leaves all as it is, but sees the model
    return state


def spelled(experiment: Experiment) -> Experiment:
    """The same experiment with every default written out, of parts and of the device profiles in use."""
    e, settings = experiment, experiment.devices
    noise = config.part("noise", {"name": "noise", **e.data.noise}, {"noise": partition.Noise})
    learned = {
        "set": config.spelled(e.data.set, data.TABLE),
        "partition": config.spelled(e.data.partition, partition.TABLE),
        "noise": asdict(noise),
    }
    owned: dict[str, Any] = {"network": config.spelled(settings.network, network.TABLE)}
    if settings.fleet is not None:
        owned["fleet"] = config.spelled(settings.fleet, devices.TABLE)
    else:
        owned["profiles"] = {name: _profile(device) for name, device in _profiles(e).items() if name in settings.mix}
    return e.model_copy(
        update={
            "data": e.data.model_copy(update=learned),
            "model": config.spelled(e.model, models.TABLE),
            "work": asdict(config.work(e.work)),
            "method": table.spelled(e.method),
            "pacing": config.spelled(e.pacing, pacings.TABLE),
            "selector": config.spelled(e.selector, selectors.TABLE),
            "devices": settings.model_copy(update=owned),
            "codec": asdict(config.part("codec", {"name": "codec", **e.codec}, {"codec": Codec})),
        }
    )


def _fleet(experiment: Experiment) -> tuple[Device, ...]:
    settings, clients = experiment.devices, experiment.data.clients
    if settings.fleet is not None:
        fleet: tuple[Device, ...] = config.part("devices: fleet", settings.fleet, devices.TABLE)
    else:
        try:
            fleet = devices.fleet(settings.mix, clients, experiment.seed, _profiles(experiment), settings.spread)
        except ValueError as error:
            raise ConfigError(f"devices: {error}") from None
    if len(fleet) != clients:
        raise ConfigError(f"devices: the fleet has {len(fleet)} devices for {clients} clients")
    return fleet


def _profiles(experiment: Experiment) -> dict[str, Device]:
    own = experiment.devices.profiles
    return devices.load(Path(own) if isinstance(own, str) else own)


def _profile(device: Device) -> Mapping[str, Any]:
    return {key: config.plain(value) for key, value in asdict(device).items() if key != "name"}
