"""The warm node: what it takes from inside Flower, and its life: admitted, at work, cut off, sent away."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flwr.app import Message
from flwr.proto import control_pb2, fleet_pb2, heartbeat_pb2, message_pb2, runtime_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable import inflatable_object, inflatable_utils
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from homes import home, port, server, started, until

from clients.local import Local
from deploy import credentials, internals, node, processes, status
from deploy.home import Home
from prfl import problem
from prfl.config import Experiment
from prfl.masks import DENSE
from prfl.types import Task, Work

EXPERIMENT = {
    "data": {"set": "digits", "clients": 3, "partition": "iid"},
    "model": {"name": "mlp", "hidden": [16]},
}
STEPS = (5, 2000, 10**9)  # of the tasks: short, long enough to lose the SuperLink meanwhile, without an end


# What we take from inside Flower

CALLED: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "from_server_address": (
        ProtobufClient.from_server_address, ("server_address", "insecure", "root_certificates", "interceptors"),
    ),
    "NodeAuthHttpInterceptor": (NodeAuthHttpInterceptor, ("private_key", "public_key")),
    "RuntimeVersionHttpInterceptor": (RuntimeVersionHttpInterceptor, ("component_name",)),
    "inflate": (inflatable_utils.inflate_object_from_contents, ("object_id", "object_contents")),
    "nested": (inflatable_object.get_all_nested_objects, ("obj",)),
    "tree": (inflatable_object.get_object_tree, ("obj",)),
    "iterate": (inflatable_object.iterate_object_tree, ("tree",)),
}  # fmt: skip
ASKED: dict[type[Any], dict[str, tuple[type[Any], set[str]]]] = {
    FleetHttpClient: {
        "RegisterNode": (fleet_pb2.RegisterNodeFleetRequest, {"public_key"}),
        "ActivateNode": (fleet_pb2.ActivateNodeRequest, {"public_key", "heartbeat_interval"}),
        "DeactivateNode": (fleet_pb2.DeactivateNodeRequest, {"node_id"}),
        "UnregisterNode": (fleet_pb2.UnregisterNodeFleetRequest, {"node_id"}),
        "SendNodeHeartbeat": (heartbeat_pb2.SendNodeHeartbeatRequest, {"node", "heartbeat_interval"}),
        "PullMessages": (fleet_pb2.PullMessagesRequest, {"node"}),
        "PushMessages": (
            fleet_pb2.PushMessagesRequest, {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
        ),
        "PullObject": (message_pb2.PullObjectRequest, {"node", "run_id", "object_id"}),
        "PushObject": (
            message_pb2.PushObjectRequest, {"node", "run_id", "object_id", "object_content", "session_id"},
        ),
        "ConfirmMessageReceived": (
            message_pb2.ConfirmMessageReceivedRequest, {"node", "run_id", "message_object_id"},
        ),
    },
    RuntimeHttpClient: {
        "PullMessages": (runtime_pb2.PullAppMessagesRequest, {"message_ids"}),
        "PullObject": (message_pb2.PullObjectRequest, {"node", "run_id", "object_id"}),
        "ConfirmMessageReceived": (
            message_pb2.ConfirmMessageReceivedRequest, {"node", "run_id", "message_object_id"},
        ),
    },
    ControlHttpClient: {
        "ListNodes": (control_pb2.ListNodesRequest, set()),
        "RegisterNode": (control_pb2.RegisterNodeRequest, {"public_key", "name"}),
        "UnregisterNode": (control_pb2.UnregisterNodeRequest, {"node_id"}),
        "ListRuns": (control_pb2.ListRunsRequest, {"run_id"}),
        "StopRun": (control_pb2.StopRunRequest, {"run_id"}),
    },
}  # fmt: skip
ANSWERED: dict[type[Any], set[str]] = {
    fleet_pb2.ActivateNodeResponse: {"node_id"},
    fleet_pb2.PullMessagesResponse: {"messages_list", "message_object_trees"},
    fleet_pb2.PushMessagesResponse: {"objects_to_push", "session_id"},
    heartbeat_pb2.SendNodeHeartbeatResponse: {"success"},
    message_pb2.PullObjectResponse: {"object_found", "object_available", "object_content"},
    message_pb2.PushObjectResponse: {"stored"},
    runtime_pb2.PullAppMessagesResponse: {"messages_list", "message_object_trees"},
    control_pb2.ListNodesResponse: {"nodes_info"},
    Node: {"node_id"},
}


def test_flower_s_functions_take_what_we_give_them() -> None:
    for name, (function, wanted) in CALLED.items():
        have = inspect.signature(function).parameters
        assert set(wanted) <= set(have), f"deploy/internals.py calls {name} otherwise: this Flower has {list(have)}"
        more = [p.name for p in have.values() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD,)]
        assert set(more) <= set(wanted), f"{name} of this Flower needs {set(more) - set(wanted)} too"


def test_flower_s_messages_have_the_fields_that_we_use() -> None:
    for client, calls in ASKED.items():
        for name, (request, wanted) in calls.items():
            assert hasattr(client, name), f"{client.__name__} of this Flower has no {name}"
            hint = inspect.signature(getattr(client, name)).parameters["request"].annotation
            assert request.__name__ in str(hint), f"{client.__name__}.{name} of this Flower takes {hint}"
            missing = wanted - set(request.DESCRIPTOR.fields_by_name)
            assert not missing, f"{request.__name__} of this Flower lacks {missing}"
    for answer, wanted in ANSWERED.items():
        missing = wanted - set(answer.DESCRIPTOR.fields_by_name)
        assert not missing, f"{answer.__name__} of this Flower lacks {missing}"


def test_flower_s_grid_and_identity_are_as_we_reach_into_them() -> None:
    grid = HttpGrid("127.0.0.1:1", insecure=True, token="t")
    assert {"node", "_runtime_client", "_insecure", "_cert"} <= set(dir(grid))
    with FleetHttpClient("http://127.0.0.1:1") as client:
        assert isinstance(client._client, httpx.Client)
    internals.act_as(node=7, run=8)
    assert (TaskIdentity.node_id, TaskIdentity.run_id) == (7, 8)


@pytest.mark.parametrize(("kept", "connections"), [(60.0, 1), (0.01, 3)])
def test_a_connection_is_kept_from_one_task_to_the_next(
    monkeypatch: pytest.MonkeyPatch, kept: float, connections: int
) -> None:
    came = []

    class Superlink(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            came.append(self.client_address)
            super().setup()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answer = heartbeat_pb2.SendNodeHeartbeatResponse(success=True).SerializeToString()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    monkeypatch.setattr(internals, "KEPT", kept)
    with ThreadingHTTPServer(("127.0.0.1", 0), Superlink) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with internals.fleet(f"127.0.0.1:{server.server_port}", None, None) as fleet:
            for _ in range(3):
                fleet.heartbeat(7)
                time.sleep(0.05)
        server.shutdown()
    assert len(came) == connections


def test_a_message_comes_through_in_pieces() -> None:
    from flwr.app import RecordDict

    from prfl.records import pack, unpack

    internals.act_as(node=7, run=8)
    data = os.urandom(internals.PIECE + 1)
    sent = Message(pack(data, {"client": 3}), dst_node_id=9, message_type="train", group_id="4")
    parcel = internals.Parcel.of(sent)
    assert len(parcel.contents) == 7, "message, its records, array, and two pieces"
    contents = {k: make() for k, make in parcel.contents.items()}
    bare = Message(RecordDict(), dst_node_id=9, message_type="train", group_id="4")
    bare.metadata.__dict__["_message_id"] = parcel.message.metadata.message_id
    notice = internals.Notice(bare, tuple(contents))
    damaged = {k: v[:-1] for k, v in contents.items()}
    got = notice.whole(contents)
    assert unpack(got.content)[0] == data
    assert got.metadata.message_id == sent.metadata.message_id
    assert (got.metadata.group_id, got.metadata.run_id) == ("4", 8)
    with pytest.raises(ValueError, match="the message is damaged"):
        notice.whole({})
    with pytest.raises(ValueError, match="the message is damaged"):
        notice.whole(damaged)


# What can not be


def test_an_insecure_node_has_no_key(tmp_path: Path) -> None:
    for root, key in ((None, tmp_path), (tmp_path, None)):
        with pytest.raises(ValueError, match="go together, or neither"):
            node.serve("127.0.0.1:1", {}, root_certificates=root, key=key)


def test_another_flower_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("deploy.internals", raising=False)
    monkeypatch.setitem(sys.modules, "deploy.internals", None)
    with pytest.raises(ValueError, match=r"^this Flower is not 1\.41 .*--stock$"):
        node.serve("127.0.0.1:1", {}, root_certificates=None, key=None)


def test_a_key_is_of_the_right_kind(tmp_path: Path) -> None:
    (tmp_path / "k").write_text("nothing")
    for file in ("k", "absent"):
        with pytest.raises(ValueError, match="is not an EC private key in OpenSSH format"):
            internals.load_key(tmp_path / file)


# A node and its server, for real

SERVER = """
import json
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from deploy.replies import Prompt
from prfl import groups, models, problem
from prfl.codec import Codec, Layout
from prfl.config import Experiment
from prfl.records import architecture_out, experiment_out
from prfl.masks import DENSE
from prfl.types import Task, Work
from strategies.grid import GridTransport

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    experiment = Experiment.model_validate(json.loads(str(context.run_config["experiment"])))
    out = Path(str(context.run_config["out"]))
    given = problem.build(experiment)
    params, architecture = models.values(given.model), groups.architecture(given.model, given.example)
    layout = Layout.of(params, architecture.groups)
    beside = {"experiment": experiment_out(experiment), "codec": "{}", "threads": 1}
    beside["architecture"] = architecture_out(architecture)
    transport = GridTransport(Prompt(grid), Codec(), layout, beside, timeout=100.0)
    while 0 not in transport.idle():
        transport.enrol(1)
    for version, steps in enumerate(json.loads(str(context.run_config["steps"]))):
        transport.send(Task(0, version, params, DENSE, Work(steps=steps, batch=10, lr=0.1), seed=version))
        arrival = transport.wait()
        while arrival is None:
            arrival = transport.wait()
        update = arrival.update
        told = {"reason": arrival.reason, "delta": update and dict(update.delta), "up": arrival.bytes_up}
        torch.save(told, out / "part")
        (out / "part").rename(out / f"{version}.pt")
"""
PROJECT = """
[project]
name = "probe"
version = "0.1.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "prfl"
[tool.flwr.app.components]
serverapp = "probe:app"
clientapp = "clients.app:app"
[tool.flwr.app.config]
experiment = ""
steps = ""
out = ""
"""


def submit(at: Home, folder: Path) -> Path:
    """A run of the ServerApp above; where its results come to lie."""
    app, out = folder / "app", folder / "out"
    for made in (app, out):
        made.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "probe.py").write_text(textwrap.dedent(SERVER))
    chosen = {"experiment": json.dumps(EXPERIMENT), "steps": json.dumps(STEPS), "out": str(out)}
    (folder / "run.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in chosen.items()))
    processes.flwr(at, "run", str(app), processes.CONNECTION, "--run-config", str(folder / "run.toml"))
    return out


def calls(at: Home, to: int, key: str, client: int) -> tuple[str, ...]:
    more = ("--key", key, "--client", str(client))
    return ("deploy", "node", "--home", str(at.folder), "--server", f"127.0.0.1:{to}", *more)


def said(log: Path) -> str:
    return log.read_text()


def killed_and_back(at: Home) -> None:
    before = at.read()["pids"]["superlink"]
    os.kill(before, signal.SIGKILL)
    until(lambda: at.read()["pids"].get("superlink", before) != before)


def online(at: Home) -> set[str]:
    return {n.name for n in status.nodes(at) if n.status == "online"}


def here(version: int) -> dict[str, torch.Tensor]:
    """The same task's update, trained here."""
    local = Local(problem.build(Experiment.model_validate(EXPERIMENT)))
    work = Work(steps=STEPS[version], batch=10, lr=0.1)
    return dict(local.train(Task(0, version, local.params, DENSE, work, seed=version)).delta)


@pytest.mark.slow
def test_the_life_of_a_node(tmp_path: Path) -> None:
    at, gate, logs = home(tmp_path / "home", "works", "dies"), port(), tmp_path
    with (
        started(*calls(at, gate, "works", 0), out=logs / "works") as works,
        started(*calls(at, gate, "dies", 1), out=logs / "dies") as dies,
        server(at, gate),  # nodes that are there before it wait for it
    ):
        nobody_else_comes_in(at, gate, tmp_path / "another")
        until(lambda: "connected to" in said(logs / "works") and "connected to" in said(logs / "dies"))
        assert online(at) == {"works", "dies"}
        dies.kill()
        dies.wait()
        with started(*calls(at, gate, "dies", 1), out=logs / "again"):
            # tasks come back trained as here, also when the SuperLink dies while one is under way
            out = submit(at, tmp_path)
            wanted = [here(version) for version in range(2)]
            until(lambda: "train of version 1" in said(logs / "works"))
            killed_and_back(at)
            until((out / "1.pt").exists)
            for version, want in enumerate(wanted):
                told = torch.load(out / f"{version}.pt")
                assert told["reason"] == ""
                assert told["delta"].keys() == want.keys()
                assert all(torch.equal(told["delta"][k], v) for k, v in want.items()), version
            since = said(logs / "works").partition("train of version 1")[2]
            assert "does not answer" in since
            assert "answers again after" in since

            # told to go, it goes at once; the server knows, and so does the run
            until(lambda: "train of version 2" in said(logs / "works"))
            works.terminate()
            assert works.wait(10) == 0
            assert "works" not in online(at)
            until((out / "2.pt").exists)
            told = torch.load(out / "2.pt")
            assert told["delta"] is None
            assert "unavailable" in told["reason"].lower()

            # a killed node's successor waits until the server has forgotten it
            until(lambda: "connected to" in said(logs / "again"))
            assert online(at) == {"dies"}
            assert "not yet forgotten" in said(logs / "again")


def test_a_wrong_clock_is_told_from_a_wrong_key() -> None:
    date, then = "Mon, 30 Nov 2026 12:00:00 GMT", 1796040000.0
    for ahead in (-internals.LATE + 1, 0, internals.EARLY - 1):
        assert internals._skewed(date, then + ahead) == ""
    assert internals._skewed(date, then + 12).startswith("the clock of this device is 12 s ahead of the server's")
    assert internals._skewed(date, then - 400).startswith("the clock of this device is 400 s behind the server's")
    assert internals._skewed("", then) == internals._skewed("soon", then) == ""


def nobody_else_comes_in(at: Home, gate: int, elsewhere: Path) -> None:
    """Not an unknown key, not without TLS or key, and no node takes another server for ours."""
    address, root = f"127.0.0.1:{gate}", at.ca.read_bytes()
    credentials.make_key(at, "stranger")
    stranger, known = (internals.load_key(at.key(name)) for name in ("stranger", "works"))
    other = Home.of(elsewhere)
    credentials.certify(other, ["127.0.0.1"])
    for certificates, key, error, why in (
        (root, stranger, PermissionError, "Failed to activate SuperNode"),
        (root, None, PermissionError, "SuperNode authentication is enabled"),
        (None, None, ConnectionError, None),
        (None, known, ConnectionError, None),
        (other.ca.read_bytes(), known, internals.Misplaced, "not the server of our CA.*CERTIFICATE_VERIFY_FAILED"),
    ):
        with internals.fleet(address, certificates, key) as fleet, pytest.raises(error, match=why):
            fleet.activate()
