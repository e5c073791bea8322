"""Figures as inline SVG: text stays text, colours come from the page (`prfl.page`), so that they follow its scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 300, 210
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 26, 40
COLOURS = 8
GAP = 20  # around and between the panels of a sheet

UNITS: dict[str, tuple[tuple[float, str], ...]] = {
    "seconds": ((120.0, "s"), (7200.0, "min"), (float("inf"), "h")),
    "bytes": ((1e6, "kB"), (1e9, "MB"), (float("inf"), "GB")),
    "joules": ((1e3, "J"), (1e6, "kJ"), (float("inf"), "MJ")),
}
FACTORS = {"s": 1.0, "min": 60.0, "h": 3600.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "J": 1.0, "kJ": 1e3, "MJ": 1e6}
"""Of units as they are written, in seconds, bytes and joules."""


def unit(kind: str, top: float) -> tuple[float, str]:
    """Factor and name of the unit in which values up to `top` read well."""
    name = next(name for limit, name in UNITS[kind] if top < limit or limit == float("inf"))
    return FACTORS[name], name


@dataclass(frozen=True)
class Line:
    """A curve, `colour` from 0; `low` and `high` bound the band around it, if there is one."""

    colour: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Bar:
    """A row of `bars`. `reach`: lowest and highest value, drawn as a whisker."""

    label: str
    colour: int
    value: float
    reach: tuple[float, float] | None = None


@dataclass(frozen=True)
class Stay:
    """A stretch of time in a row of a `gantt`; what came to nothing is `faint`."""

    row: int
    start: float
    end: float
    faint: bool = False


@dataclass(frozen=True)
class Axis:
    """What is on an axis, in words, with the values that must be on it."""

    title: str
    low: float | None = None
    high: float | None = None
    marks: Sequence[float] = field(default_factory=tuple)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, in steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / about
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def lines(title: str, series: Sequence[Line], x: Axis, y: Axis) -> str:
    """Curves with bands; `y.marks` are thin lines across. Both axes start at round numbers."""
    xs = [v for s in series for v in s.x] or [0.0, 1.0]
    ys = [v for s in series for v in (*s.y, *s.low, *s.high)] or [0.0, 1.0]
    along = ticks(min(xs) if x.low is None else x.low, max(xs) if x.high is None else x.high, 4)
    up = ticks(min(ys) if y.low is None else y.low, max(ys) if y.high is None else y.high)
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    top = max(xs) if x.high is None else x.high  # the curves use the whole width; ticks stay round
    along = [t for t in along if t <= top * (1 + 1e-9)] or along[:1]
    span, rise = max(top - along[0], 1e-12), up[-1] - up[0]

    def at(v: float) -> float:
        return LEFT + (v - along[0]) / span * (right - LEFT)

    def height(v: float) -> float:
        return bottom - (v - up[0]) / rise * (bottom - TOP)

    out = [_line("grid", LEFT, height(v), right, height(v)) for v in up]
    out += [_text("tick end", LEFT - 6, height(v) + 3.5, _number(v, up)) for v in up]
    out += [_line("axis", at(v), bottom, at(v), bottom + 4) for v in along]
    out += [_text("tick middle", at(v), bottom + 15, _number(v, along)) for v in along]
    out += [_line("mark", LEFT, height(v), right, height(v)) for v in y.marks if up[0] <= v <= up[-1]]
    for s in series:
        if s.low and s.high:
            edge = [*zip(s.x, s.high, strict=True), *reversed([*zip(s.x, s.low, strict=True)])]
            points = " ".join(f"{at(a):.1f},{height(b):.1f}" for a, b in edge)
            out.append(f'<polygon class="band c{s.colour % COLOURS}" points="{points}"/>')
    for s in series:
        points = " ".join(f"{at(a):.1f},{height(b):.1f}" for a, b in zip(s.x, s.y, strict=True))
        out.append(f'<polyline class="line c{s.colour % COLOURS} {_dash(s.colour)}" points="{points}"/>')
        if len(s.x) == 1:
            out.append(
                f'<circle class="dot c{s.colour % COLOURS}" cx="{at(s.x[0]):.1f}" cy="{height(s.y[0]):.1f}" r="3"/>'
            )
    out.append(_line("axis", LEFT, bottom, right, bottom))
    out.append(_text("label middle", (LEFT + right) / 2, HEIGHT - 6, x.title))
    return _svg(title, f"{y.title} against {x.title}", out, HEIGHT)


def bars(title: str, rows: Sequence[Bar], x: Axis) -> str:
    """Horizontal bars from zero, with their values; whiskers for their reach."""
    tops = [max(b.value, b.reach[1] if b.reach else 0.0) for b in rows]
    along = ticks(0.0, max([*tops, x.high or 0.0, 1e-9]), 4)
    left, right = 14 + min(110, 6.2 * max((len(b.label) for b in rows), default=0)), WIDTH - 40
    bottom = TOP + 22 * len(rows)

    def at(v: float) -> float:
        return left + v / along[-1] * (right - left)

    out = [_line("grid", at(v), TOP, at(v), bottom) for v in along]
    out += [_text("tick middle", at(v), bottom + 15, _number(v, along)) for v in along]
    for i, b in enumerate(rows):
        y = TOP + 22 * i + 4
        out.append(_text("tick end", left - 6, y + 11, b.label))
        wide = max(at(b.value) - left, 0.5)
        out.append(
            f'<rect class="fill c{b.colour % COLOURS}" x="{left:.1f}" y="{y}" width="{wide:.1f}" height="14" rx="1.5"/>'
        )
        if b.reach and b.reach[0] < b.reach[1]:
            out.append(_line("whisker", at(b.reach[0]), y + 7, at(b.reach[1]), y + 7))
        out.append(_text("value end", WIDTH, y + 11, f"{b.value:.3g}"))
    out.append(_line("axis", left, TOP, left, bottom))
    out.append(_text("label middle", (left + right) / 2, bottom + 32, x.title))
    return _svg(title, x.title, out, bottom + 40)


def gantt(title: str, colour: int, labels: Sequence[str], stays: Sequence[Stay], x: Axis) -> str:
    """A row for everybody, named where its label differs from the one above; a bar for every stay."""
    thick = 7 if len(labels) <= 30 else 5
    bottom, right = TOP + thick * len(labels), WIDTH - RIGHT
    left = 14 + min(90, 6.2 * max((len(x) for x in labels), default=0))
    top = max([s.end for s in stays] + [x.high or 0.0]) or 1.0
    along = [t for t in ticks(0.0, top, 4) if t <= top * (1 + 1e-9)]

    def at(v: float) -> float:
        return left + v / top * (right - left)

    out = [_line("grid", at(v), TOP, at(v), bottom) for v in along]
    out += [_text("tick middle", at(v), bottom + 15, _number(v, along)) for v in along]
    for i, label in enumerate(labels):
        if i == 0 or label != labels[i - 1]:
            out.append(_text("tick end", left - 6, TOP + thick * i + 8, label))
            if i:
                out.append(_line("grid", left - 4, TOP + thick * i, right, TOP + thick * i))
    for kind, some in (("fill", [s for s in stays if not s.faint]), ("hollow", [s for s in stays if s.faint])):
        marks = (
            f"M{at(s.start):.1f} {TOP + thick * s.row + 1}h{max(at(s.end) - at(s.start) - 0.4, 0.4):.1f}v{thick - 2}"
            f"H{at(s.start):.1f}z"
            for s in some
        )
        if path := "".join(marks):
            out.append(f'<path class="{kind} c{colour % COLOURS}" d="{path}"/>')
    out.append(_line("axis", left, bottom, right, bottom))
    out.append(_text("label middle", (left + right) / 2, bottom + 32, x.title))
    return _svg(title, f"who trained when, {x.title}", out, bottom + 40)


def legend(names: Mapping[str, int]) -> str:
    """Names with their colours, as HTML."""
    key = '<svg class="key" viewBox="0 0 22 8" aria-hidden="true"><path class="line c{0} {1}" d="M1 4H21"/></svg>'
    items = (f"<span>{key.format(c % COLOURS, _dash(c))}{escape(name)}</span>" for name, c in names.items())
    return f'<p class="legend">{" ".join(items)}</p>'


def sheet(panels: Sequence[str], names: Mapping[str, int], style: str) -> str:
    """Panels of `lines` side by side under their legend: an SVG file that is whole by itself, `style` included."""
    wide = (WIDTH + GAP) * len(panels) - GAP
    out, x, y = [], 0.0, 0.0
    for name, colour in names.items():
        width = 42 + 6.2 * len(name)
        x, y = (x, y) if x + width <= wide else (0.0, y + 18)
        out.append(f'<path class="line c{colour % COLOURS} {_dash(colour)}" d="M{x:.1f} {y + 9:g}h22"/>')
        out.append(_text("value", x + 27, y + 13, name))
        x += width
    y += 32 if names else 0
    place = '<svg x="{}" y="{:g}" width="{}" height="{}" '
    for i, panel in enumerate(panels):
        out.append(panel.replace('<svg class="figure" ', place.format(i * (WIDTH + GAP), y, WIDTH, HEIGHT), 1))
    box = f"{-GAP} {-GAP} {wide + 2 * GAP} {y + HEIGHT + 2 * GAP:g}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" font-family="system-ui, sans-serif">'
    ground = f'<rect x="{-GAP}" y="{-GAP}" width="100%" height="100%" fill="var(--ground)"/>'
    return "".join([head, f"<style>{style}</style>", ground, *out, "</svg>\n"])


def _dash(colour: int) -> str:
    """Beyond the colours there are, lines are told apart by dashes."""
    return ("", "dashed", "dotted")[min(colour // COLOURS, 2)]


def _svg(title: str, about: str, content: Sequence[str], height: float) -> str:
    head = (
        f'<svg class="figure" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(f"{title}: {about}")}">'
    )
    return "".join([head, _text("title", 0, 13, title), *content, "</svg>"])


def _text(kind: str, x: float, y: float, text: str) -> str:
    short = text if len(text) <= 60 else text[:57] + "..."
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(short)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _number(value: float, among: Sequence[float]) -> str:
    """A tick's value with as many decimals as the step between ticks needs."""
    step = abs(among[1] - among[0]) if len(among) > 1 else abs(value) or 1.0
    return f"{value:.{max(0, -floor(log10(step) + 1e-9))}f}"
