"""What there is to see of a deployment: its nodes, and of a run what every client did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deploy.admission import EXPELLED, connected
from deploy.credentials import admitted
from deploy.home import Home
from prfl import store
from prfl.live import duration, plain, size


@dataclass(frozen=True)
class Node:
    """`seen`: the latest heartbeat, seconds since 1970; None: never."""

    name: str
    id: int
    status: str
    seen: float | None


@dataclass
class Client:
    """What a client did in a run; seconds from sending a task to having its update."""

    device: str = ""  # class
    density: float | None = None
    seconds: list[float] = field(default_factory=list)
    down: int = 0
    up: int = 0
    used: int = 0
    failed: int = 0
    reason: str = ""


def nodes(home: Home) -> list[Node]:
    """The nodes that may join, by name; those without one are not ours. Raises ValueError, ConnectionError."""
    names = {key: name for name, key in admitted(home).items()}
    with connected(home) as registry:
        found = registry.nodes()
    listed = (Node(names.get(n.key, "-"), n.id, n.status, n.seen) for n in found if n.status != EXPELLED)
    return sorted(listed, key=lambda n: (n.name, n.id))


def clients(folder: Path) -> dict[int, Client]:
    """By client number, from the events of a run, which may still go on. Raises ValueError."""
    found: dict[int, Client] = {}
    for event in store.events(folder):
        if isinstance(number := event.get("client"), int):
            _count(found.setdefault(number, Client()), event)
    return dict(sorted(found.items()))


def show(console: Console, title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal, else a line a row with the columns under each other."""
    rows = list(rows)
    if console.is_terminal:
        table = Table(title=title, box=box.ROUNDED, title_justify="left")
        for number, heading in enumerate(headings):
            table.add_column(heading, no_wrap=number == 0, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False, highlight=False)
        return
    plain(console, title)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        plain(console, "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def show_nodes(console: Console, found: Sequence[Node]) -> None:
    online = sum(n.status == "online" for n in found)
    rows = ((n.name, str(n.id), n.status, _ago(n.seen)) for n in found)
    show(console, f"nodes: {online} of {len(found)} online", ("node", "node id", "status", "last seen"), rows)


def show_clients(console: Console, folder: Path, found: Mapping[int, Client]) -> None:
    headings = ("client", "device", "density", "round", "down", "up", "used", "failed", "last failure")
    show(console, f"run: {folder}", headings, (_row(number, c) for number, c in found.items()))


def _row(number: int, c: Client) -> tuple[str, ...]:
    mean = duration(sum(c.seconds) / len(c.seconds)) if c.seconds else "-"
    density = "-" if c.density is None else f"{c.density:.2f}"
    return str(number), c.device or "-", density, mean, size(c.down), size(c.up), str(c.used), str(c.failed), c.reason


def _count(client: Client, event: Mapping[str, Any]) -> None:
    if event["kind"] == "join":
        client.device = event["class"]
    elif event["kind"] == "send":
        client.density = event["density"]
    elif event["kind"] == "arrival":
        client.down += event["bytes_down"]
        client.up += event["bytes_up"]
        if event["used"]:
            client.used += 1
            client.seconds.append(event["seconds"])
        else:
            client.failed += 1
            client.reason = event["reason"] or "no reason given"


def _ago(seen: float | None) -> str:
    return "never" if seen is None else f"{duration(max(0.0, time.time() - seen))} ago"
