"""From YAML to an experiment: plain data, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from prfl.specs import ConfigError, Spec, described, name, part, plain, reason, spelled, unknown, work

__all__ = ["ConfigError", "Data", "Devices", "Experiment", "Real", "Spec", "Stop", "described", "load", "name", "part",
           "plain", "spelled", "work"]  # fmt: skip


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


class Real(_Section):
    """Who learns: the nodes of a SuperLink. So many have to be there at the start; others may join later.

    `wait`: seconds for them to come. `timeout`: seconds a device has for a task. `poll`: seconds between two looks for
    answers; they grow with the wait.
    """

    name: Literal["real"] = "real"
    nodes: int = Field(1, ge=1)
    wait: float = Field(600.0, gt=0)
    timeout: float = Field(3600.0, gt=0)
    poll: float = Field(0.05, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


def _kind(value: Any) -> str:
    """Which of `KINDS` is meant."""
    named = value.get("name") if isinstance(value, dict) else isinstance(value, str | Real)
    return "(real)" if named else "(simulated)"


Learners = Annotated[Annotated[Devices, Tag("(simulated)")] | Annotated[Real, Tag("(real)")], Discriminator(_kind)]
KINDS: dict[str, type[BaseModel]] = {"(simulated)": Devices, "(real)": Real}
"""What `devices` can be."""


class Stop(_Section):
    """The run ends at whichever comes first; `accuracy` is the validation split's."""

    versions: float = Field(inf, gt=0)
    seconds: float = Field(inf, gt=0)
    updates: float = Field(inf, gt=0)
    accuracy: float = Field(inf, gt=0)

    @model_validator(mode="after")
    def _ends(self) -> Stop:
        if min(self.versions, self.seconds, self.updates, self.accuracy) == inf:
            raise ValueError("versions, seconds, updates or accuracy must be given, or the run has no end")
        if 1 < self.accuracy < inf:
            raise ValueError(f"accuracy is a share in (0, 1], got {self.accuracy:g}")
        return self


class Experiment(_Section):
    """One run: the same experiment gives the same model to the bit.

    The validation split is scored every so many versions (`evaluate_every`), but not before `evaluate_after` seconds
    have passed since the last time; the test split with it or at the end.
    `metrics`, at the end: precision, recall and F1 (macro); scores on every simulated client's own data (local).
    """

    name: str = Field("experiment", pattern=r"^\w[^/\\]*$")
    seed: int = Field(0, ge=0, lt=2**63)
    data: Data = Field(default_factory=Data)
    model: Spec = "mlp"
    work: dict[str, Any] = Field(default_factory=dict)
    method: Spec = "pr_fl"
    pacing: Spec = Field(default_factory=lambda: {"name": "buffered", "in_flight": 30, "goal": 10})
    selector: Spec = "random"
    devices: Annotated[
        Annotated[Devices, Tag("(simulated)")] | Annotated[Real, Tag("(real)")], Discriminator(_kind)
    ] = Field(default_factory=Devices)
    codec: dict[str, Any] = Field(default_factory=dict)
    residual: bool = False
    stop: Stop = Field(default_factory=lambda: Stop(versions=100))
    evaluate_every: int = Field(5, ge=1)
    evaluate_after: float = Field(0.0, ge=0)
    test: Literal["always", "end"] = "always"
    metrics: tuple[Literal["macro", "local"], ...] = ("macro", "local")


def load(path: Path | None, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment from a YAML file (None: the defaults) and `key.sub=value` overrides. Raises ConfigError."""
    fields: Any = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"no experiment file {path}")
        try:
            fields = yaml.safe_load(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: an experiment is a mapping of fields, got {type(fields).__name__}")
    for override in overrides:
        fields = _overridden(Experiment().model_dump(), fields, override)
    try:
        return Experiment.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path.name if path else 'experiment'}: {'; '.join(map(_line, error.errors()))}") from None


def _line(error: Any) -> str:
    """Pydantic's error, or for an unknown field what exists."""
    if error["type"] != "extra_forbidden":
        return reason(error)
    where = ".".join(str(x) for x in error["loc"] if x not in KINDS)
    return f"no field {unknown(where, _fields(error['loc'][:-1]))}"


def _fields(path: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Experiment
    for key in path:
        inner = KINDS.get(key) or model.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)


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
    if not isinstance(fields, dict | str | None):
        raise ConfigError(f"override {head}: there are no fields in {fields!r}")
    inner = {"name": fields} if isinstance(fields, str) else fields or {}
    return {**inner, head: _placed(inner.get(head), rest, value) if rest else value}
