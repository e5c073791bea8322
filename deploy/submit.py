"""Runs on real devices as their user sees them: handed to the server of a home, followed, gone on with, stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from os import SEEK_END
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deploy import processes
from deploy.admission import connected
from deploy.experiment import real
from deploy.home import Home
from prfl import config, store
from prfl.config import ConfigError, Experiment, plain
from prfl.tally import Tally
from strategies import parts

LOOK = 0.5  # seconds between two looks at the log of a run
ASK = 3.0  # seconds between two questions to the SuperLink
START = 10.0  # seconds a ServerApp that is running may take to open its folder
NOTE = "deployment.json"  # in a run folder: which server has it, under which number
APP = """[project]
name = "prfl-federation"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "prfl"

[tool.flwr.app.components]
serverapp = "deploy.server_app:app"
clientapp = "clients.app:app"

[tool.flwr.app.config]
experiment = ""
folder = ""
data-dir = ""
"""


def submit(home: Home, asked: Experiment, folder: Path, data_dir: Path | None) -> int:
    """Hand a run to the server of this home; its number there. `folder`: new, or one to go on with. ValueError."""
    real(asked)
    parts.of(asked)
    if not home.served():
        raise ValueError(f"no server runs on {home.folder}; start it with `prfl deploy server`")
    if data_dir is not None and not data_dir.is_dir():
        raise ConfigError(f"--data-dir {data_dir} is not a folder")
    store.settle(folder, parts.spelled(asked))
    chosen = {
        "experiment": json.dumps(plain(asked.model_dump())),
        "folder": str(folder.absolute()),
        "data-dir": str(data_dir.absolute()) if data_dir else "",
    }
    with TemporaryDirectory(prefix="app-", dir=home.folder) as place:  # its own: another may submit now
        app, settings = Path(place) / "app", Path(place) / "run.toml"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP)  # nothing of ours: server and nodes run what is installed there
        settings.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in chosen.items()))
        try:
            told = processes.flwr(home, "run", str(app), processes.CONNECTION, "--run-config", str(settings))
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    number = int(told["run-id"])
    note = {"run": str(number), "home": str(home.folder), "data_dir": chosen["data-dir"]}
    (folder / NOTE).write_text(json.dumps(note) + "\n")
    runs = [f for f in home.read().get("runs", []) if f != chosen["folder"]]
    home.note({"runs": [*runs[-99:], chosen["folder"]]})
    return number


def resume(home: Home, folder: Path) -> int | None:
    """Go on with a run: its number, a new one if it had broken off; None when it has come to its end. ValueError."""
    note = noted(folder)
    if (folder / "summary.json").exists() and not json.loads((folder / "summary.json").read_text())["stopped"]:
        return None
    number = int(note["run"])
    if _alive(home, number, folder):
        return number
    return submit(home, experiment(folder), folder, Path(note["data_dir"]) if note["data_dir"] else None)


def _alive(home: Home, number: int, folder: Path) -> bool:
    """Whether somebody works on a run; one that died is stopped, which the SuperLink would notice only later."""
    end = time.monotonic() + START
    while (known := status(home, number)[0]) != "finished":
        try:
            with store.alone(folder):
                pass
        except ValueError:
            return True
        if known == "running" and time.monotonic() > end:
            with connected(home) as link:
                link.stop(number)
            return False
        time.sleep(LOOK)
    return False


def experiment(folder: Path) -> Experiment:
    """What a run folder was asked."""
    return config.load(folder / "config.yaml")


def stop(home: Home, folder: Path) -> None:
    """End a run; its folder can be gone on with. ValueError: no server, no such run, or it has ended."""
    with connected(home) as link:
        link.stop(int(noted(folder)["run"]))


def noted(folder: Path) -> Mapping[str, str]:
    """What `submit` wrote into a run folder. ConfigError: it is none of a run on real devices."""
    try:
        found: Mapping[str, str] = json.loads((folder / NOTE).read_text())
    except FileNotFoundError:
        simulated = (folder / "events.jsonl").exists()
        why = "was simulated: run it again, it comes out the same" if simulated else "holds no run"
        raise ConfigError(f"{folder} {why}") from None
    return found


def status(home: Home, run: int) -> tuple[str, str]:
    """pending, starting, running or finished; and how it ended, in words. ValueError: no server, no such run."""
    with connected(home) as link:
        return link.run(run)


def follow(home: Home, run: int, folder: Path, watch: Callable[[Mapping[str, Any], Tally], None]) -> Mapping[str, Any]:
    """Show a run's events until it has ended; its summary. ConfigError: it ended without one, and why.

    A server that is away for a while is waited for.
    """
    tally, place, asked = Tally({}), 0, 0.0
    while True:
        ended = None
        if time.monotonic() - asked > ASK:
            asked = time.monotonic()
            with suppress(ConnectionError):
                state, how = status(home, run)
                ended = how if state == "finished" else None
        events, place = _since(folder / "events.jsonl", place)
        for event in events:
            tally(event)
            watch(event, tally)
        if ended is not None:
            break
        time.sleep(LOOK)
    if not (folder / "summary.json").exists():
        raise ConfigError(f"the run ended without a summary: {ended}; FLWR_HOME={home.flwr} flwr log {run} says more")
    found: Mapping[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def _since(log: Path, place: int) -> tuple[list[dict[str, Any]], int]:
    """The whole events of a log from a byte on, and where they end; a log that was cut is read from its new end."""
    if not log.exists():
        return [], 0
    with log.open("rb") as file:
        file.seek(min(place, file.seek(0, SEEK_END)))
        lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        return [json.loads(line) for line in whole], file.tell() - sum(map(len, lines[len(whole) :]))
