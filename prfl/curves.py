"""From traces to what is drawn: means and bands over seeds, courses by device class, rows of a Gantt chart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from prfl.figures import Line, Stay
from prfl.traces import Span, Trace

POINTS = 80  # of a mean curve
BINS = 40  # of a course over time
ROWS = 50  # clients in a Gantt chart
CLASSES = 12  # device classes told apart; more are drawn as one
TASKS = 15.0  # median task durations in a Gantt chart


def accuracy(group: Sequence[Trace], axis: str, colour: int) -> Line | None:
    """Validation accuracy against `axis` of a Point: one run as it is, several as mean, lowest and highest.

    Between evaluations it is interpolated, for the drawing. None: some run does not know what it cost.
    """
    runs = [([getattr(p, axis) for p in t.points], [p.accuracy for p in t.points]) for t in group]
    if any(not xs or None in xs for xs, _ in runs):
        return None
    if len(runs) == 1:
        return Line(colour, *runs[0])
    grid = np.linspace(max(xs[0] for xs, _ in runs), min(xs[-1] for xs, _ in runs), POINTS)
    ys = np.array([np.interp(grid, x, y) for x, y in runs])
    return Line(colour, grid.tolist(), ys.mean(0).tolist(), ys.min(0).tolist(), ys.max(0).tolist())


def scaled(line: Line, factor: float) -> Line:
    """The line with its x in another unit."""
    return replace(line, x=[v / factor for v in line.x])


def counted(trace: Trace) -> dict[str, int]:
    """Clients by device class."""
    return dict(sorted(Counter(str(row["class"]) for row in trace.clients.values()).items()))


def classes(groups: Mapping[str, Sequence[Trace]]) -> list[str]:
    """All device classes; one empty name where there are too many to tell them apart."""
    found = sorted({str(row["class"]) for group in groups.values() for t in group for row in t.clients.values()})
    return found if len(found) <= CLASSES else [""]


def by_class(
    groups: Mapping[str, Sequence[Trace]], value: Callable[[Trace, int], float | None]
) -> dict[str, dict[tuple[str, int], list[float]]]:
    """Values of all clients of all seeds, by device class and by label with its colour; no empty ones."""
    out: dict[str, dict[tuple[str, int], list[float]]] = {}
    for device in classes(groups):
        for i, (label, group) in enumerate(groups.items()):
            found = [value(t, c) for t in group for c in t.clients if device in ("", t.device(c))]
            if some := [v for v in found if v is not None]:
                out.setdefault(device or "all devices", {})[label, i] = some
    return out


def over_time(
    groups: Mapping[str, Sequence[Trace]],
    value: Callable[[Span], float | None],
    when: Callable[[Span], float],
    end: float,
) -> dict[str, list[Line]]:
    """Means of a value of the tasks over time, all seeds together, by device class: a line for every group."""
    out: dict[str, list[Line]] = {}
    for device in classes(groups):
        for i, group in enumerate(groups.values()):
            spans = [s for t in group for s in t.spans if device in ("", t.device(s.client))]
            pairs = [(when(s), v) for s in spans if (v := value(s)) is not None]
            if line := _means(pairs, end, i):
                out.setdefault(device or "all devices", []).append(line)
    return out


def coverage(group: Sequence[Trace], colour: int, end: float) -> Line | None:
    """Mean coverage of the merges over time."""
    return _means([pair for t in group for pair in t.coverage], end, colour)


def _means(pairs: Sequence[tuple[float, float]], end: float, colour: int) -> Line | None:
    """Means in equal stretches of time, at the mean time of what fell into each."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for at, value in pairs:
        bins.setdefault(min(int(at / end * BINS), BINS - 1) if end else 0, []).append((at, value))
    if not bins:
        return None
    means = [np.mean(bins[i], axis=0) for i in sorted(bins)]
    return Line(colour, [float(m[0]) for m in means], [float(m[1]) for m in means])


def horizon(traces: Sequence[Trace]) -> float:
    """How many seconds of these runs are shown task by task: so many that the tasks can be told apart."""
    usual = median(s.end - s.start for t in traces for s in t.spans)
    return min(max(s.end for t in traces for s in t.spans), TASKS * usual)


def rows(trace: Trace) -> list[int]:
    """The clients of a Gantt chart by device class, evenly taken out of all where they are too many."""
    order = sorted(trace.clients, key=lambda c: (trace.device(c), c))
    return [order[int(i)] for i in np.linspace(0, len(order) - 1, min(ROWS, len(order)))]


def stays(trace: Trace, end: float, factor: float) -> tuple[list[str], list[Stay]]:
    """Labels of the rows, and the tasks in them up to `end`, in the unit of the figure."""
    place = {client: row for row, client in enumerate(rows(trace))}
    some = [s for s in trace.spans if s.client in place and s.start < end]
    found = [Stay(place[s.client], s.start / factor, min(s.end, end) / factor, not s.used) for s in some]
    return [trace.device(client) for client in place], found
