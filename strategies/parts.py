"""The server's side of an experiment as objects: method, pacing, selector and codec, and every default of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf

from prfl import config, data, models, partition
from prfl.codec import Codec
from prfl.config import ConfigError, Experiment
from prfl.types import Selector
from strategies import pacing as pacings
from strategies import selector as selectors
from strategies import table
from strategies.method import Method
from strategies.pacing import Pacing


@dataclass(frozen=True)
class Parts:
    """What the loop needs of an experiment."""

    method: Method
    pacing: Pacing
    selector: Selector
    codec: Codec


def of(experiment: Experiment) -> Parts:
    """Everything that can be checked without data, model or devices. Raises ConfigError."""
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
        config.part("codec", {"name": "codec", **experiment.codec}, {"codec": Codec}),
    )


def spelled(experiment: Experiment) -> Experiment:
    """The same experiment with every default written out but those of its devices."""
    e = experiment
    noise = config.part("noise", {"name": "noise", **e.data.noise}, {"noise": partition.Noise})
    learned = {
        "set": config.spelled(e.data.set, data.TABLE),
        "partition": config.spelled(e.data.partition, partition.TABLE),
        "noise": asdict(noise),
    }
    return e.model_copy(
        update={
            "data": e.data.model_copy(update=learned),
            "model": config.spelled(e.model, models.TABLE),
            "work": asdict(config.work(e.work)),
            "method": table.spelled(e.method),
            "pacing": config.spelled(e.pacing, pacings.TABLE),
            "selector": config.spelled(e.selector, selectors.TABLE),
            "codec": asdict(config.part("codec", {"name": "codec", **e.codec}, {"codec": Codec})),
        }
    )
