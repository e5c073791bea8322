"""A part as plain data, a name with options: checked, built, and spelled out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields as members
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from prfl import checks

if TYPE_CHECKING:  # torch comes with it, and an experiment is read without
    from prfl.types import Work

Table = Mapping[str, Callable[..., Any]]


def _spec(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        return value
    raise ValueError(f"a name or {{name: ..., option: ...}} is wanted, got {value!r}")


Spec = Annotated[str | dict[str, Any], BeforeValidator(_spec)]
"""A part: its name, or `{name: ..., option: ...}`. A name is a row of the part's table, or `package.module:name`."""


class ConfigError(ValueError):
    """What a user wrote can not be run; the message is one line."""


def part(kind: str, spec: Spec, table: Table, **given: Any) -> Any:
    """Build one part from its spec, and the parts inside it from `tables()`. Raises ConfigError.

    `given`: arguments the caller knows; they are passed where the part has such a field and the spec does not say.
    """
    name, make, fields = _opened(kind, spec, table)
    title = kind if name == kind else f"{kind} {name}"
    known, hints, inner = inspect.signature(make).parameters, _hints(make), tables()
    if extra := [key for key in fields if key not in known]:
        raise ConfigError(f"{title}: no field {unknown(extra[0], known)}")
    values = {key: value for key, value in given.items() if key in known}
    for key, value in fields.items():
        where, hint = f"{title}: {key}", hints.get(key, Any)
        if hint in inner:
            values[key] = part(where, value, inner[hint])
        elif isinstance(value, dict) and getattr(hint, "__name__", "") == "Work":
            values[key] = work(value, values.get(key), where)
        else:
            values[key] = _checked(where, hint, value)
    if absent := [key for key, p in known.items() if p.default is p.empty and key not in values]:
        raise ConfigError(f"{title}: {', '.join(absent)} must be given")
    try:
        return make(**values)
    except ValueError as error:
        raise ConfigError(f"{kind}: {error}" if name in str(error) else f"{title}: {error}") from None


def spelled(spec: Spec, table: Table) -> dict[str, Any]:
    """The spec of a part that can be built, every option written out as far as it is plain data or a part."""
    name, make, fields = _opened("part", spec, table)
    hints, inner = _hints(make), tables()
    for key, p in inspect.signature(make).parameters.items():
        if hints.get(key) in inner:
            own = inner[hints[key]]
            fields[key] = spelled(fields[key], own) if key in fields else described(p.default, own)
        elif key not in fields and isinstance(p.default, str | int | float | tuple | Mapping | None):
            fields[key] = plain(p.default)
    return {"name": name, **fields}


def described(made: Any, table: Table) -> dict[str, Any]:
    """The spec of a part that was built."""
    kind, hints, inner = type(made), _hints(type(made)), tables()
    name = next((name for name, make in table.items() if make is kind), f"{kind.__module__}:{kind.__qualname__}")
    values = {field.name: getattr(made, field.name) for field in members(made)}
    own = {key: inner[hints[key]] for key in values if hints[key] in inner}
    return {"name": name} | {k: described(v, own[k]) if k in own else plain(v) for k, v in values.items()}


def plain(value: Any) -> Any:
    """A field's value as YAML has it."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, tuple | list) else value


def tables() -> Mapping[Any, Table]:
    """The types of fields that hold a part themselves, and where its names are found."""
    from prfl import density, guidance, merge, regions, saliency, staleness, valuation
    from prfl.types import Density, Merge, Saliency, Valuation

    return {
        Density: density.TABLE,
        Saliency: saliency.TABLE,
        Merge: merge.TABLE,
        staleness.Staleness: staleness.TABLE,
        Valuation: valuation.TABLE,
        guidance.Agreement: guidance.TABLE,
        regions.Masks: regions.TABLE,
    }


def work(fields: Mapping[str, Any], base: Work | None = None, kind: str = "work") -> Work:
    """Local training from its fields over `base`. Raises ConfigError."""
    from prfl.types import Work

    hints = get_type_hints(Work)
    if extra := [key for key in fields if key not in hints]:
        raise ConfigError(f"{kind}: no field {unknown(extra[0], hints)}")
    made = replace(base or Work(), **{k: _checked(f"{kind}: {k}", hints[k], v) for k, v in fields.items()})
    try:
        checks.least(kind, "batch", made.batch, 1)
        checks.positive(kind, "lr", made.lr)
        checks.fraction(kind, "momentum", made.momentum)
        for name in ("epochs", "steps", "patience", "weight_decay", "proximal", "clip"):
            checks.least(kind, name, getattr(made, name), 0)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not made.epochs and not made.steps:
        raise ConfigError(f"{kind}: epochs or steps must be 1 or more")
    if made.patience and made.steps:
        raise ConfigError(f"{kind}: patience counts epochs, but there are {made.steps} steps")
    return made


def name(spec: Spec) -> str:
    """A part's name; a method that is given by its parts has none of its own."""
    return spec if isinstance(spec, str) else str(spec.get("name", "own"))


def explain(error: ValidationError) -> str:
    """Pydantic's errors as one line."""
    return "; ".join(reason(e) for e in error.errors())


def reason(error: Any) -> str:
    """One of them: where, what was wrong, and what was given."""
    where = ".".join(str(x) for x in error["loc"] if not str(x).startswith(("function", "(")))
    message, got = str(error["msg"]), repr(error["input"])
    if error["type"] != "value_error":  # our own say it themselves
        message += f", got {got if len(got) < 80 else got[:76] + '...'}"
    return (f"{where}: " if where else "") + message.removeprefix("Value error, ")


def unknown(name: object, known: Any) -> str:
    """A name that does not exist: the nearest one that does, and all of them."""
    name = str(name)
    near = get_close_matches(name.rpartition(".")[2], list(known), 1)
    return f"{name!r}{f', did you mean {near[0]!r}?' if near else ''}; have {', '.join(sorted(known))}"


def _checked(where: str, hint: Any, value: Any) -> Any:
    """The value as its field's type."""
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error)}") from None
    except PydanticUserError:
        raise ConfigError(f"{where}: can not be given in an experiment") from None


def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    """The types of a part's fields; empty where they can not be resolved."""
    plain_class = isinstance(make, type) and not is_dataclass(make)
    try:
        return get_type_hints(make.__init__ if plain_class else make)
    except (NameError, TypeError):
        return {}


def _opened(kind: str, spec: Any, table: Table) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """The name in a spec, what it names, and the other fields."""
    if not isinstance(spec, str | dict):
        raise ConfigError(f"{kind}: a name or {{name: ..., option: ...}} is wanted, got {spec!r}")
    fields = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind}: a name is missing; have {', '.join(sorted(table))}")
    if ":" not in name and name not in table:
        raise ConfigError(f"{kind}: no {unknown(name, table)}")
    return name, _own(kind, name) if ":" in name else table[name], fields


def _own(kind: str, name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(import_module(module), attribute)
    except Exception as error:  # whatever the user's module does
        raise ConfigError(f"{kind}: {name}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not callable(found):
        raise ConfigError(f"{kind}: {name} is not a class or a function")
    return found  # type: ignore[no-any-return]
