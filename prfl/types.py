"""The values that travel and the protocols of the parts; nothing here knows Flower, clocks or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from prfl.cut import Ranking
    from prfl.masks import Mask

Tree = Mapping[str, Tensor]
"""Named tensors: parameters, float buffers, scores. Never edited in place; a snapshot is a reference."""


@dataclass(frozen=True)
class Member:
    """Where a group's channels lie in one entry: channel c is `repeat` indices of `axis` from `offset + c * repeat`."""

    entry: str
    axis: int
    repeat: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Group:
    """`size` channels that can only be kept or cut together, over all their members."""

    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Architecture:
    """What the server knows of a model besides its values.

    `macs[entry]`: multiply-adds that one kept weight of the entry costs per sample, forward.
    """

    groups: tuple[Group, ...] = ()
    macs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a client does with a task. Plain data, because it crosses the wire."""

    epochs: int = 1
    steps: int = 0  # local mini-batch steps; 0: whole epochs
    batch: int = 20
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0  # FedProx's mu
    clip: float = 0.0  # largest gradient norm; 0: off
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    absent: Literal["train", "zero"] = "train"  # zero: logits of classes the client lacks are 0 (HeteroFL)
    scaler: bool = False  # divide activations by the client's width in training (HeteroFL)
    statistics: Literal["share", "static"] = "share"  # BatchNorm: trained like weights, or batch statistics only
    report: Literal["", "gradient", "gradient2", "change"] = ""  # the statistic to send back
    window: Literal["last", "all"] = "all"  # over the last mini-batch, or over all of them
    scope: Literal["kept", "all"] = "kept"  # of the kept weights, or dense at masked weights
    normalise: bool = False  # the report scaled to [0, 1] over the whole model


@dataclass(frozen=True)
class Task:
    """Server to client. `params` is the server's whole snapshot; only what `mask` keeps is sent."""

    client: int
    version: int
    params: Tree
    mask: Mask
    work: Work
    seed: int
    density: float = 1.0


@dataclass(frozen=True)
class Update:
    """Client to server. `delta[entry]`: 1-D, local minus received values of the kept weights, in mask order.

    `signal`: what `Work.report` asked for, 1-D in mask order (`scope="kept"`) or flat over the whole entry ("all").
    The mask is explicit: a zero weight is not a pruned weight.
    """

    client: int
    version: int
    delta: Tree
    mask: Mask
    weight: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    signal: Tree | None = None


GIVEN_UP = "given up"
"""The reason of an arrival that nobody waited for any more: only its cost counts."""


@dataclass(frozen=True)
class Arrival:
    """How a task ended, in seconds and bytes; `update` is None when it failed, was refused, or came late or stale."""

    task: Task
    sent: float
    at: float
    bytes_down: int
    bytes_up: int
    update: Update | None
    reason: str = ""


@dataclass(frozen=True)
class State:
    """All the server remembers, hence all a checkpoint holds."""

    version: int
    params: Tree
    rank: Ranking
    architecture: Architecture
    classes: Mapping[int, str] = field(default_factory=dict)  # device class of every client
    signal: Any = None
    density: Any = None
    merge: Any = None
    selector: Any = None
    validation: Mapping[str, float] = field(default_factory=dict)  # the latest scores on the validation split
    seed: int = 0
    sent: int = 0  # tasks sent so far: with the seed, the source of every draw


class Density(Protocol):
    """How much a client keeps: a share in (0, 1]."""

    def init(self) -> Any: ...
    def ask(self, state: State, client: int, rng: np.random.Generator) -> float: ...
    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Any:
        """The part's new memory, once per merge; `state.density` is the old one."""


class Saliency(Protocol):
    """What matters: scores shaped like `params`, larger is kept longer.

    `signal` holds what clients reported, NaN where nobody did; `needs` names the report, "" for none.
    """

    @property
    def needs(self) -> str: ...
    def __call__(self, params: Tree, signal: Tree | None) -> Tree: ...


class Merge(Protocol):
    """From the arrivals with an update to the next parameters, and the part's new memory."""

    def init(self) -> Any: ...
    def __call__(self, state: State, arrivals: Sequence[Arrival]) -> tuple[Tree, Any]: ...


class Selector(Protocol):
    """Who is asked: at most `free` of the `idle` clients."""

    def init(self) -> Any: ...
    def ask(self, state: State, idle: Sequence[int], free: int, rng: np.random.Generator) -> Sequence[int]: ...
    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Any: ...


class Transport(Protocol):
    """The only thing that differs between simulation and deployment."""

    def now(self) -> float:
        """Seconds since the start."""

    def idle(self) -> Sequence[int]:
        """Clients that could take a task now, in ascending order."""

    def busy(self) -> int:
        """Tasks still awaited."""

    def send(self, task: Task) -> None: ...

    def wait(self, until: float = inf) -> Arrival | None:
        """The next arrival, or None when none came until then (or none can come)."""

    def forget(self) -> None:
        """Await no task under way any more; its device stays busy until it answers, and that arrives as GIVEN_UP."""
