"""The commands as a user meets them: every mistake is one line and leaves nothing behind; Ctrl-C leaves a whole run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prfl import cli

SMALL = (
    "data.clients=6",
    "model={name: mlp, hidden: [8]}",
    "pacing={name: buffered, in_flight: 4, goal: 2}",
    "work={steps: 2}",
    "stop={versions: 2}",
)
COMMAND = [sys.executable, "-m", "prfl"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["prfl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def small(*more: str, out: str = "out") -> list[str]:
    """`prfl run` of a run that takes a moment."""
    return ["run", "--workers", "serial", "--out", out, *SMALL, *more]


MISTAKES = {
    "unknown experiment": (["nope"], "no experiment 'nope'"),
    "two experiments": (["default", "default"], "one experiment at a time"),
    "unknown field": (["sead=1"], "no field 'sead', did you mean 'seed'?"),
    "unknown nested field": (["data.clinets=3"], "no field 'data.clinets', did you mean 'clients'?"),
    "unknown field in work": (["work.learning_rate=1"], "work: no field 'learning_rate'"),
    "unknown field in a part": (["pacing.gaol=3"], "pacing buffered: no field 'gaol', did you mean 'goal'?"),
    "unknown field in a nested part": (
        ["method={name: fedbuff, staleness: {name: hinge, c: 1}}"],
        "method fedbuff: staleness hinge: no field 'c'",
    ),
    "unknown method": (["method=pr_fll"], "method: no 'pr_fll', did you mean 'pr_fl'?"),
    "unknown kind of part": (["method={densty: constant}"], "method: no part 'densty'; have density, saliency"),
    "unknown part": (["method={density: cubik}"], "density: no 'cubik', did you mean 'cubic'?"),
    "unknown nested part": (["method={name: fedbuff, staleness: hing}"], "did you mean 'hinge'?"),
    "unknown model": (["model=conv3"], "model: no 'conv3', did you mean"),
    "unknown model option": (["model={name: mlp, width: 3}"], "model mlp: no field 'width'"),
    "unknown data set": (["data.set=mnits"], "data set: no 'mnits', did you mean 'mnist'?"),
    "unknown partition": (["data.partition=iidd"], "partition: no 'iidd', did you mean 'iid'?"),
    "unknown noise": (["data.noise.lables=0.1"], "noise: no field 'lables'"),
    "unknown selector": (["selector=randon"], "selector: no 'randon'"),
    "unknown network": (["devices.network=linkz"], "network: no 'linkz'"),
    "unknown codec option": (["codec.value=int8"], "codec: no field 'value'"),
    "unknown codec values": (["codec.values=int4"], "int4"),
    "unknown device": (["devices.mix={pi9: 1}"], "devices: no device 'pi9'; have pi3"),
    "unknown device field": (["devices.profiles={pi3: {spede: 1}}"], "pi3: no field 'spede'"),
    "no device file": (["devices.profiles=nowhere.yaml"], "no device file nowhere.yaml"),
    "bad mix": (["devices.mix={pi3: -1, pi4: 2}"], "devices: a mix needs shares of at least 0"),
    "fleet of another size": (["devices.fleet=pr_fl"], "the fleet has 10 devices for 6 clients"),
    "own part that is not there": (["method=nowhere:method"], "method: nowhere:method: No module named 'nowhere'"),
    "own part without a name in it": (["method=prfl.merge:nothing"], "no attribute 'nothing'"),
    "own part that is no part": (["method=prfl.cli:os"], "method: prfl.cli:os is not a class or a function"),
    "wrong type": (["seed=x"], "seed: Input should be a valid integer"),
    "wrong type of a section": (["data=3"], "data: Input should be a valid dictionary"),
    "wrong type of a part": (["method=3"], "method: a name or {name: ..., option: ...} is wanted, got 3"),
    "wrong type of a nested part": (
        ["method={merge: 3}"],
        "merge: a name or {name: ..., option: ...} is wanted, got 3",
    ),
    "wrong type in a part": (["pacing.goal=many"], "pacing buffered: goal: Input should be a valid integer"),
    "wrong type in work": (["work.lr=fast"], "work: lr: Input should be a valid number"),
    "wrong choice in work": (["work.loss=mse"], "work: loss: Input should be 'cross_entropy' or 'bce'"),
    "field of a number": (["seed.x=1"], "override x: there are no fields in 1"),
    "a part without a name": (["pacing={goal: 2}"], "pacing: a name is missing; have buffered"),
    "a part without what it needs": (["pacing={name: sync}"], "pacing sync: clients must be given"),
    "override that is not YAML": (["data={"], "override data: '{' is not a YAML value"),
    "density above one": (["method={name: heterofl, levels: [1.5]}"], "levels must be in (0, 1], got 1.5"),
    "density zero": (["method={density: {name: constant, keep: 0}}"], "keep must be in (0, 1], got 0"),
    "cut floor": (["method={cut: {floor: 1.5}}"], "cut: floor must be in [0, 1], got 1.5"),
    "class without a density": (
        ["method={name: heterofl, levels: {pi3: 0.5}}"],
        "tiers: levels have no device class",
    ),
    "head that the model lacks": (
        ["method={name: heterofl, head: [fc9.weight]}"],
        "no entry 'fc9.weight' for its head",
    ),
    "channels of a model without groups": (
        ["method=heterofl", "model={name: mlp, hidden: []}"],
        "cut: unit 'channels' needs a model with channel groups",
    ),
    "no data folder": (["data.set=mnist"], "data set mnist: no data folder given; pass --data-dir"),
    "empty data folder": (["data.set=mnist", "--data-dir", "."], "data set mnist: no "),
    "more clients than samples": (["data.clients=2000", "pacing.in_flight=4"], "partition dirichlet: 2000 clients for"),
    "partition by nobody": (["data.partition=natural"], "partition natural: this data set does not tell"),
    "goal out of reach": (["pacing={name: sync, clients: 20}"], "rounds of 20 updates can not be had from 6 clients"),
    "nothing in flight": (["pacing.in_flight=0"], "pacing: in_flight must be at least 1"),
    "no goal and no deadline": (["pacing={name: pacing, in_flight: 3, goal: .inf}"], "there must be a deadline"),
    "no end": (["stop={}"], "or the run has no end"),
    "accuracy in percent": (["stop={accuracy: 95}"], "accuracy is a share in (0, 1], got 95"),
    "no steps": (["work={epochs: 0}"], "work: epochs or steps must be 1 or more"),
    "negative rate": (["work.lr=-1"], "work: lr must be above 0"),
    "a name that is a path": (["name=../../x"], "name: String should match"),
    "unknown option": (["--wrokers", "serial"], "'--wrokers'"),
    "bad choice of workers": (["--workers", "many"], "'many' is not one of 'processes', 'ray', 'serial'"),
    "bad number of workers": (["--num-workers", "-1"], "-1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[mistake]
    assert called(monkeypatch, *small(*arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("prfl: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_experiments_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {
        "broken.yaml": (b"data: {", "broken.yaml: not YAML"),
        "binary.yaml": (b"\xff\xfe\x00", "binary.yaml: not YAML"),
        "list.yaml": (b"[1, 2]", "an experiment is a mapping of fields, got list"),
        "text.yaml": (b"hello", "an experiment is a mapping of fields, got str"),
        "keys.yaml": (b"{1: 2}", "keys.yaml: "),
        "none.yaml": (b"data:", "none.yaml: data: Input should be a valid dictionary"),
    }
    for name, (content, message) in bad.items():
        (tmp_path / name).write_bytes(content)
        assert called(monkeypatch, "run", name, "--out", "out") == 2
        error = capsys.readouterr().err
        assert (error.count("\n"), message in error) == (1, True), error
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_run_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *small()) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert called(monkeypatch, *small("seed=9")) == 2
    assert "out holds a run already" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()} == before
    (tmp_path / "file").touch()
    assert called(monkeypatch, *small(out="file")) == 2
    assert "is a file" in capsys.readouterr().err


def test_without_out_every_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        assert called(monkeypatch, "run", "--workers", "serial", "name=mine", *SMALL) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["mine", "mine-2"]


def test_piped_output_is_plain_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "a_folder_with_a_name_that_is_so_long_that_it_would_not_fit_into_any_table")
    assert called(monkeypatch, *small("evaluate_every=1", out=out)) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads((Path(out) / "summary.json").read_text())
    assert lines[0] == f"pr_fl, buffered, digits, 6 clients, seed 1: {out}"
    assert sum(line.startswith("version ") for line in lines) == 3
    assert lines[-1] == f"  run folder           {out}"
    assert lines[-2] == f"  model sha256         {result['model_sha256']}"


def test_a_run_in_which_everything_fails_is_whole_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *small("work={epochs: 5, lr: 1.0e+30}", "stop={versions: 50}")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "tasks failed" in error
    summary = whole(tmp_path / "out")
    assert summary["stopped"] in error
    assert summary["interrupted"] is False


def whole(folder: Path) -> dict[str, object]:
    """The summary of a run folder in which nothing is broken or missing."""
    names = {
        "clients.json",
        "config.yaml",
        "env.json",
        "events.jsonl",
        "split.json",
        "summary.json",
        "model.safetensors",
        "state",
    }
    assert {p.name for p in folder.iterdir()} - {".lock"} == names
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    merges = [e["version"] for e in events if e["kind"] == "merge"]
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    assert merges == list(range(1, len(merges) + 1))
    assert summary["versions"] == len(merges)
    assert load_file(folder / "model.safetensors")
    return summary


def started(*arguments: str) -> subprocess.Popen[str]:
    """A run in a process group of its own, that hears Ctrl-C as on a terminal; it has merged at least once."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    events, end = Path("out/events.jsonl"), time.monotonic() + 120
    while not (events.exists() and '"kind":"merge"' in events.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return process


LONG = ("data.clients=6", "pacing={name: buffered, in_flight: 4, goal: 2}", "stop={versions: 1000000}", "--out", "out")
QUICK = ("model={name: mlp, hidden: [8]}", "work={steps: 2}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers", [("serial",), ("processes", "--num-workers", "2"), ("ray", "--num-workers", "2")], ids=lambda w: w[0]
)
def test_ctrl_c_leaves_a_whole_run_and_no_noise(workers: Sequence[str], tmp_path: Path) -> None:
    process = started("run", "--workers", *workers, *QUICK, *LONG)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    summary = whole(tmp_path / "out")
    assert summary["interrupted"] is True
    assert error.splitlines() == [f"prfl: interrupted; out is complete up to version {summary['versions']}"]


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_nothing_broken(tmp_path: Path) -> None:
    samples = "data.set={name: synthetic, shape: [1, 16, 16], samples: 1000, test: 60000}"
    process = started("run", "--workers", "serial", "test=end", samples, *LONG)
    os.killpg(process.pid, signal.SIGINT)
    end = time.monotonic() + 120
    while not Path("out/model.safetensors").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # while the test split is scored
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error == ""
    names = {p.name for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert names - {".lock"} == {"config.yaml", "env.json", "events.jsonl", "split.json", "model.safetensors"}
    assert load_file("out/model.safetensors")
    assert all(json.loads(line) for line in Path("out/events.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_a_terminal_shows_a_picture_that_fits(tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *small("evaluate_every=1")],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"} | {"COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(120) == 0
    text = shown.decode()
    for label in (
        "version",
        "2 of 2",
        "virtual",
        "validation",
        "in flight",
        "staleness",
        "down + up",
        "density by class",
    ):
        assert label in text
    assert json.loads(Path("out/summary.json").read_text())["model_sha256"] in text


def test_help_is_quick_and_clear() -> None:
    code = "import sys; from prfl.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    for arguments, words in (
        ([], ("run", "methods", "devices")),
        (["run", "--help"], ("EXPERIMENT", "KEY=VALUE", "--out", "--workers", "--num-workers", "--data-dir")),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words)


def test_the_first_line_comes_before_torch() -> None:
    code = "import sys; from prfl import config, store; from sim import experiments; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_methods_and_devices_fit_in_a_hundred_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sim import devices
    from strategies import table

    assert called(monkeypatch, "methods") == 0
    shown = capsys.readouterr().out
    for name, row in table.METHODS.items():
        assert all(word in shown for word in (name, row.pacing, row.paper, *table.described(row.make())))
    assert called(monkeypatch, "devices") == 0
    shown += (known := capsys.readouterr().out)
    lines = {line.split()[0]: line for line in known.splitlines() if line.strip()}
    for name, device in devices.load().items():
        assert ("measured" if device.measured else "estimated") in lines[name]
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown
