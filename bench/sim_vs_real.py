"""Simulation against reality: a federation of limited devices on this machine, and the same run in virtual time.

    sudo .venv/bin/python bench/sim_vs_real.py [--versions 20] [--json FILE] [--keep DIR]

Six devices of three kinds, each a network namespace with a link of its own and a share of a core, measure themselves
with `prfl devices measure`, then learn over TLS with node authentication; the simulation gets the measured profiles
and nothing else. Prints seconds a task and a version, predicted and measured. Takes about four minutes, and root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from lab import SERVER, Kind, Lab, missing

HERE = Path(__file__).parent
PRFL = [sys.executable, "-c", "from prfl.cli import main; main()"]
ENV = {
    "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(HERE.parent), "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}  # fmt: skip
KINDS = (
    Kind("fast", cpu=0.20, down=1.0e6, up=0.5e6, delay=0.005),
    Kind("middle", cpu=0.12, down=0.4e6, up=0.2e6, delay=0.010),
    Kind("slow", cpu=0.08, down=0.2e6, up=0.1e6, delay=0.020),
)
GATE = f"{SERVER}:9443"
TARGET = 0.15

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path("runs/sim_vs_real.json"))
    parser.add_argument("--keep", type=Path, help="leave logs, profiles and both run folders here")
    options = parser.parse_args()
    if why := missing():
        print(f"not here: {why}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="prfl-"))
    folder.mkdir(parents=True, exist_ok=True)
    began, load = time.monotonic(), os.getloadavg()[0]
    try:
        fleet = [KINDS[i % len(KINDS)] for i in range(2 * len(KINDS))]
        with Lab(fleet) as lab:
            say(began, "namespaces are there" + ("" if lab.delays else "; this kernel delays no packets, rates only"))
            server(lab, folder)
            measure(lab, folder)
            say(began, "devices are measured")
            busy = federation(lab, folder, options.versions)
            say(began, "the federation is done")
        simulation(folder, [kind.name for kind in fleet], options.versions)
        say(began, "so is the simulation")
        result = compared(folder, fleet)
        result |= busy | {"load_before": load, "delays": lab.delays, "seconds": time.monotonic() - began}
        show(result)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing is left behind")
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def server(lab: Lab, folder: Path) -> None:
    """Certificates, keys, the server, and the link test beside it."""
    home = folder / "server"
    prfl("deploy", "certs", SERVER, "--home", home)
    for i, _ in enumerate(lab.kinds):
        own = folder / f"node{i}"
        prfl("deploy", "keys", f"node{i}", "--home", own)
        shutil.copy(home / "ca.crt", own)
        prfl("deploy", "admit", own / f"node{i}.pub", "--home", home)
    start(lab, folder / "server.log", "deploy", "server", "--host", SERVER, "--home", home)
    start(lab, folder / "link.log", "devices", "link", "--host", SERVER, "--minutes", "5")
    wait(
        lambda: "ready on" in text(folder / "server.log") and "link test on" in text(folder / "link.log"), "the server"
    )


def measure(lab: Lab, folder: Path) -> None:
    """`prfl devices measure` on one device of every kind, within its share of a core from its first word on."""
    experiment = HERE / "sim_vs_real.yaml"
    profiles: dict[str, Any] = {}
    runs = {}
    for i, kind in enumerate(KINDS):
        line = ["devices", "measure", str(experiment), "--name", kind.name, "--out", str(folder / f"{kind.name}.yaml")]
        line += ["--link", SERVER, "--server", GATE, "--key", f"node{i}", "--home", str(folder / f"node{i}")]
        runs[i] = start(lab, folder / f"measure-{kind.name}.log", *line, device=i)
    limited(lab, {i: folder / f"measure-{kind.name}.log" for i, kind in enumerate(KINDS)})
    for i, kind in enumerate(KINDS):
        if runs[i].wait(300):
            raise RuntimeError(f"measuring {kind.name}: {text(folder / f'measure-{kind.name}.log')}")
        profiles |= yaml.safe_load(text(folder / f"{kind.name}.yaml"))
    (folder / "profiles.yaml").write_text(yaml.safe_dump(profiles, sort_keys=False))


def federation(lab: Lab, folder: Path, versions: int) -> dict[str, float]:
    """The experiment on the devices; how many cores they and the server, and all processes, took meanwhile."""
    logs = {i: folder / f"node{i}.log" for i, _ in enumerate(lab.kinds)}
    for i, kind in enumerate(lab.kinds):
        lab.limit(i, on=False)
        line = ["deploy", "node", "--server", GATE, "--key", f"node{i}", "--client", str(i), "--profile", kind.name]
        start(lab, logs[i], *line, "--home", folder / f"node{i}", device=i)
    limited(lab, logs)
    line = ["run", str(HERE / "sim_vs_real.yaml"), "devices={name: real, nodes: 6}", f"stop.versions={versions}"]
    line += ["--home", str(folder / "server")]
    ours, everybody, at = lab.busy(), ticks(), time.monotonic()
    done = start(lab, folder / "run.log", *line, "--out", folder / "real").wait(400)
    passed = time.monotonic() - at
    if done:
        raise RuntimeError(f"the federation: {text(folder / 'run.log')[-2000:]}")
    return {"cores_ours": (lab.busy() - ours) / passed, "cores_busy": (ticks() - everybody) / passed}


def simulation(folder: Path, fleet: Sequence[str], versions: int) -> None:
    """The same experiment in virtual time, with what the devices said of themselves."""
    given = json.dumps(
        {"fleet": {"name": "sim_vs_real:fleet", "names": list(fleet), "file": str(folder / "profiles.yaml")}}
    )
    line = ["run", HERE / "sim_vs_real.yaml", f"devices={given}", f"stop.versions={versions}", "--workers", "serial"]
    prfl(*line, "--out", folder / "simulated")


def fleet(names: tuple[str, ...], file: str) -> tuple[Any, ...]:
    """A part for `devices.fleet`: client by client, as the real nodes are numbered."""
    from sim import devices

    return devices.fleet(list(names), len(names), 0, devices.load(Path(file)))


def compared(folder: Path, fleet: Sequence[Kind]) -> dict[str, Any]:
    """Seconds a task by kind and density, and a version; without the first two, in which nodes build their data."""
    real, simulated = (events(folder / name) for name in ("real", "simulated"))
    rows: list[Row] = []
    tasks = [by_task(run, fleet) for run in (simulated, real)]
    for key in sorted(tasks[0].keys() & tasks[1].keys(), key=lambda k: (k[0], -k[1])):
        predicted, measured = (median(t[key]) for t in tasks)
        rows.append({"device": key[0], "density": key[1], "tasks": len(tasks[1][key])} | pair(predicted, measured))
    ends = [[e["at"] for e in run if e["kind"] == "merge"] for run in (simulated, real)]
    version = pair(*(median(b - a for a, b in pairwise(at)) for at in ends))
    return {
        "profiles": yaml.safe_load(text(folder / "profiles.yaml")),
        "tasks": rows,
        "version": version,
        "median_error": median(abs(row["error"]) for row in rows),
        "failed": sum(not e["used"] for e in real if e["kind"] == "arrival"),
    }


def by_task(run: Sequence[Row], fleet: Sequence[Kind]) -> dict[tuple[str, float], list[float]]:
    out = defaultdict(list)
    for e in run:
        if e["kind"] == "arrival" and e["used"] and e["version"] > 1:
            out[fleet[e["client"]].name, e["density"]].append(e["seconds"])
    return out


def pair(predicted: float, measured: float) -> Row:
    return {"predicted": predicted, "measured": measured, "error": predicted / measured - 1}


def show(result: dict[str, Any]) -> None:
    print(f"\n{'device':8}{'density':>8}{'tasks':>7}{'predicted':>11}{'measured':>10}{'error':>8}")
    for row in result["tasks"]:
        print(f"{row['device']:8}{row['density']:8.2f}{row['tasks']:7}" + cells(row))
    print(f"{'version':23}" + cells(result["version"]))
    print(f"\nmedian error {result['median_error']:.1%} ({TARGET:.0%} wanted), {result['failed']} tasks failed")
    print(f"load before {result['load_before']:.2f}; in the federation {result['cores_busy']:.2f} of {os.cpu_count()} "
          f"cores were busy, {result['cores_ours']:.2f} with it; {result['seconds']:.0f} s in all")  # fmt: skip


def cells(row: Row) -> str:
    return f"{row['predicted']:10.2f}s{row['measured']:9.2f}s{row['error']:+8.1%}"


def start(lab: Lab, log: Path, *line: object, device: int | None = None) -> subprocess.Popen[bytes]:
    return lab.start([*PRFL, *map(str, line)], log, device, ENV)


def prfl(*line: object) -> None:
    """A command that ends by itself."""
    env = {**os.environ, **ENV, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    done = subprocess.run([*PRFL, *map(str, line)], env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"prfl {line[0]} {line[1]}: {done.stderr.strip()}")


def limited(lab: Lab, logs: dict[int, Path]) -> None:
    """Hold every device to its share as soon as it has said something: until then it only imports."""
    for i, log in logs.items():
        wait(lambda log=log: bool(text(log)), log.stem)  # type: ignore[misc]
        lab.limit(i)


def wait(done: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} is not there after {seconds:.0f} s")
        time.sleep(0.05)


def events(folder: Path) -> list[Row]:
    def lines() -> Iterator[Row]:
        with (folder / "events.jsonl").open() as file:
            for line in file:
                yield json.loads(line)

    return list(lines())


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def ticks() -> float:
    """Seconds that all cores of this machine have been busy."""
    values = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    return (sum(values) - values[3] - values[4]) / os.sysconf("SC_CLK_TCK")


def say(began: float, what: str) -> None:
    print(f"{time.monotonic() - began:5.0f} s  {what}", flush=True)


if __name__ == "__main__":
    main()
