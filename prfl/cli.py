"""The commands. Everything is imported when it is needed, so that `prfl --help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import click
import typer
from rich import box
from rich.console import Console
from rich.table import Table

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _prfl() -> None:
    """Federated learning that prunes."""


@app.command()
def run(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [KEY=VALUE]...")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run folder; default: a new one in runs/.")] = None,
    workers: Annotated[Literal["ray", "serial"], typer.Option(help="Where clients train.")] = "ray",
    num_workers: Annotated[int, typer.Option(min=0, metavar="N", help="Ray actors; 0: one a core.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where data sets lie.")] = None,
) -> None:
    """Run an experiment in simulation.

    EXPERIMENT is a YAML file or the name of one that ships; without it the default one runs.

    KEY=VALUE changes a field, as in: prfl run stop.versions=50 method=fedbuff pacing.goal=5
    """
    from prfl import config, store
    from sim import experiments

    path, changes = experiments.chosen(arguments or [])
    experiment = config.load(path, changes)
    folder = store.free(out, experiment.name)
    console = Console(highlight=False)
    parts = (experiment.method, experiment.pacing, experiment.data.set)
    title = "{}, {}, {}, {} clients, seed {}".format(*map(config.name, parts), experiment.data.clients, experiment.seed)
    console.print(f"{title}: {folder}", markup=False, soft_wrap=True)

    from prfl import live
    from sim import pools  # torch comes with them, after the first line
    from sim.run import simulate

    pool = pools.serial if workers == "serial" else pools.ray(num_workers or os.cpu_count() or 1)
    with live.Watch(title, experiment.stop.versions, console) as watch:
        result = simulate(experiment, folder, pool=pool, data_dir=data_dir, watch=watch)
    live.summary(console, result, folder)
    if result["stopped"]:
        _complain(f"{result['stopped']}; {folder} is complete up to version {result['versions']}")
        raise typer.Exit(130 if result["interrupted"] else 1)


@app.command()
def methods() -> None:
    """The methods: name, usual pacing, paper, parts."""
    from strategies import table

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("method", no_wrap=True)
    t.add_column("usual pacing", no_wrap=True)
    t.add_column("paper; density, saliency, merge, cut, remask", overflow="fold")
    for name, row in table.METHODS.items():
        t.add_row(name, row.pacing, f"{row.paper}\n{', '.join(table.described(row.make()))}")
    _wide().print(t)


@app.command()
def devices(
    profiles: Annotated[Path | None, typer.Option(metavar="FILE", help="Your own profiles, laid over these.")] = None,
) -> None:
    """The device profiles that simulation knows."""
    from prfl.live import size
    from sim import devices as known

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("device", no_wrap=True)
    for heading in ("GFLOP/s\nconv", "\nlinear", "\nmemory", "\ndown/s", "\nup/s", "start\ns", "busy\nW"):
        t.add_column(heading, justify="right", no_wrap=True)
    t.add_column("\nfigures", no_wrap=True)
    for d in known.load(profiles).values():
        rates = [f"{d.flops[kind] / 1e9:.1f}" if kind in d.flops else "none" for kind in ("conv", "linear")]
        links = size(d.memory), size(d.down), size(d.up)
        t.add_row(
            d.name, *rates, *links, f"{d.startup:g}", f"{d.watts.busy:g}", "measured" if d.measured else "estimated"
        )
    _wide().print(t)


def main() -> None:
    """The console script: a user's mistake is one line, not a traceback."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="prfl", standalone_mode=False))
    except click.ClickException as error:
        _complain(error.format_message())
    except OSError as error:
        _complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (ValueError, ImportError) as error:
        _complain(str(error))
    sys.exit(2)


def _complain(text: str) -> None:
    print(f"prfl: {' '.join(text.split())}", file=sys.stderr)


def _wide() -> Console:
    """Standard output; 100 columns where it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


__all__ = ["app", "main"]
