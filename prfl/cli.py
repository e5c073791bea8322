"""The commands. Everything is imported when it is needed, so that `prfl --help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _prfl() -> None:
    """Federated learning that prunes."""


@app.command()
def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT.yaml] [key=value ...]", help="An experiment and changes to its fields."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default: a new one below runs/.")] = None,
    workers: Annotated[Literal["ray", "serial"], typer.Option(help="Where clients train.")] = "ray",
    num_workers: Annotated[int, typer.Option(min=0, help="Ray actors; 0: one a core.")] = 0,
    data_dir: Annotated[Path | None, typer.Option(help="Where data sets lie.")] = None,
) -> None:
    """Run an experiment in simulation; without arguments the default one."""
    from prfl import config, store
    from sim import experiments, live, pools
    from sim.run import simulate

    path, changes = experiments.chosen(arguments or [])
    experiment = config.load(path, changes)
    folder = out or store.fresh(Path("runs"), experiment.name)
    if (folder / "events.jsonl").exists():
        raise config.ConfigError(f"{folder} holds a run already; choose another --out")
    console = Console()
    pool = pools.serial if workers == "serial" else pools.ray(num_workers or os.cpu_count() or 1)
    with live.Watch(experiment.name, console) as watch:
        result = simulate(experiment, folder, pool=pool, data_dir=data_dir, watch=watch)
    live.summary(console, result, folder)
    if result["interrupted"]:
        console.print(f"interrupted: {folder} is complete up to version {result['versions']}")
        raise typer.Exit(130)


@app.command()
def methods() -> None:
    """The methods: name, paper, parts."""
    from rich.table import Table

    from strategies import table

    t = Table("name", "paper", "density", "saliency", "merge", "cut", "remask")
    for name, row in table.METHODS.items():
        t.add_row(name, row.paper, *table.described(row.make()))
    Console().print(t)


@app.command()
def devices(profiles: Annotated[Path | None, typer.Option(help="More profiles, a YAML file.")] = None) -> None:
    """The device profiles that simulation knows."""
    from rich.table import Table

    from sim import devices as known
    from sim.live import size

    t = Table("name", "GFLOP/s conv", "linear", "memory", "down/s", "up/s", "start-up s", "watts busy", "figures")
    for d in known.load(profiles).values():
        rates = [f"{d.flops[kind] / 1e9:.1f}" for kind in ("conv", "linear")]
        links = size(d.memory), size(d.down), size(d.up)
        t.add_row(
            d.name, *rates, *links, f"{d.startup:g}", f"{d.watts.busy:g}", "measured" if d.measured else "estimated"
        )
    Console().print(t)


def main() -> None:
    """The console script: a user's mistake is one line, not a traceback."""
    try:
        app(standalone_mode=False)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"prfl: {error}")


__all__ = ["app", "main"]
