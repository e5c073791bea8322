"""A run as it happens: a picture that is drawn anew on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prfl.tally import Tally

REDRAW = 0.2  # seconds of wall clock between two pictures


class Watch:
    """Call it with every event; use it as a context manager. `versions`: how many the run is to have, at most."""

    def __init__(self, title: str, versions: float, console: Console):
        self._title, self._versions, self._console = title, versions, console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._began = self._drawn = time.monotonic()
        self._latest: Tally | None = None

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._draw()
        if self._live:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any], tally: Tally) -> None:
        self._latest = tally
        if self._live and time.monotonic() - self._drawn > REDRAW:
            self._draw()
        elif not self._live and event["kind"] == "evaluation":
            plain(self._console, _line(tally))

    def _draw(self) -> None:
        if self._live and self._latest:
            self._drawn = time.monotonic()
            picture = _picture(self._title, self._latest, self._versions, self._drawn - self._began)
            self._live.update(picture, refresh=True)


def plain(console: Console, line: str) -> None:
    """The line as it is, however long."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def summary(console: Console, result: Mapping[str, Any], folder: object) -> None:
    """The end of a run, against what the dense model would have cost: a table on a terminal, else a line a row."""
    title = f"{result['method']}, {result['pacing']}, {result['data']}, seed {result['seed']}"
    rows = dict(_rows(result, folder))
    if not console.is_terminal:
        plain(console, title)
        for name, value in rows.items():
            plain(console, f"  {name:<20} {value}")
        return
    table = Table(title=title, show_header=False, box=box.ROUNDED)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, markup=False, highlight=False)


def _rows(result: Mapping[str, Any], folder: object) -> Iterator[tuple[str, str]]:
    best, saved = result["best_validation_accuracy"], 100 * (1 - result["bytes_against_dense"])
    yield "test accuracy", f"{result['test_accuracy']:.4f}"
    yield "validation accuracy", f"{result['validation_accuracy']:.4f} (best {best:.4f})"
    yield "versions", f"{result['versions']}" + (", stopped early" if result["stopped"] else "")
    yield "time" if "poll_seconds_mean" in result else "virtual time", duration(result["virtual_seconds"])
    yield "wall time", duration(result["wall_seconds"])
    yield "updates", f"{result['client_updates']} used, {result['failed_updates']} not"
    yield "updates by class", ", ".join(f"{k} {v}" for k, v in result["updates_by_class"].items()) or "none"
    yield "bytes down + up", f"{size(result['bytes_down'])} + {size(result['bytes_up'])}"
    yield "against dense", f"{abs(saved):.0f} % {'fewer' if saved >= 0 else 'more'} bytes for as many updates"
    yield "density", f"mean {result['mean_density']:.2f}, at the end {result['final_density']:.2f}"
    yield "model sha256", result["model_sha256"]
    yield "run folder", str(folder)


def duration(seconds: float) -> str:
    """Seconds as 12.3 s, 4.5 min or 6.7 h."""
    for limit, unit, by in ((120.0, "s", 1.0), (7200.0, "min", 60.0)):
        if seconds < limit:
            return f"{seconds / by:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as 12.3 kB, MB or GB."""
    for by, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= by:
            return f"{count / by:.1f} {unit}"
    return f"{count:.0f} B"


def _picture(title: str, t: Tally, versions: float, wall: float) -> Panel:
    """Numbers on the left, a bar for the density of every device class on the right; 100 columns are enough."""
    numbers = Table.grid(padding=(0, 2))
    numbers.add_column(style="bold", no_wrap=True)
    numbers.add_column(no_wrap=True, min_width=30)
    numbers.add_row("version", f"{t.version}" + (f" of {versions:.0f}" if versions < float("inf") else ""))
    numbers.add_row("time", f"{duration(t.at)} virtual, {duration(wall)} here")
    numbers.add_row("validation", f"{t.scores.get('validation_accuracy', 0):.3f} (best {t.best:.3f})")
    numbers.add_row("updates", f"{t.updates} used, {t.failed} not")
    numbers.add_row("in flight", f"{len(t.at_work)}, staleness {t.staleness:.1f}")
    numbers.add_row("down + up", f"{size(t.bytes_down)} + {size(t.bytes_up)}")
    densities = Table.grid(padding=(0, 1))
    densities.add_column(no_wrap=True, max_width=16, overflow="ellipsis")
    densities.add_column(width=16)
    densities.add_column(justify="right")
    densities.add_row("[bold]density by class")
    for name, density in sorted(t.density.items()):
        densities.add_row(
            Text(name),
            ProgressBar(1.0, density, width=16, complete_style="cyan", finished_style="cyan"),
            f"{density:.2f}",
        )
    both = Table.grid(padding=(0, 3))
    both.add_row(numbers, densities)
    return Panel(both, title=f"[bold]{title}", title_align="left", expand=False)


def _line(t: Tally) -> str:
    densities = " ".join(f"{name}={density:.2f}" for name, density in sorted(t.density.items()))
    return (
        f"version {t.version:>4}  {duration(t.at):>9}  validation {t.scores['validation_accuracy']:.3f}  "
        f"in flight {len(t.at_work):>3}  staleness {t.staleness:>4.1f}  down {size(t.bytes_down):>8}  "
        f"up {size(t.bytes_up):>8}  density {densities}"
    ).rstrip()
