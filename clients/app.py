"""The Flower ClientApp: a message in, the same `train` as everywhere, a message out."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from clients.evaluate import evaluate as scores
from clients.local import Local
from prfl.codec import Codec, Layout
from prfl.config import Experiment
from prfl.records import groups_in, pack, unpack
from prfl.types import Task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Decode the task, train, encode the update."""
    task, local, codec, layout = _received(message, context)
    update = local.train(task)
    data, _ = codec.encode_update(update, task, layout)
    return Message(pack(data), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Scores of the received model on this client's own data."""
    task, local, *_ = _received(message, context)
    found = scores(task.mask.apply(task.params), local.model, local.samples(task.client))
    return Message(
        RecordDict({"metrics": MetricRecord({"num-examples": found.pop("samples"), **found})}), reply_to=message
    )


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who this node is: its client number and its device class."""
    node = context.node_config
    number, profile = int(node.get("partition-id", -1)), str(node.get("profile", "device"))
    return Message(pack(b"", client=number, profile=profile), reply_to=message)


def _received(message: Message, context: Context) -> tuple[Task, Local, Codec, Layout]:
    data, config = unpack(message.content)
    folder = str(context.node_config.get("data", "")) or str(config.get("data-dir", ""))
    local = _local(str(config["experiment"]), folder)
    codec = Codec(**json.loads(str(config["codec"])))
    layout = Layout.of(local.params, groups_in(str(config["groups"])))
    return codec.decode_task(data, layout), local, codec, layout


@lru_cache(maxsize=2)
def _local(experiment: str, folder: str) -> Local:
    return Local.of(Experiment.model_validate_json(experiment), Path(folder) if folder else None)
