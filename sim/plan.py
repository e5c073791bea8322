"""An experiment before it runs: its parts as objects, all that can be checked without training, every default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prfl import config, cost, groups, masks, merge, models
from prfl.config import ConfigError, Experiment
from prfl.problem import Problem
from prfl.types import State
from sim import devices, network
from sim.devices import Device
from strategies import parts
from strategies.parts import Parts


@dataclass(frozen=True)
class Plan:
    """What the loop needs, the devices it learns on, and the network between."""

    parts: Parts
    fleet: tuple[Device, ...]
    network: network.Part
    residual: bool

    @property
    def classes(self) -> dict[int, str]:
        """Every client's device class."""
        return {client: device.name for client, device in enumerate(self.fleet)}


def of(experiment: Experiment) -> Plan:
    """Everything that can be checked without data or model. Raises ConfigError."""
    settings = simulated(experiment)
    link: network.Part = config.part("network", settings.network, network.TABLE)
    return Plan(parts.of(experiment), _fleet(settings, experiment), link, experiment.residual)


def simulated(experiment: Experiment) -> config.Devices:
    """The devices of an experiment that can be simulated. Raises ConfigError."""
    if isinstance(experiment.devices, config.Devices):
        return experiment.devices
    raise ConfigError("devices: real ones are not simulated; give a mix or a fleet")


def start(planned: Plan, given: Problem) -> State:
    """The state before any task, after a rehearsal of what comes: costs, masks, tasks, the merge. Raises ValueError."""
    params = models.values(given.model)
    architecture = groups.architecture(given.model, given.example)
    state = planned.parts.method.init(params, architecture, planned.classes, given.seed)
    forward = cost.flops_by_kind(params, masks.DENSE, architecture)
    for device in planned.fleet:
        device.seconds({kind: flops for kind, flops in forward.items() if flops})
    for client in {name: client for client, name in planned.classes.items()}.values():
        task = planned.parts.method.assign(state, client, np.random.default_rng(given.seed))
        if planned.residual and task.mask.ranking is None:
            raise ConfigError("residual: the method's masks are not cut from one ranking")
    if type(getattr(planned.parts.method, "merge", None)) in merge.TABLE.values():
        planned.parts.method.merge(state, ())  # leaves all as it is, but sees the model
    return state


def spelled(experiment: Experiment) -> Experiment:
    """The same experiment with every default written out, of parts and of the device profiles in use."""
    settings = simulated(experiment)
    owned: dict[str, Any] = {"network": config.spelled(settings.network, network.TABLE)}
    if settings.fleet is not None:
        owned["fleet"] = config.spelled(settings.fleet, devices.TABLE)
    else:
        owned["profiles"] = {name: _profile(d) for name, d in _profiles(settings).items() if name in settings.mix}
    full = parts.spelled(experiment)
    return full.model_copy(update={"devices": settings.model_copy(update=owned)})


def _fleet(settings: config.Devices, experiment: Experiment) -> tuple[Device, ...]:
    clients = experiment.data.clients
    if settings.fleet is not None:
        fleet: tuple[Device, ...] = config.part("devices: fleet", settings.fleet, devices.TABLE)
    else:
        try:
            fleet = devices.fleet(settings.mix, clients, experiment.seed, _profiles(settings), settings.spread)
        except ValueError as error:
            raise ConfigError(f"devices: {error}") from None
    if len(fleet) != clients:
        raise ConfigError(f"devices: the fleet has {len(fleet)} devices for {clients} clients")
    return fleet


def _profiles(settings: config.Devices) -> dict[str, Device]:
    own = settings.profiles
    return devices.load(Path(own) if isinstance(own, str) else own)


def _profile(device: Device) -> Mapping[str, Any]:
    return {key: config.plain(value) for key, value in asdict(device).items() if key != "name"}
