"""Any method in any pacing as a Flower strategy, for a ServerApp of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from prfl import config
from prfl.codec import Codec, Layout
from prfl.config import Experiment
from prfl.masks import DENSE
from prfl.records import groups_out
from prfl.types import Architecture, Selector, State, Task, Tree, Work
from strategies.grid import GridTransport
from strategies.method import Method
from strategies.pacing import Pacing
from strategies.server import Scores, serve

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class PruningStrategy(Strategy):
    """`PruningStrategy(pr_fl(), buffered(in_flight=10, goal=5)).start(grid, initial_arrays, num_rounds)`.

    A round is a version: one merge. The clients run `clients.app`, which builds model and data from `experiment`;
    `architecture` is needed where masks are channels. `min_clients` have to be there before the first task.
    Every `evaluate_every` versions (0: never) all idle clients score the global model on their own data.
    """

    def __init__(
        self,
        method: Method,
        pacing: Pacing,
        *,
        experiment: Experiment | None = None,
        selector: Selector | None = None,
        codec: Codec | None = None,
        architecture: Architecture | None = None,
        min_clients: int = 2,
        evaluate_every: int = 0,
    ):
        self.method, self.pacing, self.selector = method, pacing, selector
        self.experiment, self.codec = experiment or Experiment(), codec or Codec()
        self.architecture = architecture or Architecture()
        self.min_clients, self.evaluate_every = min_clients, evaluate_every
        self.state: State | None = None
        self._transport: GridTransport | None = None

    def summary(self) -> None:
        """Log the parts."""
        for part, value in (("method", self.method), ("pacing", self.pacing), ("codec", self.codec)):
            print(f"\t{part}: {value}")

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Train for `num_rounds` versions; `timeout`: seconds a task may take. `train_config` sets fields of `Work`."""
        transport = self._open(grid, initial_arrays, timeout, train_config)
        result, losses = Result(), list[float]()

        def log(event: Mapping[str, Any]) -> None:
            if "loss" in event:
                losses.append(event["loss"])
            if event["kind"] == "merge" and losses:
                told = {"loss": float(np.mean(losses)), "num-updates": event["updates"]}
                result.train_metrics_clientapp[event["version"]] = MetricRecord(told)
                losses.clear()

        def evaluate(state: State) -> Scores | None:
            self.state = state
            arrays = ArrayRecord(dict(state.params))
            if self.evaluate_every and state.version and state.version % self.evaluate_every == 0:
                asked = self.configure_evaluate(state.version, arrays, evaluate_config or ConfigRecord(), grid)
                scores = self.aggregate_evaluate(state.version, grid.send_and_receive(asked, timeout=timeout))
                if scores is not None:
                    result.evaluate_metrics_clientapp[state.version] = scores
            found = evaluate_fn(state.version, arrays) if evaluate_fn else None
            if found is None:
                return None
            result.evaluate_metrics_serverapp[state.version] = found
            return Scores({k: float(v) for k, v in found.items() if isinstance(v, (int, float))})

        assert self.state is not None
        self.state = serve(
            self.method,
            self.pacing,
            transport,
            self.state,
            stop=lambda state, now: state.version >= num_rounds,
            selector=self.selector,
            evaluate=evaluate,
            log=log,
        )
        result.arrays = ArrayRecord(dict(self.state.params))
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: `start` sends tasks as the pacing allows, not by rounds."""
        return []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Nothing: updates are merged as the pacing says."""
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The dense global model to every idle client."""
        assert self._transport is not None
        params = _tree(arrays)
        return [
            self._transport.message(Task(client, server_round, params, DENSE, Work(), 0), MessageType.EVALUATE)
            for client in self._transport.idle()
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means over the clients that answered, by their number of examples."""
        told = [dict(r.content["metrics"]) for r in replies if r.has_content()]
        sizes = [float(m.pop("num-examples")) for m in told]  # type: ignore[arg-type]
        if not told:
            return None
        return MetricRecord({k: float(np.average([m[k] for m in told], weights=sizes)) for k in told[0]})

    def _open(
        self, grid: Grid, arrays: ArrayRecord, timeout: float, train_config: ConfigRecord | None
    ) -> GridTransport:
        beside = {
            "experiment": self.experiment.model_dump_json(),
            "codec": json.dumps(asdict(self.codec)),
            "groups": groups_out(self.architecture.groups),
        }
        params = _tree(arrays)
        layout = Layout.of(params, self.architecture.groups)
        self._transport = GridTransport(grid, self.codec, layout, beside, timeout=timeout)
        self._transport.enrol(self.min_clients)
        if train_config:
            if not isinstance(self.method.work, Work):
                raise ValueError("train_config: this method's work changes by version; set it there")
            self.method = replace(self.method, work=config.work(dict(train_config), self.method.work))
        self.state = self.method.init(params, self.architecture, self._transport.classes, self.experiment.seed)
        return self._transport


def _tree(arrays: ArrayRecord) -> Tree:
    return dict(arrays.to_torch_state_dict())
