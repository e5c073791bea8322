"""Federated learning that prunes: the domain, without Flower and without a clock.

`run` and `compare` are the Python door (`prfl.api`); they are imported when they are asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prfl.api import compare as compare
    from prfl.api import run as run


def __getattr__(name: str) -> Any:
    if name not in ("run", "compare"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from prfl import api

    return getattr(api, name)
