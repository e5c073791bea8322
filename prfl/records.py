"""Bytes as a Flower record, and back, in as few objects as can be, because Flower makes one request per object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from pydantic import TypeAdapter

from prfl.config import Experiment, plain
from prfl.types import Architecture

Scalar = int | float | str | bool | bytes
NAME, CONFIG = "prfl", "config"
SHORT = 8 << 20  # bytes that lie in the config itself: an array takes three objects more, and is cut into pieces
LABEL = ("uint8", "prfl.raw")  # type and encoding that the array says it has
LONGEST = 200  # characters of a reason
DIED, RAISED = 0, 2  # Flower's codes of error replies: the client's process ended; the client raised an exception


def pack(data: bytes, config: Mapping[str, Scalar] | None = None) -> RecordDict:
    """An encoded message, with scalars beside it, none of them called `prfl`."""
    if len(data) <= SHORT:
        return RecordDict({CONFIG: ConfigRecord({**(config or {}), NAME: data})})
    raw = Array(LABEL[0], (len(data),), LABEL[1], data)
    return RecordDict({NAME: ArrayRecord({NAME: raw}), CONFIG: ConfigRecord(dict(config or {}))})


def unpack(record: RecordDict) -> tuple[bytes, ConfigRecord]:
    """What `pack` put in. Raises ValueError on any other content."""
    config = record.get(CONFIG) if isinstance(record, RecordDict) else None  # Flower looks into nothing it receives
    if isinstance(config, ConfigRecord):
        data = config.get(NAME) if len(record) == 1 else _long(record)
        if isinstance(data, bytes):
            return data, ConfigRecord({k: v for k, v in config.items() if k != NAME})
    raise ValueError("the message is none of prfl's")


def _long(record: RecordDict) -> object:
    """What lies in the array beside the config."""
    arrays = record.get(NAME)
    raw = arrays.get(NAME) if len(record) == 2 and isinstance(arrays, ArrayRecord) and len(arrays) == 1 else None
    return raw.data if isinstance(raw, Array) and (raw.dtype, raw.stype) == LABEL else None


def reason(reply: Message) -> str:
    """Why an error reply brings nothing, in one line."""
    return line(str(reply.error.reason or "")) or f"Flower error {reply.error.code}"


def line(text: str) -> str:
    """The first line of what somebody else wrote, of printable characters, and not long."""
    first = text[: 4 * LONGEST].strip().split("\n")[0][:LONGEST]
    return "".join(c if c.isprintable() else " " for c in first).strip()


def experiment_out(experiment: Experiment) -> str:
    """An experiment as JSON; not pydantic's, which has no infinity."""
    return json.dumps(plain(experiment.model_dump()))


def experiment_in(text: str) -> Experiment:
    """Back from `experiment_out`. Raises ValueError."""
    return Experiment.model_validate(json.loads(text))


def architecture_out(architecture: Architecture) -> str:
    """Channel groups and multiply-adds as JSON, for a device that can not find them itself."""
    return _ARCHITECTURE.dump_json(architecture).decode()


@lru_cache(maxsize=4)
def architecture_in(text: str) -> Architecture:
    """Back from `architecture_out`. Raises ValueError."""
    return _ARCHITECTURE.validate_json(text)


_ARCHITECTURE = TypeAdapter(Architecture)
