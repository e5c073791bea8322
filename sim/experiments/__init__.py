"""The experiments that ship: `prfl run NAME` or a path to a YAML file of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prfl.config import ConfigError

FOLDER = Path(__file__).parent
DEFAULT = "default"


def names() -> list[str]:
    """Of the experiments in this folder."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """The file of an experiment, given by path or by name. Raises ConfigError."""
    for found in (Path(name), FOLDER / f"{name}.yaml"):
        if found.is_file():
            return found
    raise ConfigError(f"no experiment {name!r}: neither a file nor one of {', '.join(names())}")


def chosen(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """A command line's experiment (the default one if none is named) and its overrides."""
    named = [a for a in arguments if "=" not in a]
    if len(named) > 1:
        raise ConfigError(f"one experiment at a time, got {', '.join(named)}")
    return path(named[0] if named else DEFAULT), [a for a in arguments if "=" in a]
