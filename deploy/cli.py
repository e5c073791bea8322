"""`prfl deploy`: certificates, keys, the server, nodes, and how they are. Everything is imported when it is needed."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploy.home import Home

app = typer.Typer(invoke_without_command=True, help="Real devices: certificates, keys, the server, nodes, status.")

PORT = 9443
WHERE = typer.Option("--home", envvar="PRFL_HOME", metavar="DIR", help="The folder of this deployment.")
Where = Annotated[Path, WHERE]
HOME = Path("~/.prfl")
PLAIN = "INSECURE: no encryption and no node authentication; anybody on this network can read and change everything"


@app.callback()
def _deploy(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def certs(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME_OR_ADDRESS...")] = None,
    home: Where = HOME,
    days: Annotated[int, typer.Option(min=1, metavar="N", help="How long the server's certificate lasts.")] = 365,
) -> None:
    """Make or renew the server's certificate; on the server.

    NAME_OR_ADDRESS: what nodes dial. A renewal may leave them out, and keeps the CA: nodes notice nothing.
    """
    from deploy import credentials

    here = _home(home)
    first = not here.ca.exists()
    covered = credentials.certify(here, names or [], days)
    print(f"{here.certificate} is for {', '.join(covered)}, {days} days")
    if first:
        print(f"made a CA; keep {here.ca_key} on this machine")
        print("copy its certificate to every node:")
        print(f"  ssh NODE mkdir -m 700 -p .prfl; scp {here.ca} NODE:.prfl/ca.crt")
        print("next: prfl deploy server")
    else:
        print("the CA is as it was, nodes keep their ca.crt; start the server again to use the new certificate")


@app.command()
def keys(names: Annotated[list[str], typer.Argument(metavar="NAME...")], home: Where = HOME) -> None:
    """Make the key of a node; on the node, or where you set nodes up."""
    from deploy import credentials

    here = _home(home)
    for name in names:
        public = credentials.make_key(here, name)
        print(f"{here.key(name)} is the key of {name}; it stays on that node")
        print("copy the public one to the server and admit it there:")
        print(f"  scp {public} SERVER:")
        print(f"  prfl deploy admit {public.name}")


@app.command()
def admit(files: Annotated[list[Path], typer.Argument(metavar="FILE.pub...")], home: Where = HOME) -> None:
    """Let nodes in, by their public keys; on the server, running or not."""
    from deploy import admission

    _print(admission.admit(_home(home), files))


@app.command()
def expel(name: str, home: Where = HOME) -> None:
    """Shut a node out for good; on the server, running or not. It needs a new key to come back."""
    from deploy import admission

    _print(admission.expel(_home(home), name))


@app.command()
def server(
    home: Where = HOME,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where nodes may come from.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65500, metavar="N")] = PORT,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS and node authentication.")] = False,
) -> None:
    """Run the server, in the foreground, until Ctrl-C.

    Three processes: Flower's SuperLink and SuperExec, on loopback, and the gate, which nodes dial.
    """
    from deploy import credentials, supervisor

    here = _home(home)
    if insecure:
        _say(PLAIN)

    def ready() -> None:
        everywhere = host in ("0.0.0.0", "::")
        dialled = host if not everywhere else "HOST" if insecure else credentials.covered(here)[0]
        to = f"[{dialled}]:{port}" if ":" in dialled else f"{dialled}:{port}"
        print(f"ready on {host}:{port}{' (INSECURE)' if insecure else ''}, logs in {here.logs}; on a node:", flush=True)
        how = "--insecure" if insecure else "--key NAME"
        print(f"  prfl deploy node --server {to} {how} --client N", flush=True)

    try:
        supervisor.serve(here, host, port, insecure=insecure, say=_say, ready=ready)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


@app.command()
def node(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The gate of the server.")],
    client: Annotated[int, typer.Option(min=0, metavar="N", help="Number of the client that this node is.")],
    key: Annotated[str, typer.Option(metavar="NAME", help="The key of this node.")] = "",
    profile: Annotated[str, typer.Option(metavar="P", help="Device class.")] = "device",
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="Data sets; the client's part is cut out.")] = None,
    own: Annotated[Path | None, typer.Option(metavar="DIR", help="The device's own data.")] = None,
    memory: Annotated[int, typer.Option(min=0, metavar="BYTES", help="What training may use; 0: all.")] = 0,
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="What it trains on.")] = "cpu",
    trust: Annotated[
        list[str] | None, typer.Option(metavar="PACKAGE", help="Installed here; experiments may name its parts.")
    ] = None,
    stock: Annotated[bool, typer.Option("--stock", help="Flower's own SuperNode; slower, a process a task.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS and node authentication.")] = False,
    poll: Annotated[float, typer.Option(min=0.001, metavar="S", help="Seconds between two looks for a task.")] = 0.05,
    home: Where = HOME,
) -> None:
    """Run a node, in the foreground, until Ctrl-C; on the device."""
    from deploy import link

    here = _home(home)
    host, port = link.address(server, PORT)
    config = _config(here, key or f"client-{client}", client, profile, data, own, memory, trust or [], device)
    if insecure:
        _say(PLAIN)
    else:
        _secured(here, key)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    root, private = (None, None) if insecure else (here.ca, here.key(key))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # systemd's way to say Ctrl-C
    if stock:
        from deploy import processes

        call = processes.supernode(address, config, root, private)
        os.execve(call[0], call, processes.environment(here))
    from deploy.node import serve

    with suppress(KeyboardInterrupt):
        serve(address, config, root_certificates=root, key=private, poll=poll)


@app.command()
def status(
    run: Annotated[Path | None, typer.Argument(metavar="[RUN]", help="A run folder; default: the latest.")] = None,
    home: Where = HOME,
) -> None:
    """Nodes, and what every client did in a run."""
    from rich.console import Console

    from deploy import credentials
    from deploy import status as found

    here, console = _home(home), Console(highlight=False)
    if not here.read().get("insecure"):
        for line in credentials.ending(f for f in (here.ca, here.certificate) if f.exists()):
            _say(line)
    if here.served():
        if here.read().get("insecure"):
            _say(PLAIN)
        found.show_nodes(console, found.nodes(here))
    else:
        print(f"no server runs on {here.folder}")
    folder = run or next((Path(f) for f in reversed(here.read().get("runs", [])) if Path(f).is_dir()), None)
    if folder is not None:
        found.show_clients(console, folder, found.clients(folder))


@app.command()
def stop(folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")], home: Where = HOME) -> None:
    """End a run; `prfl resume RUN` goes on with it."""
    from deploy import submit

    submit.stop(_home(home), folder)
    print(f"{folder} is stopped; `prfl resume {folder}` goes on with it")


def _secured(home: Home, key: str) -> None:
    from deploy import credentials

    if not key:
        raise ValueError("--key NAME is missing; make one with `prfl deploy keys NAME`, or say --insecure")
    if not home.ca.is_file():
        raise ValueError(f"no {home.ca}; copy it from the server, where `prfl deploy certs` made it")
    for line in credentials.ending((home.ca,)):
        _say(line)
    credentials.check_key(home.key(key))


def _config(
    home: Home,
    name: str,
    client: int,
    profile: str,
    data: Path | None,
    own: Path | None,
    memory: int,
    trusted: Sequence[str],
    device: str,
) -> Mapping[str, str | int]:
    """Flower's node config."""
    from deploy.home import NAME

    if not NAME.fullmatch(profile):
        raise ValueError(f"--profile is letters, digits, - and _, got {profile!r}")
    if data and own:
        raise ValueError("--data and --own exclude each other: data sets to cut from, or the device's own data")
    state = home.state(name)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    config: dict[str, str | int] = {
        "partition-id": client,
        "profile": profile,
        "state": str(state),
        "trusted": " ".join(trusted),
    }
    for option, folder in (("data", data), ("own", own)):
        if folder is not None:
            path = folder.expanduser().resolve()
            if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
                raise ValueError(f"--{option} {path} is not a folder that can be read")
            config[option] = str(path)
    if memory:
        config["memory"] = memory
    if device != "cpu":
        from clients import accelerator

        accelerator.found(device)
        config["device"] = device
    return config


def _home(folder: Path) -> Home:
    from deploy.home import Home

    return Home.of(folder)


def _print(lines: list[str]) -> None:
    print("\n".join(lines))


def _say(line: str) -> None:
    print(f"prfl: {line}", file=sys.stderr, flush=True)
