"""The gate in front of a real SuperLink: nodes live their whole life through it, and nothing else passes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import homes
import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.superlink.routers.fleet.router import router
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from deploy import credentials, gate, status
from deploy.connections import Connections
from deploy.home import Home
from deploy.upstream import Upstream

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Served:
    home: Home
    port: int

    @property
    def superlink(self) -> int:
        return int(self.home.read()["superlink"].partition(":")[2])

    def client(self, name: str) -> FleetHttpClient:
        """Flower's own client for the Fleet API, with the key of this node."""
        key = load_ssh_private_key(self.home.key(name).read_bytes(), None)
        signed = [NodeAuthHttpInterceptor(key, key.public_key())]  # type: ignore[arg-type]
        return FleetHttpClient.from_server_address(f"127.0.0.1:{self.port}", False, self.home.ca.read_bytes(), signed)

    def pem(self, name: str) -> bytes:
        return credentials.public_key(self.home.key(f"{name}").with_suffix(".pub"))

    def status(self, name: str) -> str:
        return {n.name: n.status for n in status.nodes(self.home)}[name]

    def asked(self, method: str, path: str, port: int, headers: bytes = b"") -> bytes:
        """The first line of what is answered on a raw request, over TLS."""
        with socket.create_connection(("127.0.0.1", port), 20) as plain:
            tls = ssl.create_default_context(cafile=self.home.ca)
            with tls.wrap_socket(plain, server_hostname="localhost") as s:
                s.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode() + headers + b"\r\n")
                return s.recv(4096).split(b"\r\n")[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home, port = homes.home(tmp_path_factory.mktemp("gate"), "stock", "ours"), homes.port()
    credentials.make_key(home, "stranger")
    with homes.server(home, port):
        yield Served(home, port)


def test_flower_s_own_node_comes_and_goes(served: Served) -> None:
    arguments = homes.node(served.home, served.port, "stock", "--profile", "pi4", "--memory", "100")
    out = served.home.folder / "node.out"
    with homes.started(*arguments, out=out) as process:
        homes.until(lambda: "SuperNode ID" in out.read_text() or process.poll() is not None)
        assert process.poll() is None, out.read_text()
        assert served.status("stock") == "online"
        process.send_signal(signal.SIGTERM)
        process.wait(homes.PATIENCE)
    assert served.status("stock") == "offline"


def test_every_step_of_a_node_s_life_passes(served: Served) -> None:
    with served.client("ours") as client:
        node = client.ActivateNode(ActivateNodeRequest(public_key=served.pem("ours"), heartbeat_interval=30)).node_id
        assert served.status("ours") == "online"
        before = time.time()
        assert client.SendNodeHeartbeat(
            SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30)
        ).success
        (seen,) = (n.seen for n in status.nodes(served.home) if n.id == node)
        assert seen is not None
        assert before - 1 < seen < time.time() + 1
        assert not client.PullMessages(PullMessagesRequest(node=Node(node_id=node))).messages_list
        client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    assert served.status("ours") == "offline"


def test_an_unknown_key_is_refused_and_cannot_register_itself(served: Served) -> None:
    key = served.pem("stranger")
    with served.client("stranger") as client:
        with pytest.raises(httpx.HTTPStatusError):
            client.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30))
        with pytest.raises(httpx.HTTPStatusError):
            client.RegisterNode(RegisterNodeFleetRequest(public_key=key))
        with pytest.raises(httpx.HTTPStatusError, match="401"):  # with its own signature and another's name
            client.ActivateNode(ActivateNodeRequest(public_key=served.pem("ours"), heartbeat_interval=30))


def test_the_gate_knows_all_of_the_fleet_api_and_nothing_else() -> None:
    fleet = {(method, route.path) for route in router.routes for method in route.methods}  # type: ignore[attr-defined]
    assert fleet | {("GET", "/health")} == gate.PASSED


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/list-nodes"),
        ("POST", "/v1/control/register-node"),
        ("POST", "/v1/runtime/acquire-task"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/v1/fleet/../control/list-nodes"),
        ("POST", "/v1/fleet/%2e%2e/control/list-nodes"),
        ("POST", "//v1/control/list-nodes"),
        ("POST", "/v1/fleet/get-run/"),
        ("POST", "/v1/fleet/get-run%0d%0aX: y"),
        ("GET", "/v1/fleet/get-run"),
        ("POST", "/health"),
        ("CONNECT", "127.0.0.1:22"),
    ],
)
def test_other_paths_are_not_there(served: Served, method: str, path: str) -> None:
    assert served.asked(method, path, served.port).split()[1] in (b"404", b"400")


def test_the_control_api_is_there_on_loopback_alone(served: Served) -> None:
    assert b"200" in served.asked("GET", "/health", served.port)
    assert b"404" not in served.asked("POST", "/v1/control/list-nodes", served.superlink)
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, _, state = line.split()[1:4]
            if state == "0A" and int(address.rpartition(":")[2], 16) == served.superlink:
                listening.append(address.rpartition(":")[0])
    assert listening == ["0100007F"]


def test_who_speaks_no_tls_is_not_answered(served: Served) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{served.port}/health", trust_env=False)


def test_what_is_too_large_is_refused_before_it_is_read(served: Served) -> None:
    length = f"Content-Length: {gate.BODY + 1}\r\n".encode()
    assert b"413" in served.asked("POST", "/v1/fleet/push-object", served.port, length)
    for many in (b"X: " + b"y" * 2 * gate.HEADERS + b"\r\n", b"X: y\r\n" * gate.HEADERS):
        with suppress(ConnectionError, ssl.SSLError):  # it may hang up while we speak
            assert served.asked("GET", "/health", served.port, many).split()[1] in (b"400", b"431")
    assert b"200" in served.asked("GET", "/health", served.port)


async def through(
    upstream: httpx.AsyncBaseTransport | None, body: int, content: Any, base: str = "http://x"
) -> httpx.Response:
    """A request through a gate in this process. `body`: its limit."""
    async with httpx.AsyncClient(transport=upstream, base_url=base) as behind:
        front = httpx.AsyncClient(transport=httpx.ASGITransport(gate.gate(behind, body)), base_url="http://x")
        headers = {"flwr-public-key": "k", "x-other": "o"}
        return await front.post("/v1/fleet/push-object?x=y", content=content, headers=headers)


async def parts(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 60_000):
        yield data[start : start + 60_000]


async def echo(scope: MutableMapping[str, Any], receive: gate.Receive, send: gate.Send) -> None:
    """Headers, the query and the body, back again."""
    data, more = b"", True
    while more:
        message = await receive()
        data, more = data + message.get("body", b""), message.get("more_body", False)
    kept = [(k, v) for k, v in scope["headers"] if k in (b"flwr-public-key", b"x-other")]
    told = [(b"flwr-query", scope["query_string"]), *((b"flwr-had-" + k, v) for k, v in kept), (b"set-cookie", b"a=b")]
    await send({"type": "http.response.start", "status": 200, "headers": told})
    await send({"type": "http.response.body", "body": data})


def test_bodies_pass_unchanged_and_only_known_headers_pass() -> None:
    data = os.urandom(5_000_000)
    for content in (data, parts(data)):
        answer = asyncio.run(through(httpx.ASGITransport(echo), len(data), content))
        assert hashlib.sha256(answer.content).digest() == hashlib.sha256(data).digest()
        assert answer.headers["flwr-had-flwr-public-key"] == "k"
        assert answer.headers["flwr-query"] == ""
        assert not {"flwr-had-x-other", "set-cookie"} & set(answer.headers)


def test_a_stream_is_cut_where_it_grows_too_large() -> None:
    assert asyncio.run(through(httpx.ASGITransport(echo), 200_000, parts(bytes(200_000)))).status_code == 200
    assert asyncio.run(through(httpx.ASGITransport(echo), 199_999, parts(bytes(200_000)))).status_code == 413


def test_a_superlink_that_is_away_is_a_503() -> None:
    for content in (b"x", parts(bytes(200_000))):
        away = Upstream("127.0.0.1", homes.port(), None, 5.0)
        assert asyncio.run(through(away, 1_000_000, content)).status_code == 503


def test_connections_to_the_superlink_are_used_again_and_large_bodies_pass() -> None:
    data = os.urandom(5_000_000)

    async def twice() -> list[bytes]:
        server = uvicorn.Server(uvicorn.Config(echo, port=homes.port(), log_level="critical"))
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        upstream = Upstream("127.0.0.1", server.config.port, None, 5.0)
        told = []
        async with httpx.AsyncClient(transport=upstream, base_url="http://x") as client:
            for content in (data, parts(data)):
                told.append((await client.post("/", content=content)).content)
                assert len(upstream.idle) == 1
        server.should_exit = True
        await serving
        return told

    assert asyncio.run(twice()) == [data, data]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", httpx.ReadError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", httpx.ReadError),
        (b"no HTTP\r\n\r\n", httpx.ReadError),
        (None, httpx.ReadTimeout),
    ],
)
def test_an_answer_that_breaks_off_is_none(said: bytes | None, error: type[Exception]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if said is not None:
            writer.write(said)
            writer.close()

    async def ask() -> None:
        port = homes.port()
        async with await asyncio.start_server(answer, "127.0.0.1", port):
            upstream = Upstream("127.0.0.1", port, None, 0.2)
            async with httpx.AsyncClient(transport=upstream, base_url="http://x") as client:
                await client.post("/")

    with pytest.raises(error):
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", httpx.ReadError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", httpx.RemoteProtocolError),
        (b"no HTTP\r\n\r\n", httpx.RemoteProtocolError),
        (None, httpx.ReadTimeout),
    ],
)
def test_nor_is_one_for_a_node(said: bytes | None, error: type[Exception]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as ear:

        def answer() -> None:
            with ear.accept()[0] as one:
                one.recv(4096)
                one.sendall(said or b"")
                time.sleep(0 if said is not None else 0.5)

        threading.Thread(target=answer, daemon=True).start()
        with httpx.Client(transport=Connections(None, 1.0), timeout=0.2) as client, pytest.raises(error):
            client.post(f"http://127.0.0.1:{ear.getsockname()[1]}/")
    with httpx.Client(transport=Connections(None, 1.0)) as client, pytest.raises(httpx.ConnectError):
        client.post(f"http://127.0.0.1:{homes.port()}/")


def test_a_node_hears_what_is_said_before_all_of_its_body_was_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ear:

        def refuse() -> None:
            with ear.accept()[0] as one:
                one.recv(4096)
                one.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        with httpx.Client(transport=Connections(None, 1.0), timeout=5) as client:
            assert client.post(f"http://127.0.0.1:{ear.getsockname()[1]}/", content=bytes(1 << 24)).status_code == 413
