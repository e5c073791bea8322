"""The Flower ClientApp: a message in, the same `train` as everywhere, a message out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from secrets import token_hex
from traceback import walk_tb

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients import memory
from clients.keeping import Kept, fits
from clients.local import Local
from prfl import cost
from prfl.codec import Codec, Layout
from prfl.config import Experiment, name
from prfl.evaluate import evaluate as scores
from prfl.records import RAISED, architecture_in, experiment_in, line, pack, unpack
from prfl.types import Architecture, Task, Tree

CARRY = "carry"  # what a lossy codec withheld so far; in the node's state, because it is the client's own
TRUSTED = "trusted"  # in the node config: packages of users' own parts
WANTED = ("experiment", "codec", "architecture")
OURS = ("prfl", "clients")
OPEN = {f"clients.{name}" for name in ("app", "asked", "local", "outcome", "train")} | {
    f"prfl.{name}" for name in ("codec", "bitstream", "envelope")
}
"""The modules whose errors the server may read: they speak of its task and of counts, never of what lies in a file."""

app = ClientApp()


@dataclass(frozen=True)
class Received:
    """A task and what it takes. `held`: bytes of the process before any task of this experiment. `run`: whose task."""

    task: Task
    local: Local
    held: int
    codec: Codec
    layout: Layout
    architecture: Architecture
    run: str


@app.train()
def train(message: Message, context: Context) -> Message:
    """Decode the task, train, encode the update; what can not be done is answered with the reason, in one line."""
    return _answered(message, lambda: _trained(message, context))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Scores of the received model on this client's own training data."""
    return _answered(message, lambda: _scored(message, context))


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who this node is: its client number and its device class, from the node config."""
    return _answered(message, lambda: _named(context))


def _trained(message: Message, context: Context) -> RecordDict:
    got = _received(message, context)
    if why := _refusal(got, context):
        raise ValueError(why)
    task = got.task
    logging.getLogger("prfl").info("client %d, version %d, density %.3g", task.client, task.version, task.density)
    update = got.local.train(task)
    before = _carried(got, context)
    data, withheld = got.codec.encode_update(update, got.task, got.layout, carry=before)
    if withheld is not None:
        _carry(got, context, withheld)
    return pack(data)


def _scored(message: Message, context: Context) -> RecordDict:
    got = _received(message, context)
    found = scores(got.task.mask.apply(got.task.params), got.local.model, got.local.samples(got.task.client))
    return RecordDict({"metrics": MetricRecord({"num-examples": int(found.pop("samples")), **found})})


def _named(context: Context) -> RecordDict:
    node = context.node_config
    return pack(b"", {"client": _number(context, "partition-id", -1), "profile": str(node.get("profile", "device"))})


def _received(message: Message, context: Context) -> Received:
    """The node config may name a folder of data sets, `data`, or of its `own` data."""
    data, config = unpack(message.content)
    if missing := [key for key in WANTED if key not in config]:
        raise ValueError(f"the message lacks {missing[0]}: the server is of another version")
    if threads := int(str(config.get("threads", 0))):
        torch.set_num_threads(threads)
    own, shared = (str(context.node_config.get(key, "")) for key in ("own", "data"))
    experiment = str(config["experiment"])
    device = str(context.node_config.get("device", "cpu"))
    _check_trust(experiment_in(experiment), context)
    local, held = _local(experiment, own or shared or str(config.get("data-dir", "")), bool(own), device)
    codec = Codec(**json.loads(str(config["codec"])))
    architecture = architecture_in(str(config["architecture"]))
    layout = Layout.of(local.params, architecture.groups)
    run = str(config.get("run", message.metadata.run_id))  # its server's name for it outlives Flower's number
    return Received(codec.decode_task(data, layout), local, held, codec, layout, architecture, run)


def _check_trust(experiment: Experiment, context: Context) -> None:
    """Refuse a user's own parts unless the node trusts their package: to name one is to have it run here."""
    if TRUSTED not in context.node_config:
        return  # a simulation, or a node that was started by hand
    known = str(context.node_config[TRUSTED]).split()
    for spec in (experiment.model, experiment.data.set, experiment.data.partition):
        module, own, _ = name(spec).partition(":")
        if own and module != Local.__module__ and module.partition(".")[0] not in known:
            raise ValueError(f"this node does not trust {module}; it trusts {', '.join(known) or 'no package'}")


@lru_cache(maxsize=2)
def _local(experiment: str, folder: str, own: bool, device: str) -> tuple[Local, int]:
    return Local.of(experiment_in(experiment), Path(folder) if folder else None, own, device), memory.resident()


def _refusal(got: Received, context: Context) -> str:
    """Why this device has no memory for the task, if so. Where the server names no costs, nothing can be foreseen."""
    task = got.task
    if not cost.priced(task.params, got.architecture):
        return ""
    lossy = not got.codec.lossless
    needed = got.held + cost.footprint(task.params, task.mask, got.architecture, task.work, lossy=lossy)
    return cost.refusal(needed, _number(context, "memory", 0) or memory.limit())


def _kept(got: Received, context: Context) -> Kept | None:
    folder = str(context.node_config.get("state", ""))
    return Kept(Path(folder), got.run, got.task.client) if folder else None


def _carried(got: Received, context: Context) -> Tree | None:
    if kept := _kept(got, context):
        return kept.read(got.layout.shapes)
    record = context.state.array_records.get(CARRY)
    before = None if record is None else dict(record.to_torch_state_dict())
    return before if before is not None and fits(before, got.layout.shapes) else None


def _carry(got: Received, context: Context, withheld: Tree) -> None:
    if kept := _kept(got, context):
        kept.write(withheld)
    else:
        context.state[CARRY] = ArrayRecord(dict(withheld))


def _number(context: Context, key: str, default: int) -> int:
    value = context.node_config.get(key, default)
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"node config: {key} must be a whole number") from None


def _answered(message: Message, answer: Callable[[], RecordDict]) -> Message:
    """The answer, or an error reply with one line; the traceback goes to the device's log."""
    try:
        return Message(answer(), reply_to=message)
    except Exception as error:
        return Message(Error(RAISED, _told(error)), reply_to=message)


def _told(error: Exception) -> str:
    """What the server may know of an error: our own words about the task, of all else its kind and where to look it up.

    What a library says, or one of our readers of files, may quote data or paths.
    """
    log, frames = logging.getLogger("flwr"), [frame for frame, _ in walk_tb(error.__traceback__)]
    where = str(frames[-1].f_globals.get("__name__"))
    lacking = isinstance(error, ImportError) and where.partition(".")[0] in OURS  # it names a package, and no more
    if lacking or (isinstance(error, ValueError) and where in OPEN):
        log.warning("task failed: %s", error)
        log.debug("", exc_info=error)
        return line(str(error))
    number = token_hex(4)
    log.error("error %s", number, exc_info=error)
    return f"{type(error).__name__}, error {number} in the device's log"
