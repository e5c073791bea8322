"""The commands. Everything is imported when it is needed, so that `prfl --help` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import click
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from deploy.cli import HOME
from deploy.cli import app as deploy  # light as well
from prfl.cli_devices import app as devices
from prfl.cli_devices import wide

if TYPE_CHECKING:
    from deploy.home import Home
    from prfl.sinks import Sinks
    from prfl.tally import Tally

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.add_typer(deploy, name="deploy")
app.add_typer(devices, name="devices")

LOG = Annotated[list[str] | None, typer.Option(metavar="SINK", help="tensorboard, mlflow or wandb; may be repeated.")]
TARGETS = Annotated[
    str, typer.Option(metavar="A,A,...", help="Accuracies whose cost is told; default: from the curves.")
]
N = TypeVar("N", int, float)
WORKERS = Annotated[
    Literal["processes", "ray", "serial"] | None,
    typer.Option(help="Where clients train; default: in processes of this machine, on Ray for a cluster or with cuda."),
]
NUM_WORKERS = Annotated[int, typer.Option(min=0, metavar="N", help="So many; 0: one a core, of the whole cluster.")]
RAY_ADDRESS = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Of a Ray cluster that runs already, or auto for this machine's."),
]
PROFILES = Annotated[Path | None, typer.Option(metavar="FILE", help="Device profiles whose watts count.")]
DEVICE = Annotated[str, typer.Option(metavar="cpu|cuda", help="What clients train on.")]
GPUS = Annotated[float, typer.Option(metavar="SHARE", help="Of a GPU that each Ray actor takes, with cuda.")]


@app.callback()
def _prfl() -> None:
    """Federated learning that prunes."""


@app.command()
def run(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [KEY=VALUE]...")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Run folder; default: a new one in runs/.")] = None,
    workers: WORKERS = None,
    num_workers: NUM_WORKERS = 0,
    ray_address: RAY_ADDRESS = None,
    device: DEVICE = "cpu",
    gpus_per_worker: GPUS = 1.0,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where data sets lie.")] = None,
    home: Annotated[Path, typer.Option(metavar="DIR", envvar="PRFL_HOME", help="Of the server, for real devices.")] = (
        HOME
    ),
    log: LOG = None,
) -> None:
    """Run an experiment, in simulation or, where it says devices: real, on the nodes of `prfl deploy server`.

    EXPERIMENT is a YAML file or the name of one that ships; without it the default one runs.

    KEY=VALUE changes a field, as in: prfl run stop.versions=50 method=fedbuff pacing.goal=5
    """
    from prfl import config, sinks, store
    from sim import experiments

    path, changes = experiments.chosen(arguments or [])
    experiment = config.load(path, changes)
    folder = store.free(out, experiment.name)
    told = sinks.Sinks(log or [], folder, config.plain(experiment.model_dump()))
    console = Console(highlight=False)
    parts = (experiment.method, experiment.pacing, experiment.data.set)
    title = "{}, {}, {}, {} clients, seed {}".format(*map(config.name, parts), experiment.data.clients, experiment.seed)
    console.print(f"{title}: {folder}", markup=False, soft_wrap=True)
    if isinstance(experiment.devices, config.Real):
        from deploy import submit
        from deploy.home import Home

        here = Home.of(home)
        _followed(here, submit.submit(here, experiment, folder, data_dir), folder, told)
        return

    from prfl import live
    from sim import pools  # torch comes with them, after the first line
    from sim.run import simulate

    place = pools.place(workers, num_workers, ray_address, device, gpus_per_worker)
    with pools.kept(place) as pool, told, live.Watch(title, experiment.stop.versions, console) as watch:
        result = simulate(experiment, folder, pool=pool, data_dir=data_dir, watch=_both(watch, told))
        told.ended(result)
    _shown(result, folder)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    home: Annotated[Path, typer.Option(metavar="DIR", envvar="PRFL_HOME", help="Of the server.")] = HOME,
    log: LOG = None,
) -> None:
    """Go on with a run on real devices that was broken off, or follow one that is under way."""
    from deploy import submit
    from deploy.home import Home
    from prfl import config, sinks

    here = Home.of(home)
    told = sinks.Sinks(log or [], folder, config.plain(submit.experiment(folder).model_dump()) if log else {})
    number = submit.resume(here, folder)
    if number is None:
        print(f"{folder} has come to its end")
    else:
        _followed(here, number, folder, told)


def _both(*hearers: Callable[[Mapping[str, Any], Tally], None]) -> Callable[[Mapping[str, Any], Tally], None]:
    """One that hears every event for all of them."""

    def hear(event: Mapping[str, Any], tally: Tally) -> None:
        for hearer in hearers:
            hearer(event, tally)

    return hear


def _followed(home: Home, number: int, folder: Path, told: Sinks) -> None:
    """Show a run on real devices until it ends."""
    from deploy import submit
    from prfl import config, live

    print(f"run {number} of {home.folder}", flush=True)
    parts = submit.experiment(folder)
    title = "{}, {}, {}, real devices, seed {}".format(
        *map(config.name, (parts.method, parts.pacing, parts.data.set)), parts.seed
    )
    try:
        with told, live.Watch(title, parts.stop.versions, Console(highlight=False)) as watch:
            result = submit.follow(home, number, folder, _both(watch, told))
            told.ended(result)
    except KeyboardInterrupt:
        print(f"\nthe run goes on; `prfl resume {folder}` follows it again, `prfl deploy stop {folder}` ends it")
        return
    _shown(result, folder)


def _shown(result: Mapping[str, Any], folder: Path) -> None:
    from prfl import live

    live.summary(Console(highlight=False), result, folder)
    if result["stopped"]:
        _complain(f"{result['stopped']}; {folder} is complete up to version {result['versions']}")
        raise typer.Exit(130 if result["interrupted"] else 1)


@app.command()
def compare(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[EXPERIMENT] [KEY=VALUE]... | RUN...", show_default=False)
    ] = None,
    methods: Annotated[str, typer.Option(metavar="A,B,...", help="Methods to run; without it, finished RUNs.")] = "",
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="Of the runs.")] = "1,2,3",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Runs and report; default: in runs/, of RUNs in comparison/.")
    ] = None,
    workers: WORKERS = None,
    num_workers: NUM_WORKERS = 0,
    ray_address: RAY_ADDRESS = None,
    device: DEVICE = "cpu",
    gpus_per_worker: GPUS = 1.0,
    usual_pacing: Annotated[bool, typer.Option("--usual-pacing", help="Each method in its paper's pacing.")] = False,
    targets: TARGETS = "",
    profiles: PROFILES = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where data sets lie.")] = None,
) -> None:
    """Compare methods: run each with every seed on the same data and devices, or take RUNs that there are.

    It goes on where it was broken off, and writes report.html and report.md.
    """
    from prfl import api, config, traces

    aims, power = _numbers("targets", targets, float), traces.powers(profiles)
    if not methods:
        if not arguments:
            raise ValueError("compare: --methods A,B,... to run, or the folders of finished runs")
        print(f"report: {api.gather([Path(a) for a in arguments], out or Path('comparison'), aims, power)}")
        return
    from sim import compare as comparing
    from sim import experiments, pools

    path, changes = experiments.chosen(arguments or [])
    experiment = config.load(path, changes)
    folder = comparing.place(experiment, out)
    todo = comparing.jobs(experiment, comparing.specs(methods), _numbers("seeds", seeds, int), folder, usual_pacing)
    print(f"{len(todo)} runs: {folder}", flush=True)
    with pools.kept(pools.place(workers, num_workers, ray_address, device, gpus_per_worker)) as pool:
        ended = []
        for outcome in comparing.run(todo, pool, data_dir):
            ended.append(outcome)
            print(f"{len(ended)}/{len(todo)} {outcome}", flush=True)
    found = api.gathered(ended, folder, aims, power)
    if found.report:
        print(f"report: {found.report}")
    if found.failed:
        _complain(f"failed: {', '.join(found.failed)}; the same command tries again")
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: report.html in RUN.")] = None,
    targets: TARGETS = "",
    profiles: PROFILES = None,
) -> None:
    """Write a report on one run: a page that is whole by itself, and the same as Markdown beside it."""
    from prfl import report as reporting
    from prfl import traces

    file = out or run / "report.html"
    _spared(file, run)
    trace = traces.read(run, traces.powers(profiles))
    beside = reporting.single(trace, _numbers("targets", targets, float)).write(file)
    print(f"report: {file} and {beside}")


def _spared(file: Path, run: Path) -> None:
    """Raises ValueError for a file of the run's own."""
    from prfl import store

    if file.resolve().parent == run.resolve() and file.name in store.OWN:
        raise ValueError(f"--out {file} is the run's own; choose another file")


def _numbers(what: str, text: str, kind: Callable[[str], N]) -> list[N]:
    """Numbers with commas between. Raises ValueError."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--{what}: numbers with commas between are wanted, got {text!r}") from None


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
    wide().print(t)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    form: Annotated[Literal["pt2", "onnx", "safetensors"], typer.Option("--format", help="Of the file.")] = "pt2",
    density: Annotated[float, typer.Option(metavar="D", help="Share of the model; the run's last ranking cuts.")] = 1.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: export-D.FORMAT in RUN.")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where data sets lie.")] = None,
) -> None:
    """Write a run's model as a file for devices: really smaller where channels are cut, and checked on test data."""
    import torch

    from clients import export as exporting
    from prfl.live import size
    from prfl.types import Work
    from strategies import judge, parts

    found = exporting.trained(run, data_dir)
    mask, model, test = found.mask(density), found.model, found.given.dataset.test
    file = out or run / f"export-{density:g}.{form}"
    _spared(file, run)
    plan = parts.of(found.experiment).method.work
    work = plan if isinstance(plan, Work) else plan(found.state.version if found.state else 0)
    if work.statistics == "static":
        model = found.calibrated(mask, judge.CALIBRATION)
        print("BatchNorm statistics are taken from training samples, as the method leaves them to the test")
    x, _ = test.batch(torch.arange(min(64, len(test))))
    made = exporting.export(model, mask, x, form, file, {**found.about, "density": density})
    print(f"{made.path}: {size(made.size)}, {made.kept:,} of {made.weights:,} values kept")
    if mask.bits:
        print("single weights are pruned: they are zero, and the model keeps its size")
    print(f"outputs as of the masked model within {made.difference:.1g} on {made.samples} test samples")


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


__all__ = ["app", "main"]
