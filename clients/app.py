"""The Flower ClientApp: a message in, the same `train` as everywhere, a message out."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.local import Local
from prfl.codec import Codec, Layout
from prfl.evaluate import evaluate as scores
from prfl.records import RAISED, experiment_in, groups_in, pack, unpack
from prfl.types import Task

CARRY = "carry"  # what a lossy codec withheld so far; in the node's state, because it is the client's own

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Decode the task, train, encode the update; what can not be done is answered with the reason, in one line."""
    try:
        task, local, codec, layout = _received(message, context)
        update = local.train(task)
        carry = context.state.array_records.get(CARRY)
        before = None if carry is None else dict(carry.to_torch_state_dict())
        data, withheld = codec.encode_update(update, task, layout, carry=before)
    except Exception as error:
        return _failed(message, error)
    if withheld is not None:
        context.state[CARRY] = ArrayRecord(dict(withheld))
    return Message(pack(data), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Scores of the received model on this client's own training data."""
    try:
        task, local, *_ = _received(message, context)
        found = scores(task.mask.apply(task.params), local.model, local.samples(task.client))
    except Exception as error:
        return _failed(message, error)
    told = MetricRecord({"num-examples": int(found.pop("samples")), **found})
    return Message(RecordDict({"metrics": told}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who this node is: its client number and its device class, from the node config."""
    node = context.node_config
    number, profile = int(node.get("partition-id", -1)), str(node.get("profile", "device"))
    return Message(pack(b"", client=number, profile=profile), reply_to=message)


def _received(message: Message, context: Context) -> tuple[Task, Local, Codec, Layout]:
    """The task and what it takes. The node config may name a folder of data sets, `data`, or of its `own` data."""
    data, config = unpack(message.content)
    if threads := int(str(config.get("threads", 0))):
        torch.set_num_threads(threads)
    own, shared = (str(context.node_config.get(key, "")) for key in ("own", "data"))
    local = _local(str(config["experiment"]), own or shared or str(config.get("data-dir", "")), bool(own))
    codec = Codec(**json.loads(str(config["codec"])))
    layout = Layout.of(local.params, groups_in(str(config["groups"])))
    return codec.decode_task(data, layout), local, codec, layout


@lru_cache(maxsize=2)
def _local(experiment: str, folder: str, own: bool) -> Local:
    return Local.of(experiment_in(experiment), Path(folder) if folder else None, own)


def _failed(message: Message, error: Exception) -> Message:
    """An error reply with one clear line; the traceback goes to the device's log."""
    line = str(error).split("\n")[0] or type(error).__name__
    if not isinstance(error, (ValueError, RuntimeError, ArithmeticError)):
        line = f"{type(error).__name__}: {line}"
    logging.getLogger("flwr").warning("task failed: %s", line)
    logging.getLogger("flwr").debug("", exc_info=error)
    return Message(Error(RAISED, line), reply_to=message)
