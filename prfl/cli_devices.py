"""The command `prfl devices`: profiles for simulations, and how to measure one of a device."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

app = typer.Typer()


@app.callback(invoke_without_command=True)
def devices(
    context: typer.Context,
    profiles: Annotated[Path | None, typer.Option(metavar="FILE", help="Your own profiles, laid over these.")] = None,
) -> None:
    """The device profiles that simulation knows; `measure` makes one of this device."""
    if context.invoked_subcommand is None:
        from sim import devices as known

        _profiles([vars(device) for device in known.load(profiles).values()])


@app.command()
def measure(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT] [KEY=VALUE]...")] = None,
    name: Annotated[str, typer.Option(help="Of the profile; default: this host's name.")] = "",
    link: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where `prfl devices link` runs.")] = "",
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server that this node dials.")] = "",
    home: Annotated[
        Path, typer.Option(metavar="DIR", envvar="PRFL_HOME", help="Holds the server's certificate, ca.crt.")
    ] = Path("~/.prfl"),
    key: Annotated[str, typer.Option(metavar="NAME", help="The key of this node, which must not run.")] = "",
    stock: Annotated[bool, typer.Option("--stock", help="For Flower's own node, not the warm one.")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each of some thirty runs.")] = 1.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: NAME.yaml; what it holds stays.")] = None,
    data_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where data sets lie.")] = None,
) -> None:
    """Measure this device as it trains an experiment, and write its profile for simulations.

    Without EXPERIMENT a small convolutional network is trained. Let nothing else run meanwhile.
    """
    import platform

    from deploy import measure as on_device
    from deploy.cli import PORT
    from deploy.link import address
    from prfl import config
    from sim import experiments

    path, changes = experiments.chosen(arguments) if arguments else (None, [])
    experiment = config.load(path, changes) if arguments else on_device.DEFAULT
    name = name or platform.node().partition(".")[0] or "device"
    found = on_device.measured(
        experiment,
        data_dir,
        tester=address(link) if link else None,
        server=address(server, PORT) if server else None,
        ca=home.expanduser() / "ca.crt",
        key=home.expanduser() / key if key else None,
        stock=stock,
        seconds=seconds,
        say=print,
    )
    file = out or Path(f"{name}.yaml")
    on_device.write(file, name, found)
    _profiles([{"name": name, **found}])
    missing = "" if link else "; down, up and latency are to be added, or measured with --link HOST:PORT"
    print(f"{name} is in {file}{missing}")


@app.command("link")
def link_test(
    host: Annotated[str, typer.Option(help="The address to listen on; default: all.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8090,
    minutes: Annotated[float, typer.Option(min=0.01, max=1440, help="It ends by itself.")] = 10,
) -> None:
    """Answer the link test of `prfl devices measure`, on the server, for some minutes.

    Whoever reaches the port can use the link meanwhile, and nothing else.
    """
    from contextlib import suppress

    from deploy import link

    with suppress(KeyboardInterrupt):
        link.serve(host, port, minutes)


def _profiles(rows: Sequence[Mapping[str, Any]]) -> None:
    """Device profiles as a table; a dash where one leaves a field out."""
    from prfl.live import size

    t = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    t.add_column("device", no_wrap=True)
    for heading in ("GFLOP/s\nconv", "\nlinear", "\nmemory", "\ndown/s", "\nup/s", "start\ns", "step\nms", "busy\nW"):
        t.add_column(heading, justify="right", no_wrap=True)
    t.add_column("\nfigures", no_wrap=True)
    for d in rows:
        rates = [f"{d['flops'][kind] / 1e9:.1f}" if kind in d["flops"] else "none" for kind in ("conv", "linear")]
        links = [size(d[key]) if key in d else "-" for key in ("memory", "down", "up")]
        watts = f"{d['watts'].busy:g}" if d.get("watts") else "-"
        times = f"{d['startup']:.3g}", f"{1000 * d['step']:.3g}"
        t.add_row(d["name"], *rates, *links, *times, watts, "measured" if d["measured"] else "estimated")
    wide().print(t)


def wide() -> Console:
    """Standard output; 100 columns where it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)
