"""Refusals of a part's fields, in one clear line each."""

from __future__ import annotations


def choice(part: str, field: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise ValueError(f"{part}: {field} must be one of {', '.join(known)}, got {value!r}")


def share(part: str, field: str, value: float) -> None:
    """Refuse what is not in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{part}: {field} must be in (0, 1], got {value:g}")


def positive(part: str, field: str, value: float) -> None:
    """Refuse what is not above 0 and finite."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{part}: {field} must be above 0, got {value:g}")


def fraction(part: str, field: str, value: float) -> None:
    """Refuse what is not in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{part}: {field} must be in [0, 1), got {value:g}")


def least(part: str, field: str, value: float, bound: float) -> None:
    """Refuse what is below the bound, or not finite."""
    if not bound <= value < float("inf"):
        raise ValueError(f"{part}: {field} must be {bound:g} or more, got {value:g}")
