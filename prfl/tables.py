"""The tables of a report: how runs ended, what an accuracy cost, who took part, what exactly was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from statistics import fmean, stdev
from typing import Any

from prfl.config import name
from prfl.document import Table
from prfl.figures import unit
from prfl.live import duration
from prfl.traces import AXES, Trace

Groups = Mapping[str, Sequence[Trace]]
"""Runs that differ in their seed only, by label."""

NONE = "-"
WORDS = {"seconds": "time", "bytes": "bytes", "joules": "energy at work"}
"""What is on an axis of `AXES`."""


def ends(groups: Groups) -> Table:
    """How every method ended."""
    head = ("method", "test accuracy", "macro F1", "best validation", "time", "down + up", "energy at work",
            "energy idle", "updates", "mean density")  # fmt: skip
    rows = []
    for label, group in groups.items():
        of = [t.summary for t in group]
        rows.append([
            label, *(_told(of, key, ".3f") for key in ("test_accuracy", "test_f1", "best_validation_accuracy")),
            _scaled("seconds", [s["virtual_seconds"] for s in of]),
            _scaled("bytes", [s["bytes_up"] + s["bytes_down"] for s in of]),
            _energy(of, ("busy", "radio")), _energy(of, ("idle",)),
            _told(of, "client_updates", ".0f"), _told(of, "mean_density", ".2f"),
        ])  # fmt: skip
    energy = (
        " Energy at work: computing, sending and receiving. Idle: all devices for the rest of the run. Both by the "
        "watts of the device profiles, without tasks under way at the end."
        if any(s.summary.get("joules") for group in groups.values() for s in group)
        else ""
    )
    note = f"At the end of the runs{_over(groups)}. The test split is reported and steers nothing.{energy}"
    return _known(head, rows, note)


def costs(groups: Groups, targets: Sequence[float]) -> Table:
    """What it cost to come to the targets: a row for every method and kind of cost that is known."""
    rows = []
    for axis in AXES:
        for label, group in groups.items():
            row = [_cost(group, axis, target) for target in targets]
            if any(t.points and getattr(t.points[-1], axis) is not None for t in group):
                rows.append([f"{WORDS[axis]}, {label}" if len(groups) > 1 else WORDS[axis], *row])
    some = " that reached it, (n of m) where not all did" if _over(groups) else ""
    note = (
        f"Cost of the first evaluation at which the validation accuracy was there{_over(groups)}{some}. "
        f"{NONE}: it never was."
    )
    return Table(["until accuracy", *(f"{target:g}" for target in targets)], rows, note)


def fairness(groups: Groups) -> Table:
    """Who took part, and how well the model does for whom."""
    head = ("method", "Jain of updates", "clients never used", "worst 10 %", "participants", "others",
            "Jain of accuracy", "gap", "personal", "personal, worst 10 %")  # fmt: skip
    rows = []
    for label, group in groups.items():
        found = [t.summary.get("local") or {} for t in group]
        own = [t.summary.get("personal") or {} for t in group]
        unused = [{"clients": sum(not row["updates"] for row in t.clients.values())} for t in group if t.clients]
        rows.append([
            label, _told([t.summary for t in group], "jain_updates", ".2f"), _told(unused, "clients", ".1f"),
            _told(found, "worst_tenth", ".3f"),
            *(_told([f.get(kind, {}) for f in found], "accuracy", ".3f") for kind in ("participants", "others")),
            _told(found, "jain_accuracy", ".3f"), _told(found, "generalisation_gap", ".3f"),
            _told(own, "accuracy", ".3f"), _told(own, "worst_tenth", ".3f"),
        ])  # fmt: skip
    local = (
        " Worst 10 %, participants (clients whose updates were merged) and others: accuracy of the final global model "
        "on the clients' own training data. Gap: participants' accuracy over all their samples minus the test accuracy."
        if any(t.summary.get("local") for group in groups.values() for t in group)
        else ""
    )
    personal = (
        " Personal: accuracy of the clients' own models, as each came with its last update, on data of the client's "
        "that it does not train on."
        if any(t.summary.get("personal") for group in groups.values() for t in group)
        else ""
    )
    note = f"Jain's index is 1 when all clients have the same, 1/n when one of n has all{_over(groups)}."
    return _known(head, rows, f"{note}{local}{personal}")


def pruning(groups: Groups) -> Table:
    """How much of the model clients had, and how many clients each weight."""
    head = ("method", "mean density", "density at the end", "covering, least", "covering, mean")
    keys = (("mean_density", ".2f"), ("final_density", ".2f"), ("least_covering_index", ".1f"),
            ("mean_covering_index", ".1f"))  # fmt: skip
    rows = [[label, *(_told([t.summary for t in group], *key) for key in keys)] for label, group in groups.items()]
    note = (
        f"Density: mean over the updates used; at the end: over the clients, each by its last task{_over(groups)}. "
        "Covering: the minimum covering index of a merge, how many of its updates hold the weight that fewest hold; "
        "least and mean over the merges of a run."
    )
    return _known(head, rows, note)


def runs(groups: Groups) -> Table:
    """Every run, with what tells it from the others."""
    head = ("method", "seed", "pacing", "versions", "covering, least", "covering, mean", "wall time", "model sha256")
    rows = [
        [label, str(t.seed), pacing(t.config["pacing"]), str(t.summary["versions"]),
         _told([t.summary], "least_covering_index", ".0f"), _told([t.summary], "mean_covering_index", ".1f"),
         duration(t.summary["wall_seconds"]), str(t.summary["model_sha256"])[:12]]
        for label, group in groups.items() for t in group
    ]  # fmt: skip
    return _known(head, rows, "")


def pacing(spec: Any) -> str:
    """A pacing with what was said about it."""
    fields = {k: v for k, v in spec.items() if k != "name" and v != inf} if isinstance(spec, dict) else {}
    return f"{name(spec)} ({', '.join(f'{k} {v}' for k, v in fields.items())})" if fields else name(spec)


def spread(values: Sequence[float], form: str, factor: float = 1.0) -> str:
    """The mean; of several values with their standard deviation."""
    some = [v / factor for v in values]
    return f"{fmean(some):{form}}" + (f" ± {stdev(some):{form}}" if len(some) > 1 else "")


def _cost(group: Sequence[Trace], axis: str, target: float) -> str:
    came = [point for t in group if (point := t.first(target)) is not None]
    found = [cost for point in came if (cost := getattr(point, axis)) is not None]
    share = f" ({len(found)} of {len(group)})" if len(found) < len(group) else ""
    return _scaled(axis, found) + share if found else NONE


def _known(head: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> Table:
    """The table without the columns that nobody knows anything for."""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] != NONE for row in rows)]
    return Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows], note)


def _told(rows: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return spread(values, form) if values else NONE


def _energy(rows: Sequence[Mapping[str, Any]], states: Sequence[str]) -> str:
    sums = [sum(j[s] for j in row["joules"].values() for s in states) for row in rows if row.get("joules")]
    return _scaled("joules", sums) if sums else NONE


def _scaled(kind: str, values: Sequence[float]) -> str:
    factor, symbol = unit(kind, fmean(values))
    return f"{spread(values, '.1f', factor)} {symbol}"


def _over(groups: Groups) -> str:
    return "; mean ± standard deviation over seeds" if any(len(group) > 1 for group in groups.values()) else ""
