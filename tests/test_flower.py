"""Flower's doors: the Grid as a transport, any method as a Flower strategy, `flwr run .` to the bit."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app
from clients.local import Local
from deploy.run import classes
from prfl import config, groups, models, problem
from prfl.codec import Codec, Layout
from prfl.config import Experiment
from prfl.density import constant, tiers
from prfl.evaluate import evaluate
from prfl.problem import Problem
from prfl.records import (
    DIED,
    RAISED,
    SHORT,
    architecture_in,
    architecture_out,
    experiment_in,
    experiment_out,
    pack,
    unpack,
)
from prfl.types import GIVEN_UP, Architecture, Task, Update, Work
from sim.app import DEATHS, GridWorkers, nodes
from sim.pools import Place
from sim.run import simulate
from sim.workers import Failed
from strategies import table
from strategies.fedgmr import fedgmr
from strategies.flower import PruningStrategy
from strategies.grid import GridTransport
from strategies.method import Method
from strategies.pacing import buffered, sync
from strategies.server import serve

ROOT = Path(__file__).parent.parent
CLIENTS = 12
FIELDS: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "data": {"set": "digits", "clients": CLIENTS},
    "model": {"name": "mlp", "hidden": [16]},
    "work": {"steps": 5, "batch": 10, "lr": 0.1},
    "method": "fedavg",
    "pacing": {"name": "buffered", "in_flight": 6, "goal": 3},
    "devices": {"mix": {"pi3": 0.5, "laptop": 0.5}},
    "stop": {"versions": 6},
    "evaluate_every": 3,
}
EXPERIMENT = Experiment.model_validate(FIELDS)
WORK = Work(**FIELDS["work"])
SPEC: dict[str, Any] = {"experiment": experiment_out(EXPERIMENT), "codec": "{}", "architecture": "{}"}
NODE_UNAVAILABLE = 5  # Flower's code

Answer = Callable[[Message], Message | None]


class Nodes(Grid):
    """A Grid whose nodes run the ClientApp here. `answers[node]`: what it does instead; None: it says nothing yet."""

    def __init__(self, clients: int = CLIENTS):
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.contexts: dict[int, Context] = {}
        self.answers: dict[int, Answer] = {}
        self.asked: list[Message] = []
        self.twice = False
        self._waiting: dict[str, Message] = {}
        self._ids = itertools.count()
        for client in range(clients):
            self.join(client)

    def join(self, client: int, node: int | None = None, **config: str) -> int:
        """A node comes; node ids tell nothing about client numbers."""
        node = 1000 - 7 * client if node is None else node
        self.contexts[node] = Context(1, node, {"partition-id": client, **config}, RecordDict(), {})
        return node

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id in self.contexts:
                ids.append(f"m{next(self._ids)}")
                message.metadata.__dict__["_message_id"] = ids[-1]
                self._waiting[ids[-1]] = message
                self.asked.append(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for asked in [m for m in message_ids if m in self._waiting]:
            reply = self.reply(self._waiting[asked])
            if reply is not None:
                del self._waiting[asked]
                replies += [reply] * (2 if self.twice else 1)
        return replies

    def reply(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if node not in self.contexts:
            return Message(Error(NODE_UNAVAILABLE, "Node unavailable\nmore"), reply_to=message)
        if node in self.answers and message.metadata.message_type != "query":
            return self.answers[node](message)
        return app(message=message, context=self.contexts[node])

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None: ...
    def run(self) -> Any: ...
    def create_message(self, *args: Any, **more: Any) -> Message: ...


def silent(message: Message) -> None:
    return None


@cache
def given() -> Problem:
    return problem.build(EXPERIMENT)


@cache
def local() -> Local:
    return Local(given())


@cache
def architecture() -> Architecture:
    return groups.architecture(given().model, given().example)


def layout() -> Layout:
    return Layout.of(local().params)


def task(client: int, version: int = 0, **work: Any) -> Task:
    method = table.method("fedavg", replace(WORK, **work))
    state = method.init(local().params, seed=3)
    return replace(method.assign(state, client, np.random.default_rng(client)), version=version)


def transport(grid: Nodes, clients: int = 2, timeout: float = 20.0) -> GridTransport:
    found = GridTransport(grid, Codec(), layout(), SPEC, timeout=timeout, poll=0.001)
    found.enrol(clients)
    return found


def same(a: Update, b: Update) -> bool:
    return a.metrics == b.metrics and all(torch.equal(a.delta[k], b.delta[k]) for k in b.delta)


# The transport


def test_clients_go_by_partition_id_and_are_asked_once() -> None:
    grid = Nodes(0)
    grid.join(5, profile="pi3")
    grid.join(2, profile="laptop")
    grid.join(-1)
    found = transport(grid)
    for _ in range(5):
        assert found.idle() == [2, 5]
        found._pull()
    assert found.classes == {2: "laptop", 5: "pi3"}
    assert sorted(m.metadata.dst_node_id for m in grid.asked) == sorted(grid.contexts)


def test_a_task_comes_back_trained() -> None:
    found = transport(Nodes(3), 3)
    for client in (2, 0):
        found.send(task(client))
    assert found.busy() == 2
    assert found.idle() == [1]
    for _ in range(2):
        arrival = found.wait()
        assert arrival is not None
        assert arrival.update is not None
        assert same(arrival.update, local().train(task(arrival.task.client)))
        assert arrival.bytes_down == len(Codec().encode_task(arrival.task, layout()))
        assert arrival.bytes_up == len(Codec().encode_update(arrival.update, arrival.task, layout())[0])
    assert found.busy() == 0
    assert found.idle() == [0, 1, 2]


def test_late_joiners_are_enrolled() -> None:
    grid = Nodes(1)
    found = transport(grid, 1)
    grid.join(1, profile="pi5")
    found.send(task(0))
    assert found.idle() == []
    assert found.wait() is not None
    assert found.idle() == [0, 1]
    assert found.classes[1] == "pi5"


def test_a_newcomer_gets_work_while_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strategies.grid.LOOK", 0.01)
    grid = Nodes(1)
    found = transport(grid, 1)
    grid.answers[1000] = silent
    found.send(task(0))
    grid.join(1)
    assert found.wait() is None
    assert found.idle() == [1]
    assert found.busy() == 1


def test_a_client_number_is_not_taken_from_a_node_that_is_here() -> None:
    grid = Nodes(2)
    found = transport(grid)
    grid.join(0, node=77)
    for _ in range(3):
        found.idle()
        found._pull()
    found.send(task(0))
    assert grid.asked[-1].metadata.dst_node_id == 1000


def test_looks_for_answers_grow_rare_with_the_wait_and_the_clock_goes_on_after_an_interruption() -> None:
    grid = Nodes(1)
    found = GridTransport(grid, Codec(), layout(), SPEC, timeout=20, poll=0.001, elapsed=500.0)
    found.enrol(1)
    grid.answers[1000] = silent
    found.send(task(0))
    assert found.wait(found.now() + 0.5) is None
    assert 500.5 < found.now() < 520
    assert 0.001 <= found.polling.mean < found.polling.longest < 0.1
    assert 5 < found.polling.looks < 250


def test_too_few_clients_is_said() -> None:
    with pytest.raises(TimeoutError, match=r"^2 of 3 clients came within 0.05 s$"):
        transport(Nodes(2), 3, timeout=0.05)


def test_a_restarted_device_moves_to_its_new_node() -> None:
    grid = Nodes(1)
    found = transport(grid, 1)
    grid.contexts.clear()
    new = grid.join(0, node=77)
    while not found.idle():
        found._pull()
    found.send(task(0))
    assert grid.asked[-1].metadata.dst_node_id == new


def test_a_node_that_leaves_ends_its_task() -> None:
    grid = Nodes(2)
    found = transport(grid)
    found.send(task(1))
    grid.contexts.pop(1000 - 7)
    arrival = found.wait()
    assert arrival is not None
    assert (arrival.update, arrival.reason) == (None, "Node unavailable")
    assert found.idle() == [0]
    found.send(task(1))  # somebody did not look
    arrival = found.wait()
    assert arrival is not None
    assert arrival.reason == "the node is gone"


def test_an_error_on_the_device_is_one_line() -> None:
    found = transport(Nodes(2))
    found.send(task(0, lr=1e6, weight_decay=1e12))
    found.send(replace(task(0), client=1, work=replace(WORK, batch=0)))
    reasons = {a.reason for a in (found.wait(), found.wait()) if a}
    assert any("became" in r for r in reasons)
    assert any("work: need batch" in r for r in reasons)
    assert not any("\n" in r or "<class" in r for r in reasons)


def of_another(message: Message) -> Message:
    data, _ = Codec().encode_update(local().train(task(1)), task(1), layout())
    return Message(pack(data), reply_to=message)


def damaged(message: Message) -> Message:
    data, _ = Codec().encode_update(local().train(task(0)), task(0), layout())
    return Message(pack(data[:-9] + b"\0" + data[-8:]), reply_to=message)


GARBAGE: dict[str, tuple[Answer, str]] = {
    "empty": (lambda m: Message(RecordDict(), reply_to=m), "the message is none of prfl's"),
    "foreign": (lambda m: Message(RecordDict({"a": ArrayRecord()}), reply_to=m), "the message is none of prfl's"),
    "short": (lambda m: Message(pack(b"prfl"), reply_to=m), "truncated: 4 bytes"),
    "damaged": (damaged, "checksum"),
    "of another": (of_another, "client 1, version 0, not 0, 0 as asked"),
    "error": (lambda m: Message(Error(8), reply_to=m), "Flower error 8"),
    "silence": (lambda m: Message(Error(RAISED, ""), reply_to=m), "Flower error 2"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_reply_that_is_none_is_refused_with_the_reason(kind: str) -> None:
    grid = Nodes(2)
    found = transport(grid)
    grid.answers[1000], reason = GARBAGE[kind]
    found.send(task(0))
    arrival = found.wait()
    assert arrival is not None
    assert (arrival.update, arrival.reason) == (None, reason)
    assert found.idle() == [0, 1]


def test_a_device_class_that_the_method_does_not_name_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    grid = Nodes(0)
    grid.join(0, profile="pi4")
    grid.join(1, profile="toaster")
    found = GridTransport(
        grid, Codec(), layout(), SPEC, poll=0.001, known=classes(fedgmr({"pi4": 1.0, "pi3": 0.5}).density)
    )
    found.enrol(1)
    for _ in range(3):
        found._pull()
        assert (found.idle(), found.classes) == ([0], {0: "pi4"})
    (said,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert said == "client 1 is left alone: the method has no share for class 'toaster'; it has pi3, pi4"
    for takes_any in (constant(), tiers((1.0, 0.5)), tiers({"pi4": 1.0}, dynamic=True)):
        assert not classes(takes_any)


@pytest.mark.parametrize("who", [{}, {"client": "?", "profile": "p"}, {"client": 0}])
def test_a_node_that_says_nonsense_is_left_alone(who: dict[str, Any]) -> None:
    grid = Nodes(1)
    stranger = grid.join(1)
    genuine = grid.reply
    grid.reply = lambda m: Message(pack(b"", who), reply_to=m) if m.metadata.dst_node_id == stranger else genuine(m)  # type: ignore[method-assign]
    found = transport(grid, 1)
    for _ in range(3):
        found._pull()
        assert found.idle() == [0]
    assert len(grid.asked) == 2


def test_a_task_without_answer_fails_and_its_client_stays_busy_until_it_answers() -> None:
    grid = Nodes(2)
    found = transport(grid, timeout=0.05)
    grid.answers[1000] = silent
    found.send(task(0))
    arrival = found.wait()
    assert arrival is not None
    assert (arrival.update, arrival.reason) == (None, "no answer in 0.05 s")
    assert arrival.at - arrival.sent >= 0.05
    assert found.busy() == 0
    assert found.idle() == [1]
    del grid.answers[1000]
    assert found.wait(found.now()) is None  # the late answer comes and is dropped
    assert found.idle() == [0, 1]


def test_forgetting_frees_nobody() -> None:
    grid = Nodes(2)
    found = transport(grid)
    grid.answers[1000] = silent
    found.send(task(0))
    found.send(task(1))
    found._pull()  # 1 has answered, 0 has not
    found.forget()
    assert found.busy() == 0
    assert found.idle() == [1]
    del grid.answers[1000]
    late = [found.wait(found.now() + 0.01) for _ in range(3)]
    assert [(a.task.client, a.update, a.reason) for a in late if a] == [(1, None, GIVEN_UP), (0, None, GIVEN_UP)]
    assert all(a.bytes_down > 0 and a.bytes_up > 0 for a in late if a)
    assert found.idle() == [0, 1]


def test_with_nothing_under_way_waiting_ends_when_somebody_can_be_asked() -> None:
    grid = Nodes(1)
    found = transport(grid, 1)
    polls = itertools.count()
    grid.answers[1000] = lambda m: Message(Error(RAISED, "late"), reply_to=m) if next(polls) > 20 else None
    found.send(task(0))
    found.forget()
    late = found.wait()
    assert late is not None
    assert late.reason == GIVEN_UP
    assert found.wait() is None
    assert next(polls) > 20
    assert found.idle() == [0]


def test_an_answer_counts_once() -> None:
    grid = Nodes(2)
    found = transport(grid)
    grid.twice = True
    found.send(task(0))
    assert found.wait() is not None
    assert found.busy() == 0
    assert found.wait() is None


def test_the_run_goes_on_when_for_a_while_nobody_answers() -> None:
    grid = Nodes(2)
    found = transport(grid, timeout=0.1)
    genuine, until = grid.reply, time.monotonic() + 0.14
    grid.reply = lambda m: genuine(m) if m.metadata.message_type == "query" or time.monotonic() > until else None  # type: ignore[method-assign]
    m = table.method("fedavg", WORK)
    reasons: list[str] = []
    state = serve(
        m,
        sync(2),
        found,
        m.init(local().params),
        stop=lambda s, now: s.version == 2,
        log=lambda e: reasons.append(e["reason"]) if e["kind"] == "arrival" else None,
    )
    assert state.version == 2
    assert reasons[:2] == ["no answer in 0.1 s"] * 2


def test_error_feedback_of_a_lossy_codec_stays_on_the_node() -> None:
    grid = Nodes(1)
    codec = Codec("int8")
    found = GridTransport(grid, codec, layout(), SPEC | {"codec": '{"values": "int8"}'}, poll=0.001)
    found.enrol(1)
    carries = []
    for version in range(2):
        found.send(task(0, version))
        arrival = found.wait()
        assert arrival is not None
        assert arrival.update is not None
        carries.append(
            {k: v.clone() for k, v in grid.contexts[1000].state.array_records["carry"].to_torch_state_dict().items()}
        )
        received = codec.decode_task(codec.encode_task(arrival.task, layout()), layout())
        exact = local().train(received).delta
        for k, v in local().params.items():
            before = carries[0][k] if version else torch.zeros_like(v)
            told = arrival.update.delta[k].view(v.shape) + carries[-1][k]
            torch.testing.assert_close(told, exact[k].view(v.shape) + before, rtol=0, atol=1e-6)


# The device


def test_a_device_with_its_own_data_needs_no_partitioners(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flwr_datasets", "datasets", "torch_pruning", "ray"):
        monkeypatch.setitem(sys.modules, module, None)
    experiment = EXPERIMENT.model_copy(update={"seed": 4})  # not yet in the ClientApp's memory
    with pytest.raises(ImportError, match="partition dirichlet needs flwr-datasets"):
        Local.of(experiment)
    own = Local.of(experiment, own=True)
    assert len(own.samples(0)) == len(own.samples(11)) == len(given().dataset.train)
    grid = Nodes(1)
    grid.contexts[1000].node_config["own"] = "/nowhere"
    found = GridTransport(grid, Codec(), layout(), SPEC | {"experiment": experiment_out(experiment)}, poll=0.001)
    found.enrol(1)
    found.send(task(0))
    arrival = found.wait()
    assert arrival is not None
    assert arrival.update is not None
    assert arrival.update.weight == len(given().dataset.train)


def test_a_client_that_the_experiment_does_not_have_is_refused() -> None:
    grid = Nodes(1)
    grid.join(CLIENTS)
    found = transport(grid)
    found.send(replace(task(0), client=CLIENTS))
    arrival = found.wait()
    assert arrival is not None
    assert arrival.reason == f"no client {CLIENTS}: the experiment's data has {CLIENTS} (data.clients)"


def test_records_come_back_as_they_went() -> None:
    experiment = EXPERIMENT.model_copy(update={"pacing": {"name": "pacing", "deadline": float("inf")}})
    assert experiment_in(experiment_out(experiment)) == experiment
    assert architecture_in(architecture_out(architecture())) == architecture()
    for sent, objects in ((b"\0\1", 2), (bytes(SHORT), 2), (bytes(SHORT + 1), 5)):
        record = pack(sent, {"client": 3, "experiment": "x"})
        data, config = unpack(record)
        assert (data, dict(config)) == (sent, {"client": 3, "experiment": "x"})
        assert len(get_all_nested_objects(record)) == objects, "each costs a request"


# The strategy


def strategy(method: Method, **more: Any) -> PruningStrategy:
    more = {"experiment": EXPERIMENT, "min_clients": CLIENTS, "pacing": sync(CLIENTS)} | more
    return PruningStrategy(method, more.pop("pacing"), **more)


def accuracy(version: int, arrays: ArrayRecord) -> MetricRecord:
    scores = evaluate(dict(arrays.to_torch_state_dict()), given().model, given().dataset.test)
    return MetricRecord({"accuracy": scores["accuracy"]})


def initial() -> ArrayRecord:
    return ArrayRecord(dict(local().params))


def test_it_is_a_flower_strategy_to_the_signature() -> None:
    assert isinstance(strategy(Method()), Strategy)
    for verb in ("start", "configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate", "summary"):
        assert inspect.signature(getattr(PruningStrategy, verb)) == inspect.signature(getattr(Strategy, verb))


def test_sync_fedavg_is_the_simulations(tmp_path: Path) -> None:
    experiment = EXPERIMENT.model_copy(update={"pacing": {"name": "sync", "clients": CLIENTS}})
    simulated = simulate(experiment, tmp_path)
    result = strategy(table.method("fedavg", WORK)).start(Nodes(), initial(), num_rounds=6, evaluate_fn=accuracy)
    told = result.evaluate_metrics_serverapp
    assert list(told) == list(range(7))
    assert told[6]["accuracy"] == pytest.approx(simulated["test_accuracy"], abs=0.01)
    assert float(told[6]["accuracy"]) > float(told[0]["accuracy"]) + 0.2  # type: ignore[arg-type]


def test_a_result_holds_everything() -> None:
    calls: list[int] = []

    def score(version: int, arrays: ArrayRecord) -> MetricRecord | None:
        calls.append(version)
        return None if version == 1 else MetricRecord({"accuracy": 0.5, "per class": [0.1, 0.9]})

    method = table.method({"name": "pr_fl", "every": 2}, WORK)
    s = strategy(method, pacing=buffered(6, 3), evaluate_every=2, codec=Codec("float16"))
    arrays = ArrayRecord(dict(local().params) | {"steps": torch.tensor(7)})
    result = s.start(Nodes(), arrays, num_rounds=4, evaluate_fn=score)
    assert isinstance(result, Result)
    assert calls == [0, 1, 2, 3, 4]
    assert list(result.evaluate_metrics_serverapp) == [0, 2, 3, 4]
    assert list(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert all(m["num-updates"] == 3 and 0 < float(m["loss"]) < 10 for m in result.train_metrics_clientapp.values())  # type: ignore[arg-type]
    assert list(result.evaluate_metrics_clientapp) == [2, 4]
    assert {"num-examples", "loss", "accuracy"} <= set(result.evaluate_metrics_clientapp[4])
    assert list(result.arrays) == list(arrays)
    last = result.arrays.to_torch_state_dict()
    assert int(last.pop("steps")) == 7
    assert s.state is not None
    assert s.state.version == 4
    assert all(torch.equal(v, s.state.params[k]) for k, v in last.items())
    assert not torch.equal(last["fc1.weight"], local().params["fc1.weight"])


def test_scores_of_clients_are_weighed_by_examples_and_nonsense_is_left_out() -> None:
    Nodes()  # a message can be made where there are some
    question = Message(pack(b""), dst_node_id=1000, message_type="evaluate")

    def scores(**values: Any) -> Message:
        return Message(RecordDict({"metrics": MetricRecord(values)}), reply_to=question)

    question.metadata.__dict__["_message_id"] = "q"
    told = strategy(Method()).aggregate_evaluate(
        1,
        [
            scores(**{"num-examples": 1, "accuracy": 0.0}),
            scores(**{"num-examples": 3, "accuracy": 1.0, "more": 1.0}),
            scores(accuracy=9.0),
            scores(**{"num-examples": -3, "accuracy": 9.0}),
            Message(Error(RAISED), reply_to=question),
            Message(RecordDict(), reply_to=question),
        ],
    )
    assert told is not None
    assert dict(told) == {"num-examples": 4, "accuracy": 0.75}
    assert strategy(Method()).aggregate_evaluate(1, []) is None


def test_train_config_sets_the_work() -> None:
    s = strategy(table.method("fedavg", WORK))
    changes = []
    for asked in (None, ConfigRecord({"lr": 1e-6})):
        last = s.start(Nodes(), initial(), 1, train_config=asked).arrays.to_torch_state_dict()
        changes.append(max(float((v - last[k]).abs().max()) for k, v in local().params.items()))
    assert 0 < changes[1] < 1e-4 < changes[0]


@pytest.mark.parametrize(
    ("name", "asked"), [("autoflip", {"lr": 0.01}), ("prunefl", {"lr": 0.01}), ("pr_fl", {"steps": 4})]
)
def test_train_config_does_not_reach_half_of_a_method(name: str, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="train_config: parts of this method go by its work as well; give it `work`"):
        strategy(table.method(name, WORK)).start(Nodes(), initial(), 1, train_config=ConfigRecord(asked))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train_config": ConfigRecord({"rate": 1.0})}, "train_config: no field 'rate'"),
        ({"evaluate_config": ConfigRecord({"lr": 1.0})}, "evaluate_config: there is nothing to set, got lr"),
        ({"initial_arrays": ArrayRecord({"w": torch.zeros(2).double()})}, "float32 is wanted, w is torch.float64"),
    ],
)
def test_what_can_not_be_followed_is_said(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strategy(Method(work=WORK), evaluate_every=1).start(
            **{"grid": Nodes(), "initial_arrays": initial(), "num_rounds": 1} | more
        )


def test_channel_masks_travel_with_the_architecture() -> None:
    method = table.method({"name": "heterofl", "levels": [1.0, 0.25]}, WORK)
    grid = Nodes()
    result = strategy(method, architecture=architecture()).start(grid, initial(), 6, evaluate_fn=accuracy)
    sizes = {
        m.metadata.dst_node_id: len(unpack(m.content)[0]) for m in grid.asked if m.metadata.message_type == "train"
    }
    assert min(sizes.values()) < 0.4 * max(sizes.values())  # small clients get small models
    scores = [float(m["accuracy"]) for m in result.evaluate_metrics_serverapp.values()]  # type: ignore[arg-type]
    assert scores[-1] > scores[0] + 0.1


def test_flower_s_own_loop_comes_to_the_same() -> None:
    ours, theirs = (strategy(table.method("fedavg", WORK)) for _ in range(2))
    want = ours.start(Nodes(), initial(), 3).arrays.to_torch_state_dict()
    result = Strategy.start(theirs, Nodes(), initial(), 3)
    for k, v in result.arrays.to_torch_state_dict().items():
        torch.testing.assert_close(v, want[k], rtol=0, atol=1e-6)
    assert [m["num-updates"] for m in result.train_metrics_clientapp.values()] == [CLIENTS] * 3
    with pytest.raises(ValueError, match="configure_train comes first"):
        strategy(Method()).aggregate_train(1, [])


# Simulation on Flower's engine


class Mortal(Nodes):
    """Nodes on a pool of workers as Flower keeps it: the dead stay, and the last to come back is asked first."""

    def __init__(self, workers: str, killer: int = -1):
        super().__init__(4)
        self.workers, self.killer = list(workers), killer  # "+" lives, "-" is dead

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        batch = [self._waiting.pop(m) for m in message_ids if m in self._waiting]
        taken = [self.workers.pop() for _ in batch[: len(self.workers)]]
        living = [message for message, worker in zip(batch, taken, strict=False) if worker == "+"]
        replies, back = [], ["-"] * taken.count("-")
        for message in batch:
            at = living.index(message) if message in living else -1
            if at >= 0 and unpack(message.content)[1]["client"] != self.killer:
                replies.append(app(message=message, context=self.contexts[message.metadata.dst_node_id]))
                back.append("+")
            elif at >= 0 or "-" in taken or len(batch) > len(taken):
                replies.append(Message(Error(DIED, "ActorDiedError"), reply_to=message))
                back += ["-"] * (at >= 0)
        self.workers += back
        return replies


def grid_workers(grid: Nodes) -> GridWorkers:
    return GridWorkers(grid, layout(), {**SPEC, "threads": 1}, poll=0.001)


def test_workers_on_a_grid_train_as_here_whatever_is_asked_for_first() -> None:
    workers = grid_workers(Nodes(2))
    for job in range(6):
        workers.submit(job, task(job))
    workers.discard(4)
    for job in (3, 0, 5, 1, 2):
        assert same(workers.result(job), local().train(task(job)))


@pytest.mark.parametrize("pool", ["+-", "-+", "+--", "--+", "++-", "-+-"])
def test_dead_workers_that_flower_keeps_are_got_past(pool: str) -> None:
    workers = grid_workers(Mortal(pool))
    for job in range(8):
        workers.submit(job, task(job))
    for job in range(8):
        assert same(workers.result(job), local().train(task(job)))


def test_a_task_that_kills_every_worker_is_given_up() -> None:
    workers = grid_workers(Mortal("++", killer=0))
    for job in range(2):
        workers.submit(job, task(job))
        with pytest.raises(Failed, match=rf"^{DEATHS} workers died of this task$"):
            workers.result(job)


def test_errors_on_a_node_are_the_reasons_of_a_serial_run() -> None:
    workers = grid_workers(Nodes(2))
    workers.submit(0, task(0, lr=1e6, weight_decay=1e12))
    with pytest.raises(Failed) as there:
        workers.result(0)
    with pytest.raises(ValueError, match="became") as here:
        local().train(task(0, lr=1e6, weight_decay=1e12))
    assert str(there.value) == str(here.value)


def test_a_simulation_on_nodes_is_the_serial_one(tmp_path: Path) -> None:
    pools = (Place(), nodes(Nodes(3), EXPERIMENT))
    want, got = (simulate(EXPERIMENT, tmp_path / str(i), pool=pool) for i, pool in enumerate(pools))
    assert [got[k] for k in ("model_sha256", "events_sha256")] == [want[k] for k in ("model_sha256", "events_sha256")]


# Real Flower


def fatal(mark: str) -> models.Model:
    """A model whose first maker in a worker process dies of it, once."""

    def make(shape: models.Shape, classes: int) -> torch.nn.Module:
        import ray

        if ray.is_initialized() and ray.get_runtime_context().get_actor_id() and not Path(mark).exists():
            Path(mark).touch()
            os._exit(1)
        return models.mlp((16,))(shape, classes)

    return make


def started_by(home: Path) -> list[int]:
    """All processes that got this Flower home from us."""
    mark, found = f"FLWR_HOME={home}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with a Flower home and a port of its own; whatever was started in it is stopped."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc to stop what it starts")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "tests"),
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    try:
        yield env
    finally:
        for sign in [signal.SIGTERM] * 10 + [signal.SIGKILL] * 10:
            for process in started_by(tmp_path / "home"):
                try:
                    os.kill(process, sign)
                except ProcessLookupError:
                    continue
            if not started_by(tmp_path / "home"):
                break
            time.sleep(0.3)
        assert not started_by(tmp_path / "home")


RUNS = {
    "fedavg": [],
    "pr_fl": ["method={name: pr_fl, every: 2, patience: 1}", "pacing.goal=2"],
}


@pytest.mark.slow
def test_flwr_run_is_prfl_run_to_the_bit(flower: dict[str, str], tmp_path: Path) -> None:
    """Both at once on one SuperLink; under fedavg one of Flower's workers dies on the way."""
    path, mark = tmp_path / "an experiment.yaml", tmp_path / "died"
    path.write_text(yaml.safe_dump(FIELDS))
    for name, overrides in RUNS.items():
        model = [f"model={{name: test_flower:fatal, mark: {mark}}}"] if name == "fedavg" else []
        asked = {
            "experiment": path,
            "out": tmp_path / name,
            "overrides": " ".join(f'"{o}"' for o in overrides + model),
        }
        given = " ".join(f"{k}='{v}'" for k, v in asked.items())
        workers = 1 if name == "pr_fl" else 2
        size = f"num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus={workers}"
        call = ["flwr", "run", ".", "--run-config", given, "--federation-config", size]
        told = subprocess.run(call, cwd=ROOT, env=flower, capture_output=True, text=True, timeout=120, check=False)
        assert told.returncode == 0, told.stdout + told.stderr
    until = time.monotonic() + 480
    waiting = set(RUNS)
    while waiting and time.monotonic() < until:
        time.sleep(0.5)
        waiting = {name for name in waiting if not (tmp_path / name / "summary.json").exists()}
    assert not waiting, (tmp_path / "home/local-superlink/superlink.log").read_text()
    assert mark.exists()
    for name, overrides in RUNS.items():
        want = simulate(config.load(path, overrides), tmp_path / "serial" / name)
        got = json.loads((tmp_path / name / "summary.json").read_text())
        for key in ("model_sha256", "events_sha256", "test_accuracy", "bytes_down"):
            assert got[key] == want[key], (name, key)


SCRIPT = """
    import json, sys
    from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from clients.app import app
    from prfl.evaluate import evaluate
    from prfl import groups, models, problem
    from prfl.records import experiment_in
    from prfl.types import Work
    from strategies.flower import PruningStrategy
    from strategies.pacing import buffered
    from strategies.pr_fl import pr_fl

    experiment = experiment_in(sys.argv[1])
    given = problem.build(experiment)
    server = ServerApp()

    def score(version: int, arrays: ArrayRecord) -> MetricRecord:
        scores = evaluate(dict(arrays.to_torch_state_dict()), given.model, given.dataset.test)
        return MetricRecord({"accuracy": scores["accuracy"]})

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = PruningStrategy(
            pr_fl(every=1, unit="channels", work=Work(steps=5, batch=10)),
            buffered(in_flight=4, goal=3),
            experiment=experiment,
            architecture=groups.architecture(given.model, given.example),
            min_clients=6,
            evaluate_every=3,
        )
        result = strategy.start(
            grid,
            ArrayRecord(models.values(given.model)),
            num_rounds=3,
            train_config=ConfigRecord({"lr": 0.2}),
            evaluate_fn=score,
        )
        told = result.evaluate_metrics_serverapp, result.train_metrics_clientapp, result.evaluate_metrics_clientapp
        print("RESULT", json.dumps([{k: dict(v) for k, v in metrics.items()} for metrics in told]))

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, app, num_supernodes=6, backend_config=resources)
"""


@pytest.mark.slow
def test_a_server_app_of_one_s_own(flower: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(textwrap.dedent(SCRIPT))
    call = [sys.executable, str(tmp_path / "server.py"), experiment_out(EXPERIMENT)]
    env = flower | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in told.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, told.stdout + told.stderr
    server, trained, clients = json.loads(lines[0].removeprefix("RESULT"))
    assert list(server) == ["0", "1", "2", "3"]
    assert list(trained) == ["1", "2", "3"]
    assert list(clients) == ["3"]
    assert clients["3"]["num-examples"] > 0


# Who imports whom

DOORS = {"strategies/flower.py", "strategies/grid.py", "clients/app.py", "prfl/records.py", "sim/app.py"}
PUBLIC = {"flwr.app", "flwr.serverapp", "flwr.clientapp"}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def test_flower_stays_at_the_doors_and_its_insides_stay_in_flower() -> None:
    inside = set()
    for folder in ("prfl", "strategies", "clients", "sim", "deploy"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            of_flower = {m for m in imported(path) if m.partition(".")[0] == "flwr"}
            assert not of_flower or name in DOORS or folder == "deploy", name
            if {".".join(m.split(".")[:2]) for m in of_flower} - PUBLIC:
                inside.add(name)
    assert len(inside) <= 1, inside
    assert all(name.startswith("deploy/") for name in inside), inside


def test_contracts_between_packages_hold() -> None:
    lint = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if lint is None:
        pytest.skip("import-linter is not installed")
    told = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 0, told.stdout
