"""What runs came to: one report for one run or for a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from statistics import fmean

from prfl import curves, tables
from prfl.config import name
from prfl.document import Document, Figure, Section, Table
from prfl.figures import Axis, Bar, Line, bars, gantt, lines, unit
from prfl.live import duration
from prfl.tables import WORDS, Groups
from prfl.traces import AXES, Trace


def make(groups: Groups, title: str, targets: Sequence[float] = (), warnings: Sequence[str] = ()) -> Document:
    """The report on these runs. `targets`: accuracies whose cost is told; none: chosen from the curves."""
    colours = {label: i for i, label in enumerate(groups)}
    aims = sorted(set(targets)) or chosen(groups)
    sections = (_ends(groups), _costs(groups, aims), _fairness(groups), _pruning(groups), _staleness(groups),
                _gantts(groups), _runs(groups))  # fmt: skip
    return Document(title, _lead(groups), [*warnings, *_unlike(groups)], [s for s in sections if s.blocks], colours)


def chosen(groups: Groups) -> list[float]:
    """Accuracies worth asking for, in whole percent: what every method comes near to, reaches, and only the best do."""
    best = [fmean(t.best for t in group) for group in groups.values()]
    wanted = (0.9 * min(best), min(best) - 0.005, max(best) - 0.01)
    return sorted({int(100 * x) / 100 for x in wanted if x >= 0.01})


def _lead(groups: Groups) -> str:
    first = next(iter(groups.values()))[0]
    data = first.config["data"]
    seeds = sorted({t.seed for group in groups.values() for t in group})
    kinds = curves.counted(first)
    some = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) if len(kinds) <= 6 else f"{len(kinds)} device classes"
    where = "real devices, so time is the wall clock's" if first.real else "simulated devices, so time is virtual"
    paces = {tables.pacing(group[0].config["pacing"]) for group in groups.values()}
    several = "Methods run in pacings of their own (see Runs), and are compared with them."
    pace = f"Pacing: {paces.pop()}{', for every method' if len(groups) > 1 else ''}." if len(paces) == 1 else several
    return (
        f"{_count(len(groups), 'method')}, {_count(len(seeds), 'seed')} ({', '.join(map(str, seeds))}). "
        f"{name(data['set'])}, split by {name(data['partition'])} over {data['clients']} clients ({some}); "
        f"{name(first.config['model'])}; {where}. {pace}"
    )


def _unlike(groups: Groups) -> list[str]:
    """What differs between the groups besides what is compared, and what went wrong."""
    configs = [group[0].config for group in groups.values()]
    keys = sorted({key for config in configs for key in config} - {"seed", "name", "method", "pacing", "metrics"})
    odd = [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]
    out = [f"These runs differ not only in method and pacing but also in: {', '.join(odd)}."] if odd else []
    seeds = {label: tuple(t.seed for t in group) for label, group in groups.items()}
    if len(set(seeds.values())) > 1:
        told = "; ".join(f"{label}: {', '.join(map(str, some))}" for label, some in seeds.items())
        out.append(f"Not every method has the same seeds ({told}).")
    early = [
        f"{label}, seed {t.seed} ({t.summary['stopped']})"
        for label, group in groups.items()
        for t in group
        if t.summary["stopped"]
    ]
    return out + ([f"Ended early, and counted as far as they came: {'; '.join(early)}."] if early else [])


def _ends(groups: Groups) -> Section:
    return Section("At the end", [tables.ends(groups)])


def _costs(groups: Groups, aims: Sequence[float]) -> Section:
    """Accuracy against what it cost."""
    panels = []
    for axis in AXES:
        found = [curves.accuracy(group, axis, i) for i, group in enumerate(groups.values())]
        if known := [line for line in found if line is not None]:
            factor, symbol = unit(axis, max(line.x[-1] for line in known))
            title, x = f"Accuracy by {WORDS[axis]}", Axis(f"{WORDS[axis]} ({symbol})", low=0.0)
            panels.append(lines(title, [_in(line, factor) for line in known], x, Axis("accuracy", marks=aims)))
    several = any(len(group) > 1 for group in groups.values())
    band = " Line: mean over the seeds. Band: from the lowest to the highest seed, as far as the shortest run."
    caption = (
        "Accuracy on the validation split against time, bytes down and up, and energy of computing, sending and "
        f"receiving, as far as they are known.{band if several else ''} Dotted: the targets of the table."
    )
    return Section("Accuracy and its cost", [Figure(panels, caption, picture="accuracy"), tables.costs(groups, aims)])


def _fairness(groups: Groups) -> Section:
    """Who works, and whom the model serves."""
    table = tables.fairness(groups)
    blocks: list[str | Table | Figure] = [table] if len(table.head) > 1 else []
    if updates := curves.by_class(groups, lambda t, c: float(t.clients[c]["updates"])):
        caption = "Updates merged per client, by device class: mean, and from the least to the most used client."
        blocks.append(Figure(_bars(updates, "updates per client"), caption, legend=False))
    if accuracy := curves.by_class(groups, lambda t, c: t.clients[c].get("accuracy")):
        caption = (
            "Accuracy of the final global model on the clients' own training data, by device class: mean, and from the "
            "worst to the best client."
        )
        blocks.append(Figure(_bars(accuracy, "accuracy on own data"), caption, legend=False))
    return Section("Fairness", blocks)


def _bars(found: Mapping[str, Mapping[tuple[str, int], Sequence[float]]], what: str) -> list[str]:
    """A panel for every device class, all to one scale."""
    top = max(max(values) for rows in found.values() for values in rows.values())
    return [
        bars(
            device, [Bar(label, i, fmean(v), (min(v), max(v))) for (label, i), v in rows.items()], Axis(what, high=top)
        )
        for device, rows in found.items()
    ]


def _pruning(groups: Groups) -> Section:
    """How much of the model clients get, and all of them together."""
    end = _end(groups)
    found = curves.over_time(groups, lambda s: s.density, lambda s: s.start, end)
    table = tables.pruning(groups)
    blocks: list[str | Table | Figure] = [table] if len(table.head) > 1 else []
    if found:
        caption = "Density asked of clients, by device class: mean over the tasks sent at that time."
        blocks.append(Figure(_courses(found, end, Axis("density", 0.0, 1.0)), caption))
    if covered := [line for i, g in enumerate(groups.values()) if (line := curves.coverage(g, i, end)) is not None]:
        caption = "Coverage: share of the weights that at least one of the updates of a merge held, mean over merges."
        blocks.append(Figure(_courses({"all devices": covered}, end, Axis("coverage", 0.0, 1.0)), caption))
    return Section("Density and coverage", blocks)


def _staleness(groups: Groups) -> Section:
    end = _end(groups)
    found = curves.over_time(groups, lambda s: float(s.staleness) if s.used else None, lambda s: s.end, end)
    top = max((y for some in found.values() for line in some for y in line.y), default=0.0)
    if not top:
        return Section("Staleness", ["No update was stale: every one was made from the version that it changed."])
    caption = "Versions merged between a task's sending and its arrival, by device class: mean over the updates used."
    return Section("Staleness", [Figure(_courses(found, end, Axis("staleness", 0.0, top)), caption)])


def _courses(found: Mapping[str, Sequence[Line]], end: float, y: Axis) -> list[str]:
    """A panel for every device class, all over the same time."""
    factor, symbol = unit("seconds", end)
    x = Axis(f"time ({symbol})", 0.0, end / factor)
    return [
        lines(f"{y.title.capitalize()}, {device}", [_in(line, factor) for line in some], x, y)
        for device, some in found.items()
    ]


def _gantts(groups: Groups) -> Section:
    """Who trained when, of one seed a method."""
    firsts = {i: group[0] for i, group in enumerate(groups.values()) if group[0].spans}
    if not firsts:
        return Section("Who trained when", [])
    end = curves.horizon(list(firsts.values()))
    factor, symbol = unit("seconds", end)
    labels = list(groups)
    panels = [
        gantt(labels[i], i, *curves.stays(trace, end, factor), Axis(f"time ({symbol})", high=end / factor))
        for i, trace in firsts.items()
    ]
    clients = max(len(t.clients) for t in firsts.values())
    some = f", {curves.ROWS} of {clients} clients" if clients > curves.ROWS else ""
    seeds = ", ".join(sorted({str(t.seed) for t in firsts.values()}))
    caption = (
        f"A row for every client, by device class{some}; a bar from a task's sending to its arrival. Pale: the update "
        f"was not used (failed, late or too stale). Seed {seeds}, the first {duration(end)}."
    )
    return Section("Who trained when", [Figure(panels, caption, legend=False)])


def _runs(groups: Groups) -> Section:
    """What exactly was run."""
    trace = next(iter(groups.values()))[0]
    first = trace.config
    stops = ", ".join(f"{value:g} {key}" for key, value in first["stop"].items() if value != inf)
    after = first.get("evaluate_after")
    apart = f", {after:g} s after the last time at the earliest" if after else ""
    again = "" if trace.real else " The same experiment and seed give the same model."
    text = (
        f"A run ends at {stops}{', whichever comes first' if ',' in stops else ''}. The validation split is scored "
        f"every {_count(first['evaluate_every'], 'version')}{apart}.{again}"
    )
    return Section("Runs", [text, tables.runs(groups)])


def _end(groups: Groups) -> float:
    return float(max(t.summary["virtual_seconds"] for group in groups.values() for t in group))


def _in(line: Line, factor: float) -> Line:
    return curves.scaled(line, factor)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def single(trace: Trace, targets: Sequence[float] = ()) -> Document:
    """The report on one run."""
    return make({trace.method: [trace]}, f"{trace.config['name']}: {trace.method}", targets)
