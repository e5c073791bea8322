"""What this device is capable of, as a profile for the simulation: training, memory, link, and a task's overhead."""

from __future__ import annotations

import platform
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from typing import Any

import httpx  # Flower's own client
import torch
import yaml

from clients import memory
from clients.local import Local
from deploy import internals, link, speed
from deploy.line import AT_ONCE
from prfl import config, masks
from prfl.codec import Codec, Layout
from prfl.config import Data, Experiment
from prfl.records import pack, unpack
from prfl.types import Task

RUNS = 5
TASKS = 7  # whose requests are timed
OBJECTS = 6  # of a message: itself, its record, the array and its name, the bytes, the scalars beside

POLL = 0.05
"""Seconds between two questions of the warm node for work, while work comes."""

STOCK = 1.5 + 0.5 + 1.0
"""Seconds that a task waits in Flower's own node: half of a 3 s poll, half of its SuperExec's 1 s, about 1 s back."""

DEFAULT = Experiment(
    name="default",
    data=Data(set={"name": "synthetic", "shape": [1, 28, 28], "samples": 400, "test": 100}),
    model={"name": "conv2", "hidden": 256},
    method="fedavg",
)

Address = tuple[str, int]


def measured(
    experiment: Experiment = DEFAULT,
    folder: Path | None = None,
    *,
    tester: Address | None = None,
    server: Address | None = None,
    ca: Path = Path("ca.crt"),
    key: Path | None = None,
    stock: bool = False,
    seconds: float = 1.0,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """A device's fields, as an experiment's `devices.profiles` takes them; half a minute. Raises ValueError.

    `folder`: where data sets lie. `tester`: a `prfl devices link`; without one `down`, `up` and `latency` are left out.
    `server`, `ca`, `key`: as in `exchange`; without a server its requests take five times the way there and back.
    `stock`: for Flower's own node, which starts a process for every task, in place of the warm one. `seconds`: of each
    of some thirty runs.
    """
    if server is not None:
        say(f"requests to {server[0]}:{server[1]} ...")
    asking = None if server is None else exchange(*server, ca, key)
    if tester is not None:
        say(f"link to {tester[0]}:{tester[1]} ...")
    line = None if tester is None else link.measure(*tester, 2 * seconds)
    say(f"training {config.name(experiment.model)} ...")
    found = speed.training(experiment, folder, seconds)
    say("a task's overhead ...")
    way = 10 * line.latency if line else 0.0  # of five requests, one after the other
    asking = way if asking is None else asking
    waits = STOCK + interpreter() + _median(lambda: Local.of(experiment, folder, own=True), 3) if stock else POLL / 2
    serving = max(0.0, asking - way)  # ours: the ServerApp makes as many requests, right beside the SuperLink
    startup = waits + asking + serving + handling(experiment, folder) + found.task
    version, threads = torch.__version__.partition("+")[0], torch.get_num_threads()
    work = f"{config.name(experiment.model)}, batches of {speed.work_of(experiment).batch}"
    node = f"{'stock' if stock else 'warm'} node, {asking * 1000:.3g} ms for a task's requests"
    on = f"{board()}, torch {version}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "source": f"prfl devices measure, {date.today()}: {on}; {work}; {node}",
        "measured": True,
        "flops": {kind: _short(rate) for kind, rate in found.flops.items()},
        "memory": memory.limit(),
        **({} if line is None else {name: _short(value) for name, value in vars(line).items()}),
        "startup": _short(startup),
        "step": _short(found.step),
        "jitter": _short(found.jitter),
    }


def handling(experiment: Experiment, folder: Path | None = None) -> float:
    """Seconds to decode a task of the whole model and to encode its update."""
    local, work = Local.of(experiment, folder, own=True), replace(speed.work_of(experiment), steps=1)
    codec: Codec = config.part("codec", {"name": "codec", **experiment.codec}, {"codec": Codec})
    layout, task = Layout.of(local.params, ()), Task(0, 0, local.params, masks.DENSE, work, 0)
    update, data = local.train(task), codec.encode_task(task, layout)

    def once() -> None:
        got = codec.decode_task(unpack(pack(data))[0], layout)
        pack(codec.encode_update(update, got, layout)[0])

    return _median(once, RUNS)


def exchange(host: str, port: int, ca: Path, key: Path | None = None) -> float:
    """Seconds of all the requests that a task takes, with none of their content. Raises ValueError.

    `key`: of this node, which is admitted and does not run: they are heartbeats then, signed and looked up as a task's
    are; otherwise the server is asked for its health, which is a little quicker.
    """
    try:
        root = ca.read_bytes()
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ValueError(f"certificate {ca}: {error.strerror or error}; --home names the folder of ca.crt") from None
    try:
        if key is None:
            with httpx.Client(verify=context, timeout=10, trust_env=False) as client:
                return _requests(lambda: client.get(f"https://{host}:{port}/health").raise_for_status())
        private = internals.load_key(key)
        with internals.fleet(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", root, private) as fleet:
            node = fleet.activate()
            try:
                return _requests(lambda: fleet.heartbeat(node))
            finally:
                fleet.deactivate(node)
    except (httpx.HTTPError, ConnectionError, PermissionError) as error:
        raise ValueError(f"server {host}:{port}: {error}") from None


def _requests(ask: Callable[[], object]) -> float:
    """Those of a task: look, objects a few at once, confirm; announce, objects."""

    def task() -> None:
        for objects in (0, OBJECTS, 0, 0, OBJECTS):
            pool.map(lambda _: ask(), range(objects)) if objects else ask()

    with ThreadPool(AT_ONCE) as pool:
        return _median(task, TASKS)


def interpreter() -> float:
    """Seconds until a fresh Python process has imported the ClientApp."""
    return _median(lambda: subprocess.run([sys.executable, "-c", "import clients.app"], check=True), 3)


def board(root: Path = Path("/")) -> str:
    """The board's model, or else the processor's."""
    model, info = root / "proc/device-tree/model", root / "proc/cpuinfo"
    if model.exists():
        return model.read_text(errors="replace").strip("\0\n ")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, name: str, values: Mapping[str, Any]) -> None:
    """Put a profile into a file, beside those that it holds. Raises ValueError when it holds anything else."""
    try:
        held = yaml.safe_load(path.read_text()) or {} if path.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        held = None
    if not isinstance(held, dict):
        raise ValueError(f"{path} holds something else than device profiles; --out names another file")
    path.write_text(yaml.safe_dump({**held, name: dict(values)}, sort_keys=False))


def _median(work: Callable[[], object], times: int) -> float:
    """Seconds of a call, after one that does not count."""
    work()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)


def _short(value: float) -> float:
    return float(f"{value:.4g}")
