"""Bytes as a Flower record, and back: one raw array a message, because Flower makes one request per array."""

from __future__ import annotations

import json
from functools import lru_cache

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from pydantic import TypeAdapter

from prfl.config import Experiment, plain
from prfl.types import Group

NAME = "prfl"
DIED, RAISED = 0, 2  # Flower's codes of error replies: the client's process ended; the client raised an exception


def pack(data: bytes, **config: int | float | str | bool | bytes) -> RecordDict:
    """An encoded message, with scalars beside it."""
    raw = Array(dtype="uint8", shape=(len(data),), stype="prfl.raw", data=data)
    return RecordDict({NAME: ArrayRecord({NAME: raw}), "config": ConfigRecord(dict(config))})


def unpack(record: RecordDict) -> tuple[bytes, ConfigRecord]:
    """What `pack` put in. Raises ValueError on any other content."""
    try:
        return record.array_records[NAME][NAME].data, record.config_records["config"]
    except KeyError:
        raise ValueError("the message is none of prfl's") from None


def reason(reply: Message) -> str:
    """Why an error reply brings nothing, in one line."""
    lines = str(reply.error.reason or "").split("\n")
    return lines[0].strip() or f"Flower error {reply.error.code}"


def experiment_out(experiment: Experiment) -> str:
    """An experiment as JSON; not pydantic's, which has no infinity."""
    return json.dumps(plain(experiment.model_dump()))


def experiment_in(text: str) -> Experiment:
    """Back from `experiment_out`. Raises ValueError."""
    return Experiment.model_validate(json.loads(text))


def groups_out(groups: tuple[Group, ...]) -> str:
    """Channel groups as JSON, for a device that can not find them itself."""
    return _GROUPS.dump_json(groups).decode()


@lru_cache(maxsize=4)
def groups_in(text: str) -> tuple[Group, ...]:
    """Back from `groups_out`. Raises ValueError."""
    return _GROUPS.validate_json(text)


_GROUPS = TypeAdapter(tuple[Group, ...])
