"""Any method in any pacing as a Flower strategy, for a ServerApp of one's own."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from prfl import config as configs
from prfl.codec import Codec, Layout
from prfl.config import Experiment
from prfl.masks import DENSE
from prfl.records import architecture_out, experiment_out
from prfl.types import Architecture, Selector, State, Task, Tree, Work
from strategies import limits
from strategies import selector as selectors
from strategies.grid import UNREADABLE, GridTransport, Sent
from strategies.method import Method
from strategies.pacing import Pacing
from strategies.server import Scores, serve

LENGTH = {"epochs", "steps", "batch"}  # fields of `Work` that tell what a task costs


class PruningStrategy(Strategy):
    """`PruningStrategy(pr_fl(), buffered(in_flight=10, goal=5)).start(grid, initial_arrays, num_rounds)`.

    A round is a version: one merge. The clients run `clients.app`, which builds model and data from `experiment`;
    `architecture` is needed where masks are channels, and where devices have limits. `min_clients` have to be there
    before the first task. Every `evaluate_every` versions (0: never) all idle clients score the global model on their
    own data. What `evaluate_fn` returns counts as validation scores: PR-FL gives capacity back by its "accuracy".
    `state` is the last merged state.
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
        self.method, self.pacing, self.selector = method, pacing, selector or selectors.random()
        self.experiment, self.codec = experiment or Experiment(), codec or Codec()
        self.architecture = architecture or Architecture()
        self.min_clients, self.evaluate_every = min_clients, evaluate_every
        self.state: State | None = None
        self._transport: GridTransport | None = None
        self._asked: dict[int, Sent] = {}  # by node, between configure_train and aggregate_train
        self._arrays = ArrayRecord()

    def summary(self) -> None:
        """Log the parts."""
        for part, value in (("method", self.method), ("pacing", self.pacing), ("codec", self.codec)):
            logging.getLogger("flwr").info("\t%s: %s", part, value)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Train for `num_rounds` versions; `timeout`: seconds a task may take. `train_config` sets fields of `Work`.

        `initial_arrays`: a state dict; integer buffers come back as they are. Training metrics are means over the
        updates of a version. Raises ValueError for a config that can not be followed, TimeoutError when too few
        clients come, strategies.server.Stalled when the run can not go on.
        """
        self.summary()
        method, result, losses = self._working(train_config), Result(), list[float]()
        transport, self.state = self._opened(grid, initial_arrays, method, timeout)

        def log(event: Mapping[str, Any]) -> None:
            if "loss" in event:
                losses.append(event["loss"])
            if event["kind"] == "merge":
                result.train_metrics_clientapp[event["version"]] = _told(event["updates"], losses)
                losses.clear()

        def evaluate(state: State) -> Scores | None:
            version, arrays = state.version, _record(state.params, initial_arrays)
            if self.evaluate_every and version and version % self.evaluate_every == 0:
                asked = self.configure_evaluate(version, arrays, evaluate_config or ConfigRecord(), grid)
                try:
                    replies = grid.send_and_receive(asked, timeout=timeout)
                except UNREADABLE as error:  # one reply that is none takes the others with it
                    logging.getLogger("flwr").warning("scores can not be read: %s", type(error).__name__)
                    replies = []
                scores = self.aggregate_evaluate(version, replies)
                if scores is not None:
                    result.evaluate_metrics_clientapp[version] = scores
            found = evaluate_fn(version, arrays) if evaluate_fn else None
            if found is None:
                return None
            result.evaluate_metrics_serverapp[version] = found
            return Scores({k: float(v) for k, v in found.items() if isinstance(v, (int, float))})

        self.state = serve(
            method,
            self.pacing,
            transport,
            self.state,
            stop=lambda state, now: state.version >= num_rounds,
            selector=self.selector,
            evaluate=evaluate,
            keep=lambda state: setattr(self, "state", state),
            log=log,
        )
        result.arrays = _record(self.state.params, initial_arrays)
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tasks for as many idle clients as the pacing has in flight. For loops by rounds; `start` sends its own."""
        method = self._working(config)
        if self.state is None or self._transport is None:
            self._transport, self.state = self._opened(grid, arrays, method)
        self._transport.enrol(self.min_clients)
        self.state = state = replace(self.state, params=_tree(arrays))
        self._arrays = arrays
        draw = np.random.default_rng((state.seed, 1, state.sent))
        messages = []
        here = self._transport.idle()
        idle = method.among(state, here, 0) if method.among else here
        for client in self.selector.ask(state, idle, self.pacing.in_flight, draw):
            task = method.assign(self.state, client, np.random.default_rng((state.seed, 0, self.state.sent)))
            self.state = replace(self.state, sent=self.state.sent + 1)
            messages.append(self._transport.message(task))
            self._asked[messages[-1].metadata.dst_node_id] = Sent(task, self._transport.now(), 0)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """One step of the method with the replies to `configure_train`'s messages; Nones when there is no update."""
        if self.state is None or self._transport is None:
            raise ValueError("aggregate_train: configure_train comes first")
        came = {r.metadata.src_node_id: r for r in replies}
        told = [self._transport.arrival(self._asked[node], came[node]) for node in came if node in self._asked]
        arrivals = sorted(told, key=lambda a: a.task.client)
        self._asked.clear()
        for arrival in arrivals:
            self.state, _ = limits.heeded(self.state, arrival)
            if self.state.limits.get(arrival.task.client) == 0:
                self._transport.retire(arrival.task.client)
        updates = [a.update for a in arrivals if a.update is not None]
        if not updates:
            return None, None
        state = replace(self.state, selector=self.selector.tell(self.state, arrivals))
        self.state = self.method.step(state, arrivals)
        losses = [u.metrics["loss"] for u in updates if "loss" in u.metrics]
        return _record(self.state.params, self._arrays), _told(len(updates), losses)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The dense global model to every idle client. Raises ValueError for any config: there is nothing to set."""
        if config:
            raise ValueError(f"evaluate_config: there is nothing to set, got {', '.join(config)}")
        if self._transport is None or not self.evaluate_every:
            return []
        task = Task(0, server_round, _tree(arrays), DENSE, Work(), 0)
        return [
            self._transport.message(replace(task, client=client), MessageType.EVALUATE)
            for client in self._transport.idle()
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means over the clients that answered, by their number of examples."""
        told = [r.content.metric_records["metrics"] for r in replies if _scored(r)]
        if not told:
            return None
        sizes = np.array([m["num-examples"] for m in told], dtype=float)
        shared = [k for k in told[0] if k != "num-examples" and all(_finite(m.get(k)) for m in told)]
        means = {k: float(np.average([m[k] for m in told], weights=sizes)) for k in shared}
        return MetricRecord({"num-examples": int(sizes.sum()), **means})

    def _working(self, train_config: ConfigRecord | None) -> Method:
        """The method with the work that the config asks for."""
        if not train_config:
            return self.method
        if not isinstance(self.method.work, Work):
            raise ValueError("train_config: this method's work changes by version; set it there")
        parts = (self.method.remask, self.method.amend)
        own = any(isinstance(value, Work) for part in parts for value in vars(part).values())
        if own or (self.method.costs and LENGTH & train_config.keys()):
            raise ValueError(
                "train_config: parts of this method go by its work as well; give it `work` when you make it"
            )
        return replace(self.method, work=configs.work(dict(train_config), self.method.work, "train_config"))

    def _opened(
        self, grid: Grid, arrays: ArrayRecord, method: Method, timeout: float = 3600.0
    ) -> tuple[GridTransport, State]:
        """The way to the clients, when enough are there, and the state before the first task."""
        beside = {
            "experiment": experiment_out(self.experiment),
            "codec": json.dumps(asdict(self.codec)),
            "architecture": architecture_out(self.architecture),
        }
        params = _tree(arrays)
        layout = Layout.of(params, self.architecture.groups)
        self._transport = GridTransport(grid, self.codec, layout, beside, timeout=timeout)
        self._transport.enrol(self.min_clients)
        state = method.init(params, self.architecture, self._transport.classes, self.experiment.seed)
        return self._transport, replace(state, selector=self.selector.init())


def _tree(arrays: ArrayRecord) -> Tree:
    """The entries of a state dict. Raises ValueError unless they are float32."""
    entries = {k: v for k, v in arrays.to_torch_state_dict().items() if v.is_floating_point()}
    if odd := [f"{k} is {v.dtype}" for k, v in entries.items() if v.dtype != torch.float32]:
        raise ValueError(f"arrays: float32 is wanted, {odd[0]}")
    return entries


def _record(params: Tree, like: ArrayRecord) -> ArrayRecord:
    """The state dict `like` with these entries."""
    return ArrayRecord(like.to_torch_state_dict() | dict(params))


def _told(updates: int, losses: list[float]) -> MetricRecord:
    told = MetricRecord({"num-updates": updates})
    if losses:
        told["loss"] = float(np.mean(losses))
    return told


def _scored(reply: Message) -> bool:
    """Whether a reply brings scores and the number of examples behind them."""
    if not reply.has_content() or not isinstance(reply.content, RecordDict):  # Flower looks into nothing it receives
        return False
    size = reply.content.metric_records.get("metrics", MetricRecord()).get("num-examples", 0)
    return isinstance(size, (int, float)) and 0 < size < 2**53


def _finite(score: object) -> bool:
    return isinstance(score, float) and isfinite(score)
