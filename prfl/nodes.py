"""Any value of frozen parts as plain nodes and tensors, and back: exact to the bit, without pickle.

A value becomes a table of nodes, which is JSON, and tensors beside it. What is one object is one node, hence one object
again. Classes go by name, and come back only from this project and from packages that the caller trusts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from math import isfinite
from operator import attrgetter
from types import MappingProxyType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from prfl.cut import Ranking

PACKAGES = ("prfl", "strategies", "clients", "sim", "deploy")
"""Whose classes come back without being asked for."""

SERIES: dict[str, Callable[[Iterator[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Writer:
    """A value as nodes and tensors: JSON's own values as they are, `[n]` for node n; children come before parents."""

    def __init__(self, trusted: Sequence[str]):
        self.nodes: list[list[Any]] = []
        self.tensors: list[Tensor] = []
        self._trusted = trusted
        self._known: dict[int, tuple[Any, int]] = {}  # by id, with the object, so that the id stays taken

    def put(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, str) or (type(value) is float and isfinite(value)):
            return value
        if id(value) not in self._known:
            self.nodes.append(self._node(value))
            self._known[id(value)] = value, len(self.nodes) - 1
        return [self._known[id(value)][1]]

    def _node(self, value: Any) -> list[Any]:
        kind = type(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return ["tensor", len(self.tensors) - 1]
        if isinstance(value, np.ndarray):
            return ["array", self.put(torch.from_numpy(value.copy()))]
        if isinstance(value, np.generic):
            return ["number", value.dtype.str, value.tobytes().hex()]
        if kind is float:
            return ["float", str(value)]
        if kind is bytes:
            return ["bytes", value.hex()]
        if kind in SERIES.values():
            return [kind.__name__, *map(self.put, value)]
        if kind in (dict, MappingProxyType):
            return ["map", *([self.put(k), self.put(v)] for k, v in value.items())]
        if kind is ref:
            return ["weak", self.put(value())]
        if kind is Ranking:  # its order may still be a promise that holds old parameters
            return ["ranking", self.put(value.cut), self.put(value.places)]
        name = f"{kind.__module__}:{kind.__qualname__}"
        if _class(name, self._trusted) is not kind:
            raise ValueError(f"state: {name} is not the class of this name any more")
        if isinstance(value, tuple):
            return ["named", name, *map(self.put, value)]
        return ["object", name, *([f.name, self.put(getattr(value, f.name))] for f in fields(value))]


def restored(table: Mapping[str, Any], tensors: Sequence[Tensor], trusted: Sequence[str]) -> Any:
    """What `Writer.put` was given."""
    values: list[Any] = []

    def get(child: Any) -> Any:
        return values[child[0]] if isinstance(child, list) else child

    for kind, *rest in table["nodes"]:
        match kind:
            case "tensor":
                value: Any = tensors[rest[0]]
            case "array":
                value = get(rest[0]).numpy()
            case "number":
                value = np.frombuffer(bytes.fromhex(rest[1]), rest[0])[0]
            case "float":
                value = float(rest[0])
            case "bytes":
                value = bytes.fromhex(rest[0])
            case "map":
                value = {get(k): get(v) for k, v in rest}
            case "weak":
                value = None if rest[0] is None else ref(get(rest[0]))
            case "ranking":
                value = _ranked(*map(get, rest))
            case "named":
                value = _class(rest[0], trusted)._make(map(get, rest[1:]))
            case "object":
                value = _object(rest[0], {k: get(v) for k, v in rest[1:]}, trusted)
            case _:
                value = SERIES[kind](map(get, rest))
        values.append(value)
    return get(table["root"])


def _ranked(cut: Any, places: Any) -> Ranking:
    return Ranking(cut, [lambda: places])


def _object(name: str, values: Mapping[str, Any], trusted: Sequence[str]) -> Any:
    """The dataclass as it was, without its constructor: nothing is checked, changed or run."""
    cls = _class(name, trusted)
    if {f.name for f in fields(cls)} != values.keys():
        raise ValueError(f"state: {name} has other fields than when this was saved: {', '.join(values)}")
    made = object.__new__(cls)
    for field, value in values.items():
        object.__setattr__(made, field, value)
    return made


def _class(name: str, trusted: Sequence[str]) -> Any:
    """The dataclass or named tuple `module:qualname`. ValueError: no such, or not one of a package that is trusted."""
    module, _, path = name.partition(":")
    if not any(module == known or module.startswith(f"{known}.") for known in (*PACKAGES, *trusted)):
        raise ValueError(f"state: {name} is of no known package; have {', '.join((*PACKAGES, *trusted))}")
    try:
        found = attrgetter(path)(import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"state: {name} can not be found again: {error}") from None
    plain = is_dataclass(found) or (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_make"))
    if not isinstance(found, type) or not plain or f"{found.__module__}:{found.__qualname__}" != name:
        raise ValueError(f"state: {name} is neither a dataclass nor a named tuple")
    return found
