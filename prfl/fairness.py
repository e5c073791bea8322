"""Who gains and who works: shares of clients and of device classes in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from statistics import fmean
from typing import Any


def jain(values: Sequence[float]) -> float:
    """Jain's index, (sum x)^2 / (n sum x^2): 1 when all have the same, 1/n when one has all (Jain et al. 1984)."""
    squares = len(values) * sum(x * x for x in values)
    return sum(values) ** 2 / squares if squares else 1.0


def worst(values: Sequence[float], share: float = 0.1) -> float:
    """Mean of the lowest `share` of the values, of one at least. ValueError: no values."""
    if not values:
        raise ValueError("worst: no values")
    return fmean(sorted(values)[: max(1, ceil(share * len(values)))])


def personal(accuracies: Sequence[float]) -> dict[str, float]:
    """Clients' own models on data of theirs that they do not train on, a client as one. ValueError: nobody has one."""
    return {"clients": len(accuracies), "accuracy": fmean(accuracies), "worst_tenth": worst(accuracies)}


def local(clients: Mapping[int, Mapping[str, Any]], test_accuracy: float) -> dict[str, Any]:
    """The global model on the clients' own training parts: `clients[c]` holds class, updates, samples, accuracy.

    Means are over clients, each as one; `generalisation_gap` is over the samples of those that took part.
    """
    scored = {c: row for c, row in clients.items() if "accuracy" in row}
    if not scored:
        return {}
    kinds = {
        "participants": [r for r in scored.values() if r["updates"]],
        "others": [r for r in scored.values() if not r["updates"]],
    }
    classes = sorted({r["class"] for r in scored.values()})
    out: dict[str, Any] = {
        "worst_tenth": worst([r["accuracy"] for r in scored.values()]),
        "jain_accuracy": jain([r["accuracy"] for r in scored.values()]),
        "by_class": {name: fmean(r["accuracy"] for r in scored.values() if r["class"] == name) for name in classes},
    }
    for kind, rows in kinds.items():
        out[kind] = {"clients": len(rows)} | ({"accuracy": fmean(r["accuracy"] for r in rows)} if rows else {})
    if seen := kinds["participants"]:
        right = sum(r["accuracy"] * r["samples"] for r in seen) / sum(r["samples"] for r in seen)
        out["generalisation_gap"] = right - test_accuracy
    return out
