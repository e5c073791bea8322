"""The values that travel and the protocols of the parts; nothing here knows Flower, clocks or files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor, inf
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

    @property
    def scale(self) -> str | None:
        """The entry that is the scale of a BatchNorm over these channels, one value each; None where there is none."""
        entries = {m.entry for m in self.members}
        norms = (k.removesuffix("running_mean") for k in sorted(entries) if k.endswith("running_mean"))
        return next((f"{norm}weight" for norm in norms if f"{norm}weight" in entries), None)


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
    patience: int = 0  # epochs in a row without a smaller mean loss after which training stops; 0: never
    batch: int = 20
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0  # FedProx's mu
    clip: float = 0.0  # largest gradient norm; 0: off
    fast: bool = True  # the quickest arithmetic; false: torch's own layers, one client at a time, which round otherwise
    sparse: bool = False  # products of large linear layers skip masked weights where that is quicker; rounds otherwise
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    absent: Literal["train", "zero"] = "train"  # zero: logits of classes the client lacks are 0 (HeteroFL)
    scaler: bool = False  # divide activations by the client's width in training (HeteroFL)
    statistics: Literal["share", "static"] = "share"  # BatchNorm: trained like weights, or batch statistics only
    labels: bool = False  # tell how many samples of which class one has
    report: Literal["", "gradient", "gradient2", "change"] = ""  # the statistic to send back
    window: Literal["last", "all"] = "all"  # over the last mini-batch, or over all of them
    scope: Literal["kept", "all"] = "kept"  # of the kept weights, or dense at masked weights
    normalise: bool = False  # the report scaled to [0, 1] over the whole model
    rungs: int = 0  # a step trains one of the widths 1/rungs, 2/rungs, ... up to the mask's, drawn anew (FjORD)
    distil: bool = False  # and the mask's own width with it, which the drawn one learns from
    regrow: float = 0.0  # share of a layer's kept weights that gives way to others (FedDST)
    regrow_at: float = 0.5  # when so much of the training is done
    prune: float = 0.0  # share of a layer's kept weights that a client may give up for good (Sub-FedAvg)
    prune_to: float = 0.7  # least density
    prune_apart: float = 1e-4  # least distance of the masks that the first and the last pass lead to
    prune_channels: float = 0.0  # share of a group's kept channels, by BatchNorm's scale
    channels_to: float = 0.5  # least share of a group's channels
    channels_apart: float = 0.01  # least distance, as above
    prune_accuracy: float = 0.5  # least accuracy of the pruned model
    holdout: float = 0.0  # on this share of the client's samples, which it does not train on


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


METRICS = ("loss", "loss_first", "loss_last", "accuracy", "samples", "steps")
"""What every update reports of its training."""

GIVEN_UP = "given up"
"""The reason of an arrival that nobody waited for any more: only its cost counts."""


@dataclass(frozen=True)
class Shortage:
    """A device has no memory for a task: bytes that it needs, and those that it has. As text, an arrival's reason."""

    needed: float
    available: float

    def __str__(self) -> str:
        return f"memory: needs {ceil(self.needed / 1e5) / 10:.1f} MB of {floor(self.available / 1e5) / 10:.1f} MB"

    @staticmethod
    def read(reason: str) -> Shortage | None:
        """What the reason says, to 0.1 MB on the safe side; None when it is another one."""
        found = _SHORTAGE.match(reason)
        needed, available = (1e6 * float(x) for x in found.groups()) if found else (0.0, 0.0)
        return Shortage(needed, available) if needed > available else None


_SHORTAGE = re.compile(r"memory: needs ([0-9]{1,12}\.[0-9]) MB of ([0-9]{1,12}\.[0-9]) MB")


@dataclass(frozen=True)
class Arrival:
    """How a task ended, in seconds and bytes; `update` is None when it failed, was refused, or came late or stale.

    busy, radio: seconds of computing, and of sending and receiving, where they are known. value: what the update was
    worth, where the method has a valuation; the server's own word.
    """

    task: Task
    sent: float
    at: float
    bytes_down: int
    bytes_up: int
    update: Update | None
    reason: str = ""
    busy: float | None = None
    radio: float | None = None
    value: float | None = None


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
    limits: Mapping[int, float] = field(default_factory=dict)  # largest density a client has memory for; 0: for none


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


Scorer = Callable[[Tree], Mapping[str, float]]
"""Scores of any parameters on the validation split: what may steer a method."""

Worth = Callable[[Sequence[Arrival]], Mapping[str, float]]
"""Scores of what these arrivals alone would be merged into."""


class Valuation(Protocol):
    """What each update was worth: a number an arrival, in their order; all of them brought an update.

    `judged`: it asks for the worth of coalitions, hence for a scorer on the server.
    """

    @property
    def judged(self) -> bool: ...
    def __call__(
        self, state: State, arrivals: Sequence[Arrival], worth: Worth, rng: np.random.Generator
    ) -> Sequence[float]: ...


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
        """The next arrival; None when none came until then, or can come, or when somebody new can be asked."""

    def forget(self) -> None:
        """Await no task under way any more; its device stays busy until it answers, and that arrives as GIVEN_UP."""

    def retire(self, client: int) -> None:
        """The client is idle no more, whenever it comes back: it is not to be asked again."""
