"""A small world for tests of the loop: a linear model, synthetic data, a few devices of three speeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from clients.train import train
from prfl import models
from prfl.codec import Codec, Layout
from prfl.data import Samples
from prfl.groups import architecture
from prfl.types import Architecture, Task, Tree, Update, Work
from sim.devices import MB, Device
from sim.network import Network, links
from sim.transport import VirtualTransport
from sim.workers import Serial, Workers, singly
from strategies import table
from strategies.method import Method
from strategies.pacing import Pacing, buffered, one_arrival, sync, window

CLIENTS = 6
CLASSES = 3
WORK = Work(steps=3, batch=8, lr=0.1)
PACINGS: dict[str, Pacing] = {
    "sync": sync(CLIENTS),
    "over": sync(3, over=2),
    "deadline": sync(CLIENTS, deadline=2.0),
    "one_arrival": one_arrival(4),
    "buffered": buffered(4, 2),
    "window": window(4, 1.5),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "fedmp": {"valuation": {"name": "loss_decrease", "by": "clients"}},  # needs no judge
    "pr_fl": {"every": 2, "patience": 1},
    "fedgmr": {"every": 2, "patience": 1},
    "autoflip": {"epochs": 3, "patience": 2, "explorers": 0.5},
    "heterofl": {"head": ["fc2.weight", "fc2.bias"]},
    "prunefl": {"initial": 2, "passes": 1, "every": 2, "halving": 4, "overhead": 1e-3},
    "feddst": {"sparsity": 0.5, "rate": 0.4, "every": 2, "end": 8},
    "sub_fedavg": {"step": 0.2, "target": 0.5, "accuracy": 0.1, "work": {"steps": 6}},
}


def method(name: str, **more: Any) -> Method:
    """A method of the table with settings for a short run."""
    return table.method({"name": name, **OPTIONS.get(name, {}), **more}, WORK)


class World:
    """Model, data and fleet of one test; `transport()` starts a new virtual clock."""

    def __init__(self, clients: int = CLIENTS, samples: int = 24, failure: float = 0.0, jitter: float = 0.0):
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(CLASSES, 1, 4, 4, generator=generator) * 2
        y = torch.randint(CLASSES, (clients * samples,), generator=generator)
        x = centres[y] + torch.randn(len(y), 1, 4, 4, generator=generator)
        self.all = Samples(x, y)
        self.data = [self.all.subset(torch.arange(c * samples, (c + 1) * samples)) for c in range(clients)]
        self.model = models.build("mlp", (1, 4, 4), CLASSES, 0, {"hidden": (8,)})
        self.params: Tree = models.values(self.model)
        self.architecture: Architecture = architecture(self.model, x[:1])
        self.layout = Layout.of(self.params, self.architecture.groups)
        self.fleet = [
            Device(f"d{c % 3}", {"conv": 1e6 / 4 ** (c % 3), "linear": 1e6 / 4 ** (c % 3)}, 2**30, MB / 100, MB / 200,
                   failure=failure, jitter=jitter)
            for c in range(clients)
        ]  # fmt: skip
        self.classes = {c: device.name for c, device in enumerate(self.fleet)}
        self.tasks: list[Task] = []

    def run(self, task: Task) -> Update:
        """What the workers do."""
        self.tasks.append(task)
        return train(task, self.model, self.data[task.client])

    def transport(
        self,
        workers: Workers | None = None,
        fleet: Sequence[Device] | None = None,
        network: Network | None = None,
        run: Callable[[Task], Update] | None = None,
        codec: Codec | None = None,
        residual: bool = False,
    ) -> VirtualTransport:
        return VirtualTransport(
            self.fleet if fleet is None else fleet,
            [len(d) for d in self.data],
            workers or Serial(singly(run or self.run)),
            network or links(),
            codec or Codec(),
            self.layout,
            self.architecture,
            residual,
        )
