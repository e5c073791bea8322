"""Experiments that real devices run."""

from __future__ import annotations

from prfl import config
from prfl.config import ConfigError, Experiment


def real(experiment: Experiment) -> config.Real:
    """The devices of an experiment, which have to be real ones. Raises ConfigError."""
    if not isinstance(experiment.devices, config.Real):
        raise ConfigError("devices: these are simulated; say devices: real")
    if experiment.residual:
        raise ConfigError("residual: increments are only simulated so far; real devices get whole messages")
    return experiment.devices
