"""All that we take from inside Flower 1.41."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message
from flwr.app.message import array, make_message, remove_content_from_message
from flwr.common.constant import HEARTBEAT_PATIENCE, SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from deploy.connections import Connections
from prfl.records import RAISED

if TYPE_CHECKING:
    from flwr.serverapp import Grid
    from flwr.superlink.grid.http_grid import HttpGrid

HEARTBEAT = 15.0  # seconds; a node is gone after twice as long without one. Flower's own nodes say 30
PIECE = 16 << 20  # bytes of a piece that an array is cut into: each costs a request. Flower's own are 5 MB
BRIEF = 2.0  # seconds that a ServerApp keeps one: the SuperLink closes it after 5
LATE, EARLY = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE  # seconds a signature may be off
KEPT = 25.0  # seconds that a silent connection is kept for the next task; the gate keeps it longer

array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE = PIECE  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Registered:
    """A node as the SuperLink knows it. `key`: public, PEM. `seen`: the latest heartbeat, seconds since 1970."""

    id: int
    key: bytes
    status: str
    seen: float | None


@dataclass(frozen=True)
class Registry:
    """The SuperLink's nodes and runs. Raises ConnectionError when it is away, ValueError when it refuses."""

    client: ControlHttpClient

    def nodes(self) -> list[Registered]:
        """Expelled nodes too, with status `unregistered`."""
        with _plainly():
            found = self.client.ListNodes(ListNodesRequest()).nodes_info
        return [
            Registered(
                n.node_id,
                n.public_key,
                n.status,
                n.online_until - HEARTBEAT_PATIENCE * n.heartbeat_interval if n.last_activated_at else None,
            )
            for n in found
        ]

    def register(self, key: bytes, name: str) -> int:
        with _plainly():
            return self.client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id

    def unregister(self, node: int) -> None:
        with _plainly():
            self.client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def run(self, number: int) -> tuple[str, str]:
        """A run's status (pending, starting, running, finished), and for a finished one how it ended."""
        with _plainly():
            found = self.client.ListRuns(ListRunsRequest(run_id=number)).run_dict[number].status
        return found.status, " ".join(f"{found.sub_status} {found.details}".split())

    def stop(self, number: int) -> None:
        with _plainly():
            self.client.StopRun(StopRunRequest(run_id=number))


@contextmanager
def registry(address: str, root_certificates: bytes | None) -> Iterator[Registry]:
    """`address`: of the SuperLink, host:port. Without root certificates the connection is not encrypted."""
    insecure = root_certificates is None
    with ControlHttpClient.from_server_address(address, insecure, root_certificates, []) as client:
        yield Registry(client)


@contextmanager
def _plainly() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        told = FlowerError.from_json(error.response.text)
        raise ValueError(f"the SuperLink refused: {told.message if told else error.response.status_code}") from None
    except httpx.HTTPError as error:
        raise ConnectionError(f"the SuperLink does not answer: {error}") from None


class Misplaced(PermissionError):
    """Something is wrong with this device, not with its key: its clock, its CA, whom it calls."""


class Over(Exception):
    """The run of this message takes nothing any more."""


@dataclass(frozen=True)
class Notice:
    """A message that lies there for us: what it says of itself, and the ids of the objects that it is made of."""

    message: Message
    objects: tuple[str, ...]

    @property
    def run(self) -> int:
        return self.message.metadata.run_id

    def whole(self, contents: dict[str, bytes]) -> Message:
        """The message, put together from its objects; takes them out of `contents`. Raises ValueError."""
        try:
            found = inflate_object_from_contents(self.message.metadata.message_id, contents)
        except Exception as error:
            raise ValueError(f"the message is damaged: {error}") from None
        told = self.message.metadata  # that the SuperLink has checked; what is in the objects it has not
        if not isinstance(found, Message) or (found.metadata.run_id, found.metadata.reply_to_message_id) != (
            told.run_id,
            told.reply_to_message_id,
        ):
            raise ValueError("the message is damaged: it is not the one that was announced")
        found.metadata.__dict__["_message_id"] = self.message.metadata.message_id
        return found


@dataclass(frozen=True)
class Parcel:
    """A reply taken apart. `contents`: of every object by id, made when it is asked for, so that memory stays low."""

    message: Message
    tree: ObjectTree
    contents: dict[str, Callable[[], bytes]]

    @staticmethod
    def of(reply: Message) -> Parcel:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            return Parcel(reply, get_object_tree(reply), {k: _content(found) for k, found in objects.items()})


@dataclass(frozen=True)
class Fleet:
    """The Fleet API as a SuperNode sees it, a request a call. `node`: our number, from `activate`.

    Every call raises ConnectionError when the SuperLink is away, PermissionError when it does not know us, Over when
    the run has ended, and ValueError for any other refusal.
    """

    client: FleetHttpClient
    public: bytes
    anonymous: bool

    def activate(self) -> int:
        with _as_a_node():
            if self.anonymous:
                with suppress(ValueError), _as_a_node():  # known already
                    self.client.RegisterNode(RegisterNodeFleetRequest(public_key=self.public))
            request = ActivateNodeRequest(public_key=self.public, heartbeat_interval=HEARTBEAT)
            return self.client.ActivateNode(request).node_id

    def deactivate(self, node: int) -> None:
        with _as_a_node():
            self.client.DeactivateNode(DeactivateNodeRequest(node_id=node))
            if self.anonymous:
                self.client.UnregisterNode(UnregisterNodeFleetRequest(node_id=node))

    def heartbeat(self, node: int) -> None:
        with _as_a_node():
            request = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=HEARTBEAT)
            if not self.client.SendNodeHeartbeat(request).success:
                raise PermissionError("the SuperLink does not know this node any more")

    def look(self, node: int) -> Notice | None:
        """The next message; nobody is told of it again."""
        with _as_a_node():
            found = self.client.PullMessages(PullMessagesRequest(node=Node(node_id=node)))
        if not found.messages_list:
            return None
        ids = dict.fromkeys(tree.object_id for tree in iterate_object_tree(found.message_object_trees[0]))
        return Notice(message_from_proto(found.messages_list[0]), tuple(ids))

    def fetch(self, node: int, run: int, name: str) -> bytes | None:
        """An object; None: it is still on its way to the SuperLink. Raises LookupError when it never comes."""
        with _as_a_node():
            found = self.client.PullObject(PullObjectRequest(node=Node(node_id=node), run_id=run, object_id=name))
        if not found.object_found:
            raise LookupError("its sender went away before all of it had come")
        return found.object_content if found.object_available else None

    def confirm(self, node: int, notice: Notice) -> None:
        """All of it is here: the SuperLink may forget it."""
        name = notice.message.metadata.message_id
        with _as_a_node():
            self.client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=Node(node_id=node), run_id=notice.run, message_object_id=name)
            )

    def announce(self, node: int, parcel: Parcel, seconds: float) -> tuple[str, list[str]]:
        """A reply is to come, after so many seconds of work: the session, and the objects that are wanted.

        Without harm twice. No objects are wanted when the reply is not, or was all there already.
        """
        bare = message_to_proto(remove_content_from_message(parcel.message))
        with _as_a_node():
            found = self.client.PushMessages(
                PushMessagesRequest(
                    node=Node(node_id=node),
                    messages_list=[bare],
                    message_object_trees=[parcel.tree],
                    clientapp_runtime_list=[seconds],
                )
            )
        return found.session_id, list(found.objects_to_push)

    def store(self, node: int, run: int, session: str, name: str, content: bytes) -> None:
        """Raises LookupError when the session is over; announce the reply again then."""
        with _as_a_node():
            request = PushObjectRequest(
                node=Node(node_id=node), run_id=run, session_id=session, object_id=name, object_content=content
            )
            if not self.client.PushObject(request).stored:
                raise LookupError("the session is over")


@dataclass(frozen=True)
class Desk:
    """The Runtime API as a ServerApp sees it, a request a call; when the SuperLink is away, calls wait."""

    grid: HttpGrid

    def announced(self, asked: Iterable[str]) -> list[Notice]:
        """The replies to these messages; nobody is told of them again, and their objects may be still on their way."""
        found = self.grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        return [
            Notice(message_from_proto(m), tuple(dict.fromkeys(t.object_id for t in iterate_object_tree(tree))))
            for m, tree in zip(found.messages_list, found.message_object_trees, strict=True)
        ]

    def fetch(self, notice: Notice, name: str) -> bytes | None:
        """As `Fleet.fetch`."""
        request = PullObjectRequest(node=self.grid.node, run_id=notice.run, object_id=name)
        found = self.grid._runtime_client.PullObject(request)
        if not found.object_found:
            raise LookupError("its sender went away before all of it had come")
        return found.object_content if found.object_available else None

    def confirm(self, notice: Notice) -> None:
        """As `Fleet.confirm`."""
        name = notice.message.metadata.message_id
        self.grid._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.grid.node, run_id=notice.run, message_object_id=name)
        )


def desk(grid: Grid) -> Desk | None:
    """None: this Grid is none of a SuperLink's."""
    from flwr.superlink.grid.http_grid import HttpGrid  # a device has no need of it

    if not isinstance(grid, HttpGrid):
        return None
    if grid._insecure or grid._cert is not None:
        _connect(grid._runtime_client, grid._cert, BRIEF)
    return Desk(grid)


def unread(notice: Notice, why: str) -> Message:
    """An error in the place of a reply that can not be had."""
    return make_message(metadata=notice.message.metadata, error=Error(RAISED, why))


@contextmanager
def fleet(address: str, root_certificates: bytes | None, key: ec.EllipticCurvePrivateKey | None) -> Iterator[Fleet]:
    """`address`: host:port. Without root certificates nothing is encrypted; without a key the node is a new one."""
    private = key or ec.generate_private_key(ec.SECP384R1())
    public = private.public_key()
    signed = (RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(private, public))
    insecure = root_certificates is None
    with FleetHttpClient.from_server_address(address, insecure, root_certificates, signed) as client:
        _connect(client, root_certificates, KEPT)
        yield Fleet(client, public_key_to_bytes(public), key is None)


def _connect(client: ProtobufClient, root_certificates: bytes | None, kept: float) -> None:
    """Give Flower's client connections of ours."""
    context = None
    if root_certificates is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=root_certificates.decode("ascii"))
    client._client.close()
    client._client = httpx.Client(transport=Connections(context, kept), timeout=client._client.timeout)


def load_key(file: Path) -> ec.EllipticCurvePrivateKey:
    """A node's private key, in OpenSSH format. Raises ValueError."""
    try:
        found = load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{file} is not an EC private key in OpenSSH format without a passphrase")
    return found


def act_as(node: int, run: int) -> None:
    """What this process is while a task runs: Flower writes it into every new message."""
    TaskIdentity.node_id, TaskIdentity.run_id, TaskIdentity.task_id = node, run, 0


def _content(found: InflatableObject) -> Callable[[], bytes]:
    """Leaves hold the data; whatever has children names them, which takes hashing all of it again."""
    if not found.children:
        return found.deflate
    content = found.deflate()
    return lambda: content


def _skewed(date: str, here: float) -> str:
    """What is wrong with the clock of this device, if it is too far from the server's; `date`: of an answer."""
    try:
        ahead = here - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return ""
    if -LATE < ahead < EARLY:
        return ""
    how = "ahead of" if ahead > 0 else "behind"
    return f"the clock of this device is {abs(ahead):.0f} s {how} the server's; set it, {EARLY} s ahead is too much"


@contextmanager
def _as_a_node() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        status, told = error.response.status_code, FlowerError.from_json(error.response.text)
        line = (told.message if told else "") or f"HTTP {status}"
        if status in (429, 500, 502, 503, 504):  # 500: its database is busy, or it is just going
            raise ConnectionError(line) from None
        if status == 401:
            if why := _skewed(error.response.headers.get("date", ""), time.time()):
                raise Misplaced(why) from None
            raise PermissionError("it does not know this key any more") from None
        if status == 412:
            raise PermissionError(line) from None
        raise (Over() if status == 403 else ValueError(f"the SuperLink refused: {line}")) from None
    except httpx.TransportError as error:
        line = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in line or "WRONG_VERSION_NUMBER" in line:
            raise Misplaced(f"it is not the server of our CA: {line}") from None
        raise ConnectionError(line) from None
