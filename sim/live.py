"""A run as it happens: a table that redraws itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sim.tally import Tally

REDRAW = 0.2  # seconds of wall clock between two pictures


class Watch:
    """Call it with every event; use it as a context manager."""

    def __init__(self, title: str, console: Console | None = None):
        self._title, self._console = title, console or Console()
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None
        self._drawn = 0.0

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Mapping[str, Any], tally: Tally) -> None:
        if self._live and time.monotonic() - self._drawn > REDRAW:
            self._drawn = time.monotonic()
            self._live.update(_picture(self._title, tally), refresh=True)
        elif not self._live and event["kind"] == "evaluation":
            self._console.print(_line(tally), highlight=False, soft_wrap=True)


def summary(console: Console, result: Mapping[str, Any], folder: object) -> None:
    """The end of a run, against what the dense model would have cost."""
    t = Table(title=f"{result['method']} · {result['pacing']} · seed {result['seed']}", show_header=False)
    saved = 100 * (1 - result["bytes_against_dense"])
    for row in (
        ("test accuracy", f"{result['test_accuracy']:.4f}"),
        ("validation accuracy", f"{result['validation_accuracy']:.4f} (best {result['best_validation_accuracy']:.4f})"),
        ("versions", f"{result['versions']}"),
        ("virtual time", duration(result["virtual_seconds"])),
        ("wall time", f"{result['wall_seconds']:.1f} s"),
        ("updates", f"{result['client_updates']} used, {result['failed_updates']} not"),
        ("updates by class", ", ".join(f"{k} {v}" for k, v in result["updates_by_class"].items())),
        ("bytes down + up", f"{size(result['bytes_down'])} + {size(result['bytes_up'])}"),
        ("against dense", f"{saved:.0f} % {'fewer' if saved >= 0 else 'more'} bytes for as many updates"),
        ("density", f"mean {result['mean_density']:.2f}, at the end {result['final_density']:.2f}"),
        ("model sha256", result["model_sha256"]),
        ("run folder", str(folder)),
    ):
        t.add_row(*row)
    console.print(t)


def duration(seconds: float) -> str:
    """Seconds as 12.3 s, 4.5 min or 6.7 h."""
    for limit, unit, by in ((120.0, "s", 1.0), (7200.0, "min", 60.0)):
        if seconds < limit:
            return f"{seconds / by:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes as 12.3 kB, MB or GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _picture(title: str, t: Tally) -> Table:
    table = Table(title=title)
    for heading in ("version", "virtual time", "validation", "in flight", "staleness", "updates", "down", "up"):
        table.add_column(heading, justify="right")
    table.add_column("density by device class")
    table.add_row(
        str(t.version),
        duration(t.at),
        f"{t.scores.get('validation_accuracy', 0):.3f}",
        str(t.in_flight),
        f"{t.staleness:.1f}",
        str(t.updates),
        size(t.bytes_down),
        size(t.bytes_up),
        "\n".join(f"{name:<16}{'█' * round(20 * d):<20} {d:.2f}" for name, d in sorted(t.density.items())),
    )
    return table


def _line(t: Tally) -> str:
    densities = " ".join(f"{name}={d:.2f}" for name, d in sorted(t.density.items()))
    return (
        f"version {t.version:>4}  {duration(t.at):>9}  validation {t.scores['validation_accuracy']:.3f}  "
        f"in flight {t.in_flight:>3}  staleness {t.staleness:>4.1f}  down {size(t.bytes_down)}  up {size(t.bytes_up)}"
        f"  density {densities}"
    )
