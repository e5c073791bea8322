"""From YAML to objects: an experiment is plain data, checked field by field; a part is a name with options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from prfl import density, merge, saliency, staleness
from prfl.types import Work

Spec = str | dict[str, Any]
"""A part: its name, or `{name: ..., option: ...}`. A name is a row of the part's table, or `package.module:name`."""

TABLES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "density": density.TABLE,
    "first": density.TABLE,
    "saliency": saliency.TABLE,
    "merge": merge.TABLE,
    "inner": merge.TABLE,
    "staleness": staleness.TABLE,
}
"""Fields that hold a part themselves, and where its names are found."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Section):
    """What is learned from: the set, its split over the clients, and the share kept for validation."""

    set: Spec = "digits"
    clients: int = Field(100, ge=1)
    partition: Spec = Field(default_factory=lambda: {"name": "dirichlet", "alpha": 0.5})
    noise: dict[str, float] = Field(default_factory=dict)
    validation: float = Field(0.1, gt=0, lt=1)
    download: bool = False


class Devices(_Section):
    """Who learns: profiles in shares (`mix`), or a fleet given client by client; and the network between.

    `profiles`: changes to the shipped profiles and new ones, field by field, or the file that holds them.
    """

    mix: dict[str, float] = Field(default_factory=lambda: {"pi3": 0.3, "pi4": 0.3, "jetson_nano": 0.2, "laptop": 0.2})
    fleet: Spec | None = None
    spread: float = Field(0.0, ge=0)
    profiles: str | dict[str, dict[str, Any]] | None = None
    network: Spec = "links"


class Stop(_Section):
    """The run ends at whichever comes first; `accuracy` is the validation split's."""

    versions: float = Field(inf, gt=0)
    seconds: float = Field(inf, gt=0)
    updates: float = Field(inf, gt=0)
    accuracy: float = Field(inf, gt=0)


class Experiment(_Section):
    """One run, resolved: the same experiment gives the same model to the bit."""

    name: str = "experiment"
    seed: int = Field(0, ge=0)
    data: Data = Field(default_factory=Data)
    model: Spec = "mlp"
    work: dict[str, Any] = Field(default_factory=dict)
    method: Spec = "pr_fl"
    pacing: Spec = Field(default_factory=lambda: {"name": "buffered", "in_flight": 30, "goal": 10})
    selector: Spec = "random"
    devices: Devices = Field(default_factory=Devices)
    codec: dict[str, Any] = Field(default_factory=dict)
    residual: bool = False
    stop: Stop = Field(default_factory=lambda: Stop(versions=100))
    evaluate_every: int = Field(5, ge=1)


class ConfigError(ValueError):
    """What a user wrote can not be run; the message is one line."""


def load(path: Path | None, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from a YAML file (None: the defaults) and `key.sub=value` overrides. Raises ConfigError."""
    fields: Any = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"no experiment file {path}")
        try:
            fields = yaml.safe_load(path.read_text()) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: an experiment is a mapping of fields, got {type(fields).__name__}")
    for override in overrides:
        fields = _overridden(Experiment().model_dump(), fields, override)
    try:
        return Experiment.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path.name if path else 'experiment'}: {explain(error, Experiment)}") from None


def part(kind: str, spec: Spec, table: Mapping[str, Callable[..., Any]], **given: Any) -> Any:
    """Build one part from its spec; parts inside it are built from `TABLES`. Raises ConfigError.

    `given`: arguments the caller knows; they are passed where the part has such a field and the spec does not say.
    """
    fields = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = fields.pop("name", None)
    make = _found(kind, name, table)
    known = inspect.signature(make).parameters
    if extra := [key for key in fields if key not in known]:
        raise ConfigError(f"{kind} {name}: no field {_unknown(extra[0], known)}")
    hints = get_type_hints(make)
    values = {key: value for key, value in given.items() if key in known}
    for key, value in fields.items():
        where = f"{kind} {name}: {key}"
        if key in TABLES and isinstance(value, (str, dict)):
            values[key] = part(where, value, TABLES[key])
        elif hints[key] is Work and isinstance(value, dict):
            values[key] = work(value, values.get(key), where)
        else:
            values[key] = _checked(where, hints[key], value)
    if absent := [key for key, p in known.items() if p.default is p.empty and key not in values]:
        raise ConfigError(f"{kind} {name}: {', '.join(absent)} must be given")
    try:
        return make(**values)
    except ValueError as error:
        raise ConfigError(f"{kind}: {error}" if str(name) in str(error) else f"{kind} {name}: {error}") from None


def work(fields: Mapping[str, Any], base: Work | None = None, kind: str = "work") -> Work:
    """Local training from its fields over `base`. Raises ConfigError."""
    hints = get_type_hints(Work)
    if extra := [key for key in fields if key not in hints]:
        raise ConfigError(f"{kind}: no field {_unknown(extra[0], hints)}")
    return replace(base or Work(), **{k: _checked(f"{kind}: {k}", hints[k], v) for k, v in fields.items()})


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """Pydantic's errors as one line; unknown fields with what exists."""
    return "; ".join(_line(e, model) for e in error.errors())


def _checked(where: str, hint: Any, value: Any) -> Any:
    """The value as its field's type."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from None


def _line(error: Any, model: type[BaseModel] | None) -> str:
    where = ".".join(str(x) for x in error["loc"] if not str(x).startswith("function"))
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument") and model is not None:
        return f"no field {_unknown(where, _fields(model, error['loc'][:-1]))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}, got {error['input']!r}" if where else message


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    for key in path:
        inner = model.model_fields[key].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)


def _found(kind: str, name: object, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if isinstance(name, str) and ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{kind}: {name}: {error}") from None
    if not isinstance(name, str):
        raise ConfigError(f"{kind}: a name is missing; have {', '.join(sorted(table))}")
    if name not in table:
        raise ConfigError(f"{kind}: no {_unknown(name, table)}")
    return table[name]


def _unknown(name: str, known: Any) -> str:
    near = get_close_matches(name.rpartition(".")[2], list(known), 1)
    return f"{name!r}{f', did you mean {near[0]!r}?' if near else ''}; have {', '.join(sorted(known))}"


def _overridden(defaults: Mapping[str, Any], fields: Mapping[str, Any], override: str) -> dict[str, Any]:
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise ConfigError(f"an override is key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {path}: {text!r} is not a YAML value") from None
    head, *rest = path.split(".")
    base = fields if head in fields or not rest else {**fields, head: defaults.get(head)}
    return _placed(base, [head, *rest], value)


def _placed(fields: Any, path: Sequence[str], value: Any) -> dict[str, Any]:
    head, *rest = path
    inner = fields if isinstance(fields, dict) else {} if fields is None else {"name": fields}
    return {**inner, head: _placed(inner.get(head), rest, value) if rest else value}
