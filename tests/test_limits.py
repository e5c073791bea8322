"""Devices with little memory, what they keep on disk, and what they tell: in simulation and in the real ClientApp."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from safetensors.torch import load_file, save_file
from test_flower import CLIENTS, EXPERIMENT, SPEC, WORK, Nodes, given, layout, local, task, transport
from test_server import Events, of_kind, played
from world import CLASSES, World, method

from clients import app, memory
from clients.keeping import RUNS, Kept
from prfl import cost, groups, models
from prfl.codec import Codec
from prfl.config import Data, Experiment
from prfl.cut import Cut
from prfl.density import constant
from prfl.problem import Problem
from prfl.records import architecture_out, experiment_out, unpack
from prfl.types import Arrival, Shortage, Work
from strategies.flower import PruningStrategy
from strategies.grid import GridTransport
from strategies.limits import PARTS, heeded
from strategies.method import Method
from strategies.pacing import buffered, sync
from strategies.server import Stalled, serve

MB = 10**6
ROOM = int(cost.KERNELS) + 5 * MB  # for a task
CHANNELS = {
    "constant": Method(cut=Cut(unit="channels"), work=replace(WORK, steps=2)),
    "pr_fl": method("pr_fl", unit="channels"),
    "heterofl": method("heterofl"),
}


def large(memory: int, small: int = 3) -> World:
    """A world with a model of 1.1 MB, whose first clients have only so many bytes besides the framework."""
    world = World()
    world.model = models.build("mlp", (1, 4, 4), CLASSES, 0, {"hidden": (512, 512)})
    world.params = models.values(world.model)
    world.architecture = groups.architecture(world.model, world.all.x[:1].float())
    world.layout = type(world.layout).of(world.params, world.architecture.groups)
    world.fleet = [
        replace(d, memory=int(cost.FRAMEWORK + cost.KERNELS) + memory) if c < small else d
        for c, d in enumerate(world.fleet)
    ]
    return world


def refusals(events: Events) -> Events:
    return [e for e in of_kind(events, "arrival") if e["reason"].startswith("memory: ")]


# What a task takes


def test_a_shortage_is_read_as_it_was_written_and_on_the_safe_side() -> None:
    said = Shortage(812_340_001, 511_990_000)
    assert str(said) == "memory: needs 812.4 MB of 511.9 MB"
    read = Shortage.read(str(said))
    assert read == Shortage(812.4 * MB, 511.9 * MB)
    assert Shortage.read(f"{said}, and more") == read


@pytest.mark.parametrize(
    "reason",
    ["", "memory", "memory: needs 1 MB of 2 MB", "memory: needs 1.0 MB of 2.0 MB", "memory: needs nan MB of 1.0 MB",
     "x memory: needs 2.0 MB of 1.0 MB", "memory: needs 9999999999999.0 MB of 1.0 MB", "memory: needs -2 MB of -3 MB"],
)  # fmt: skip
def test_other_reasons_are_no_shortage(reason: str) -> None:
    assert Shortage.read(reason) is None


def test_golden_footprint() -> None:
    params = {"w": torch.zeros(5, 16), "b": torch.zeros(5)}
    arch = groups.Architecture((groups.Group(5, (groups.Member("w", 0), groups.Member("b", 0))),), {"w": 1.0})
    half = groups_mask(arch, [0, 3])
    training = cost.memory(params, half, arch, 10)
    received = 4 * (80 + 5) + 4 * (32 + 2) + (8 + 4) * (32 + 2)
    assert cost.footprint(params, half, arch, Work(batch=10)) == pytest.approx(
        cost.KERNELS + cost.SLACK * (training + received)
    )
    proximal = cost.footprint(params, half, arch, Work(batch=10, proximal=0.1))
    assert proximal == pytest.approx(cost.KERNELS + cost.SLACK * (training + received + 2 * 4 * 34))


def groups_mask(arch: Any, kept: list[int]) -> Any:
    from prfl.masks import Mask

    return Mask(channels={arch.groups[0]: torch.tensor(kept)})


PEAK = """
    import gc, os, re, sys
    import torch
    from clients import app, memory
    from clients.train import train
    from prfl import cost, groups, masks, models
    from prfl.codec import Codec, Layout
    from prfl.cut import Cut
    from prfl.samples import Samples
    from prfl.types import Task, Work

    torch.set_num_threads(1)
    model, work = models.build("conv2", (1, 28, 28), 10, 0, {"hidden": 1024}), Work(epochs=1, batch=20)
    params, samples = models.values(model), Samples(torch.randn(40, 1, 28, 28), torch.randint(10, (40,)))
    layout = Layout.of(params)
    arch = groups.Architecture((), groups.macs(model, torch.zeros(1, 1, 28, 28)))
    data = Codec().encode_task(Task(0, 0, params, masks.DENSE, work, 1), layout)
    counted = cost.footprint(params, masks.DENSE, arch, work)
    del params
    gc.collect()
    held = memory.resident()
    for _ in range(3):
        message = bytes(bytearray(data))
        task = Codec().decode_task(message, layout)
        Codec().encode_update(train(task, model, samples), task, layout)
    peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
    print((peak - held) / counted)
"""


@pytest.mark.slow
def test_a_process_grows_with_a_task_by_what_was_counted() -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to see how much memory a process took")
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", textwrap.dedent(PEAK)]
    told = subprocess.run(call, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert 0.4 < float(told.stdout) < 1.2


def test_memory_is_the_machine_s_or_the_control_group_s(tmp_path: Path) -> None:
    here = memory.limit()
    assert 2**28 < here <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory.limit(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")

    put("proc/self/cgroup", "0::/a/b")
    put("sys/fs/cgroup/a/b/memory.max", "max")
    assert memory.limit(tmp_path) > 2**28
    put("sys/fs/cgroup/a/memory.max", str(2**27))
    assert memory.limit(tmp_path) == 2**27
    put("proc/self/cgroup", "4:memory:/c\n0::/")
    put("sys/fs/cgroup/memory/c/memory.limit_in_bytes", str(2**26))
    assert memory.limit(tmp_path) == 2**26
    assert 2**26 < memory.resident() < 2**36


# In simulation


@pytest.mark.parametrize("name", CHANNELS)
def test_a_device_gets_as_much_as_fits_after_a_refusal(name: str) -> None:
    """After one; after a second where a task with a report takes more than the first one did."""
    world, chosen = large(5 * MB), CHANNELS[name]
    state, events = played(world, chosen, sync(6), versions=4)
    assert state.version == 4
    assert state.limits.keys() == {e["client"] for e in refusals(events)}
    assert set() < state.limits.keys() <= {0, 1, 2}
    assert isinstance(chosen.work, Work)
    work = replace(chosen.work, report="gradient2") if chosen.saliency.needs else chosen.work
    for client, limit in state.limits.items():
        sent = [e["density"] for e in of_kind(events, "send") if e["client"] == client]
        came = [e["used"] for e in of_kind(events, "arrival") if e["client"] == client]
        assert came.count(False) == 1 + bool(chosen.saliency.needs)
        refused = [density for density, used in zip(sent, came, strict=True) if not used]
        assert min(refused) > limit >= max(density for density, used in zip(sent, came, strict=True) if used)
        fits = [cost.footprint(state.params, state.rank.mask(share), state.architecture, work) < cost.KERNELS + 5 * MB
                for share in (limit, limit + 2 / PARTS)]  # fmt: skip
        assert fits == [True, False]


def test_a_refusal_costs_the_download_and_no_training() -> None:
    world = large(5 * MB)
    _, events = played(world, CHANNELS["constant"], sync(6), versions=2)
    tasks = {(t.client, t.version) for t in world.tasks}
    for e in refusals(events):
        assert e["bytes_down"] > MB
        assert e["bytes_up"] == 0
        assert e["seconds"] > 0
        assert (e["client"], e["version"]) not in tasks


def test_masks_of_single_weights_save_nothing_and_the_client_is_left_out() -> None:
    weights = Method(density=constant(0.5), work=replace(WORK, steps=2))
    state, events = played(large(5 * MB), weights, sync(6), versions=3)
    assert state.limits == {0: 0.0, 1: 0.0, 2: 0.0}
    assert len(refusals(events)) == 3
    assert all(e["reason"].endswith("and no smaller part of the model fits: left out") for e in refusals(events))
    later = [e["client"] for e in of_kind(events, "send") if e["version"]]
    assert sorted(set(later)) == [3, 4, 5]


def test_with_nobody_left_the_run_stalls_whatever_the_pacing() -> None:
    world = large(MB // 2, small=6)
    for pacing in (sync(6), sync(6, deadline=5.0), buffered(2, 1)):
        with pytest.raises(Stalled, match="nobody left to ask"):
            played(world, CHANNELS["constant"], pacing)


def test_many_small_devices_are_no_failing_run() -> None:
    world = large(5 * MB, small=6)
    state, events = played(world, CHANNELS["constant"], buffered(1, 1), versions=6)
    assert state.version == 6
    assert len(refusals(events)) == len(state.limits)


def test_a_resumed_run_knows_the_limits() -> None:
    world = large(5 * MB)
    weights = Method(density=constant(0.5), work=replace(WORK, steps=2))
    state, _ = played(world, weights, sync(6), versions=2)
    events: Events = []
    serve(weights, sync(6), world.transport(), state, stop=lambda s, now: s.version >= 3, log=events.append)
    assert {e["client"] for e in of_kind(events, "send")} == {3, 4, 5}


def test_a_device_that_refuses_everything_ends_at_nothing() -> None:
    world = large(5 * MB)
    state = CHANNELS["constant"].init(world.params, world.architecture, world.classes)
    asked = CHANNELS["constant"].assign(state, 0, np.random.default_rng(0))
    seen = [1.0]
    while seen[-1]:
        refused = Arrival(asked, 0, 1, 1, 0, None, "memory: needs 9.1 MB of 9.0 MB")
        state, _ = heeded(state, refused)
        seen.append(state.limits[0])
        if seen[-1]:
            asked = CHANNELS["constant"].assign(state, 0, np.random.default_rng(0))
            assert asked.density == seen[-1]
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == len(seen) <= PARTS + 1


def test_without_costs_a_refusal_is_a_failure_like_any_other() -> None:
    world = large(5 * MB)
    state = CHANNELS["constant"].init(world.params, replace(world.architecture, macs={}), world.classes)
    asked = CHANNELS["constant"].assign(state, 0, np.random.default_rng(0))
    refused = Arrival(asked, 0, 1, 1, 0, None, "memory: needs 9.0 MB of 1.0 MB")
    assert heeded(state, refused) == (state, refused)


# On a device


def big() -> tuple[Experiment, Problem]:
    from prfl import problem

    experiment = EXPERIMENT.model_copy(update={"model": {"name": "mlp", "hidden": [512, 512]}})
    return experiment, problem.build(experiment)


def test_the_client_app_refuses_what_does_not_fit_and_gets_less() -> None:
    experiment, problem = big()
    params, arch = models.values(problem.model), groups.architecture(problem.model, problem.example)
    grid = Nodes(3)
    _, held = app._local(experiment_out(experiment), "", False, "cpu")
    grid.contexts[1000].node_config["memory"] = held + ROOM
    spec = {"experiment": experiment_out(experiment), "codec": "{}", "architecture": architecture_out(arch)}
    found = GridTransport(grid, Codec(), type(layout()).of(params, arch.groups), spec, timeout=20, poll=0.001)
    found.enrol(3)
    channels = Method(cut=Cut(unit="channels"), work=WORK)
    state, events = channels.init(params, arch, found.classes), list[Any]()
    state = serve(channels, sync(3), found, state, stop=lambda s, now: s.version == 3, log=events.append)
    (refusal,) = refusals(events)
    needed = held + cost.footprint(params, state.rank.mask(1.0), arch, WORK)
    assert refusal["client"] == 0
    assert refusal["reason"] == str(Shortage(needed, held + ROOM))
    sent = [e["density"] for e in of_kind(events, "send") if e["client"] == 0]
    assert sent == [1.0, state.limits[0], state.limits[0]]
    assert 0 < state.limits[0] < 1
    assert sum(e["used"] for e in of_kind(events, "arrival") if e["client"] == 0) == 2


def test_in_a_loop_by_rounds_limits_hold_too() -> None:
    experiment, problem = big()
    arch = groups.architecture(problem.model, problem.example)
    grid = Nodes(3)
    _, held = app._local(experiment_out(experiment), "", False, "cpu")
    grid.contexts[1000].node_config["memory"] = held + ROOM
    grid.contexts[1000 - 7].node_config["memory"] = 1
    strategy = PruningStrategy(
        Method(cut=Cut(unit="channels"), work=WORK), sync(3), experiment=experiment, architecture=arch, min_clients=3
    )
    super(PruningStrategy, strategy).start(grid, ArrayRecord(models.values(problem.model)), num_rounds=3)
    assert strategy.state is not None
    assert 0 < strategy.state.limits[0] < 1
    assert strategy.state.limits[1] == 0
    trains = [m.metadata.dst_node_id for m in grid.asked if m.metadata.message_type == "train"]
    assert [trains.count(node) for node in (1000, 1000 - 7, 1000 - 14)] == [3, 1, 3]


def test_without_costs_nothing_is_refused_and_nonsense_is_said() -> None:
    grid = Nodes(2)
    grid.contexts[1000].node_config["memory"] = 1
    found = transport(grid)
    found.send(task(0))
    arrival = found.wait()
    assert arrival is not None
    assert arrival.update is not None
    arch = groups.architecture(given().model, given().example)
    grid.contexts[1000].node_config["memory"] = "lots"
    found = GridTransport(grid, Codec(), layout(), SPEC | {"architecture": architecture_out(replace(arch, groups=()))})
    found.enrol(2)
    found.send(task(0))
    arrival = found.wait()
    assert arrival is not None
    assert arrival.reason == "node config: memory must be a whole number"


# What is kept on disk


def lossy(grid: Nodes, **more: str) -> GridTransport:
    beside = SPEC | {"codec": '{"values": "int8"}', **more}
    found = GridTransport(grid, Codec("int8"), layout(), beside, timeout=20, poll=0.001)
    found.enrol(len(grid.contexts))
    return found


def answered(found: GridTransport, version: int) -> Arrival:
    found.send(task(0, version))
    arrival = found.wait()
    assert arrival is not None
    return arrival


def second(folder: str, restart: bool) -> Any:
    """The update of the second task, by a device that was restarted before it or not."""
    grid = Nodes(0)
    grid.join(0, 5, **({"state": folder} if folder else {}))
    answered(lossy(grid), 0)
    if restart:
        grid.contexts.clear()
        grid.join(0, 6, **({"state": folder} if folder else {}))
    update = answered(lossy(grid), 1).update
    assert update is not None
    return update


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(v, b.delta[k]) for k, v in a.delta.items())


def test_what_a_lossy_codec_withheld_survives_a_restart_in_the_folder(tmp_path: Path) -> None:
    unbroken = second("", restart=False)
    assert same(second(str(tmp_path / "a"), restart=True), unbroken)
    assert same(second(str(tmp_path / "b"), restart=False), unbroken)
    assert not same(second("", restart=True), unbroken)
    (kept,) = (tmp_path / "a").iterdir()
    assert kept.name == Kept(tmp_path / "a", "1", 0).path.name  # the number of Flower's run
    assert load_file(kept).keys() == local().params.keys()


def test_another_run_of_the_same_experiment_starts_clean(tmp_path: Path) -> None:
    grid = Nodes(0)
    grid.join(0, 5, state=str(tmp_path))
    assert answered(lossy(grid, run="one"), 0).update is not None
    assert same(answered(lossy(grid, run="two"), 1).update, second("", restart=True))
    assert same(answered(lossy(grid, run="one"), 1).update, second("", restart=False))


def spoil(path: Path, how: str) -> None:
    tree = load_file(path)
    name = next(iter(tree))
    match how:
        case "cut":
            path.write_bytes(path.read_bytes()[:-7])
        case "empty":
            path.write_bytes(b"")
        case "noise":
            path.write_bytes(os.urandom(5000))
        case "long":
            path.write_bytes(bytes(4 * 2**20))
        case "huge head":
            path.write_bytes((2**63 - 1).to_bytes(8, "little") + path.read_bytes()[8:])
        case "shape":
            save_file({**tree, name: torch.zeros(3)}, path)
        case "name":
            save_file({**tree, "more": torch.zeros(1)}, path)
        case "type":
            save_file({**tree, name: tree[name].half()}, path)
        case "nan":
            save_file({**tree, name: torch.full_like(tree[name], torch.nan)}, path)
        case "folder":
            path.unlink()
            path.mkdir()


@pytest.mark.parametrize(
    "how", ["cut", "empty", "noise", "long", "huge head", "shape", "name", "type", "nan", "folder"]
)
def test_a_damaged_file_is_put_aside_with_one_line(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = Nodes(0)
    grid.join(0, state=str(tmp_path))
    found = lossy(grid)
    assert answered(found, 0).update is not None
    (path,) = tmp_path.iterdir()
    spoil(path, how)
    caplog.clear()
    logging.getLogger("flwr").addHandler(caplog.handler)  # Flower's does not pass on
    try:
        assert answered(found, 1).update is not None
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert len({r.getMessage() for r in caplog.records}) == 1
    assert "damaged" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, path.name + ".damaged"]
    assert answered(found, 2).update is not None
    assert load_file(path).keys() == local().params.keys()


def test_a_disk_that_can_not_be_written_costs_no_task(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    grid = Nodes(0)
    grid.join(0, state=str(tmp_path / "file"))
    found = lossy(grid)
    assert answered(found, 0).update is not None
    assert answered(found, 1).update is not None


def test_files_of_former_runs_go_and_others_stay(tmp_path: Path) -> None:
    tree = {"w": torch.zeros(3)}
    (tmp_path / "mine.txt").write_text("x")
    for i in range(RUNS + 3):
        for client in (0, 7):
            kept = Kept(tmp_path, f"run {i}", client)
            kept.write(tree)
            os.utime(kept.path, (1e9 + i, 1e9 + i))
    left = [i for i in range(RUNS + 3) if Kept(tmp_path, f"run {i}", 7).path.exists()]
    assert left == list(range(3, RUNS + 3))
    assert (tmp_path / "mine.txt").exists()
    assert len(list(tmp_path.iterdir())) == 1 + 2 * RUNS
    assert Kept(tmp_path, "run 5", 0).read({"w": (3,)}) is not None
    assert Kept(tmp_path, "run 5", 1).read({"w": (3,)}) is None


# What a device tells

SECRET = "Jane Doe, 1.2.1960, /home/jane/diagnoses.csv"


class Chart(Exception):
    """What a reader of one's own may raise."""


def loader(kind: str) -> Any:
    """A partition, which sees the data, that fails as readers of files do."""

    def split(labels: Any, natural: Any, clients: int, seed: int) -> Any:
        match kind:
            case "value":
                raise ValueError(f"row 3: {SECRET}")
            case "json":
                json.loads(f"[{SECRET}")
            case "number":
                np.array([SECRET]).astype(float)
            case "unicode":
                SECRET.encode().decode("utf-16", errors="strict")
                "é".encode("latin-1").decode()
            case "key":
                raise KeyError(SECRET)
            case "file":
                Path(f"/nowhere/{SECRET}").read_text()
            case "own":
                raise Chart(SECRET)
            case "chained":
                try:
                    raise KeyError(SECRET)
                except KeyError as error:
                    raise RuntimeError("could not read") from error

    return split


@pytest.mark.parametrize("kind", ["value", "json", "number", "unicode", "key", "file", "own", "chained"])
def test_errors_of_a_reader_tell_the_server_a_kind_and_a_number(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    data = Data(set="digits", clients=CLIENTS, partition={"name": "test_limits:loader", "kind": kind})
    experiment = EXPERIMENT.model_copy(update={"data": data})
    grid = Nodes(1)
    found = GridTransport(grid, Codec(), layout(), SPEC | {"experiment": experiment_out(experiment)}, poll=0.001)
    found.enrol(1)
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        found.send(task(0))
        arrival = found.wait()
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert arrival is not None
    words = arrival.reason.split()
    assert words[0].rstrip(",").endswith(("Error", "Chart"))
    assert words[1:2] + words[3:] == ["error", "in", "the", "device's", "log"]
    assert words[2] in caplog.text
    assert "Jane" not in arrival.reason
    assert "home" not in arrival.reason


def test_a_package_that_a_device_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    data = Data(set="digits", clients=CLIENTS, partition={"name": "dirichlet", "alpha": 0.77})
    experiment = EXPERIMENT.model_copy(update={"data": data})
    grid = Nodes(1)
    found = GridTransport(grid, Codec(), layout(), SPEC | {"experiment": experiment_out(experiment)}, poll=0.001)
    found.enrol(1)
    assert answered(found, 0).reason.startswith("partition dirichlet needs flwr-datasets; install prfl[sim]")


def test_what_leaves_a_device_is_the_update_and_numbers() -> None:
    grid = Nodes(1)
    asked = transport(grid, 1).message(task(0))
    asked.metadata.__dict__["_message_id"] = "m"
    reply = grid.reply(asked)
    assert reply is not None
    assert {k: list(v) for k, v in reply.content.items()} == {"config": ["prfl"]}
    update = Codec().decode_update(unpack(reply.content)[0], task(0), layout())
    assert set(update.metrics) == {"loss", "loss_first", "loss_last", "accuracy", "samples", "steps"}
    scores = grid.reply(transport(grid, 1).message(task(0), "evaluate"))
    assert scores is not None
    assert set(scores.content) == {"metrics"}
    assert set(scores.content.metric_records["metrics"]) == {"num-examples", "loss", "accuracy", "top5"}


def test_a_message_of_another_version_is_said() -> None:
    grid = Nodes(1)
    found = GridTransport(grid, Codec(), layout(), {k: SPEC[k] for k in ("experiment", "codec")}, poll=0.001)
    found.enrol(1)
    found.send(task(0))
    arrival = found.wait()
    assert arrival is not None
    assert arrival.reason == "the message lacks architecture: the server is of another version"


# What runs on a device


@pytest.mark.parametrize(
    "part", [{"model": "subprocess:Popen"}, {"data": {"set": "os:getcwd"}}, {"data": {"partition": "prfl.store:Run"}}]
)
def test_a_node_runs_no_part_that_it_does_not_trust(part: dict[str, Any]) -> None:
    experiment = Experiment.model_validate({**EXPERIMENT.model_dump(), **part})
    (named,) = [v if isinstance(v, str) else next(iter(v.values())) for v in part.values()]
    grid = Nodes(1)
    grid.contexts[1000].node_config["trusted"] = "torch mine"
    found = GridTransport(grid, Codec(), layout(), SPEC | {"experiment": experiment_out(experiment)}, poll=0.001)
    found.enrol(1)
    found.send(task(0))
    arrival = found.wait()
    assert arrival is not None
    assert arrival.reason == f"this node does not trust {named.partition(':')[0]}; it trusts torch, mine"
