"""Comparisons: the runs are those that would have been run alone, on one pool, and what is there is not run again."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import prfl
from prfl import cli, config, sinks, store
from prfl.config import ConfigError, Experiment
from prfl.tally import Tally
from sim import compare, experiments, pools
from sim.run import simulate
from strategies import pacing as pacings
from strategies import table

SMALL = {"data.clients": 6, "model": {"name": "mlp", "hidden": [8]}, "work": {"steps": 2}, "stop": {"versions": 2},
         "pacing": {"name": "buffered", "in_flight": 4, "goal": 2}, "evaluate_every": 1}  # fmt: skip
CHANGES = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
HASHES = ("model_sha256", "events_sha256")


def small(*more: str) -> Experiment:
    return config.load(experiments.path("default"), [*CHANGES, *more])


def ended(todo: list[compare.Job], workers: int | None = None) -> list[compare.Outcome]:
    with pools.kept(pools.Place(workers)) as pool:
        return list(compare.run(todo, pool))


def test_the_runs_are_those_that_would_be_run_alone(tmp_path: Path) -> None:
    todo = compare.jobs(small(), ["fedavg", "pr_fl"], [1, 2], tmp_path)
    assert [job.folder.relative_to(tmp_path).as_posix() for job in todo] == [
        "fedavg/seed-1", "pr_fl/seed-1", "fedavg/seed-2", "pr_fl/seed-2"
    ]  # fmt: skip
    for i, outcome in enumerate(ended(todo)):
        alone = simulate(todo[i].experiment, tmp_path / f"alone-{i}")
        assert outcome.summary is not None
        assert [outcome.summary[key] for key in HASHES] == [alone[key] for key in HASHES]
        assert not outcome.found


@pytest.mark.slow
def test_one_pool_of_actors_gives_the_same_runs_whatever_it_did_before(tmp_path: Path) -> None:
    here = ended(compare.jobs(small(), ["fedavg", "fedbuff"], [1, 2], tmp_path / "serial"))
    there = ended(compare.jobs(small(), ["fedavg", "fedbuff"], [1, 2], tmp_path / "ray"), workers=2)
    for a, b in zip(here, there, strict=True):
        assert a.summary is not None
        assert b.summary is not None
        assert [a.summary[key] for key in HASHES] == [b.summary[key] for key in HASHES]


def test_a_bare_name_has_the_options_of_the_experiment_and_the_others_their_own(tmp_path: Path) -> None:
    own = small("method={name: pr_fl, floor: 0.4}")
    todo = compare.jobs(own, ["pr_fl", {"name": "pr_fl", "floor": 0.2}, "fedbuff"], [3], tmp_path)
    assert [job.label for job in todo] == ["pr_fl", "pr_fl-2", "fedbuff"]
    assert [job.experiment.method for job in todo] == [
        {"name": "pr_fl", "floor": 0.4},
        {"name": "pr_fl", "floor": 0.2},
        "fedbuff",
    ]
    assert {job.experiment.seed for job in todo} == {3}
    assert {json.dumps(job.experiment.pacing) for job in todo} == {json.dumps(own.pacing)}


def test_what_is_there_is_not_run_again_and_what_is_half_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = compare.jobs(small(), ["fedavg", "fedbuff", "fedprox"], [1], tmp_path)
    first = ended(todo)
    (todo[1].folder / "summary.json").unlink()
    cut = json.loads((todo[2].folder / "summary.json").read_text())
    (todo[2].folder / "summary.json").write_text(json.dumps({**cut, "interrupted": True}))
    ran: list[Path] = []
    monkeypatch.setattr(
        compare, "simulate", lambda e, folder, **more: ran.append(folder) or simulate(e, folder, **more)
    )
    again = ended(todo)
    assert ran == [todo[1].folder, todo[2].folder]
    assert [o.found for o in again] == [True, False, False]
    for a, b in zip(first, again, strict=True):
        assert a.summary is not None
        assert b.summary is not None
        assert [a.summary[key] for key in HASHES] == [b.summary[key] for key in HASHES]


def test_ctrl_c_in_a_run_ends_the_script_that_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(e: Experiment, folder: Path, **more: Any) -> dict[str, Any]:
        return simulate(e, folder, **more) | {"interrupted": True}

    monkeypatch.setattr("sim.run.simulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prfl.run("default", SMALL, out=tmp_path / "one", workers="serial")
    assert store.summary(tmp_path / "one")["versions"] > 0


def test_a_run_that_another_process_is_at_is_neither_removed_nor_run(tmp_path: Path) -> None:
    (job,) = compare.jobs(small(), ["fedavg"], [1], tmp_path)
    with store.alone(job.folder):
        (job.folder / "events.jsonl").write_text("half\n")
        (outcome,) = ended([job])
        with pytest.raises(ValueError, match="its run is under way"):
            simulate(job.experiment, job.folder)
        assert (job.folder / "events.jsonl").read_text() == "half\n"
    assert outcome.summary is None
    assert outcome.reason.endswith("its run is under way")
    assert ended([job])[0].summary


def test_a_folder_of_another_comparison_is_left_alone(tmp_path: Path) -> None:
    ended(compare.jobs(small(), ["fedavg"], [1], tmp_path))
    with pytest.raises(ConfigError, match="another experiment; choose another --out"):
        compare.jobs(small("work.lr=0.05"), ["fedavg"], [1], tmp_path)


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    bad = {"name": "heterofl", "head": ["nothing.weight"]}
    outcomes = ended(compare.jobs(small(), [bad, "fedavg"], [1, 2], tmp_path))
    assert [o.summary is None for o in outcomes] == [True, False, True, False]
    assert "nothing.weight" in outcomes[0].reason
    found = prfl.compare("default", SMALL, methods=[bad, "fedavg"], seeds=[1, 2], out=tmp_path, workers="serial")
    assert set(found.failed) == {"heterofl, seed 1", "heterofl, seed 2"}
    assert list(found.runs) == ["fedavg"]
    assert found.report is not None
    assert "Failed: heterofl, seed 1 (" in found.report.read_text()


def test_ctrl_c_ends_a_comparison_and_the_run_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*given: Any, **more: Any) -> dict[str, Any]:
        os.kill(os.getpid(), 2)
        raise AssertionError

    todo = compare.jobs(small(), ["fedavg"], [1], tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("strategies.run.serve", cut)
        with pytest.raises(KeyboardInterrupt):
            ended(todo)
    assert not compare.done(todo[0].folder)
    assert ended(todo)[0].summary is not None


@pytest.mark.parametrize(
    ("methods", "seeds", "said"),
    [
        (["fedavgg"], [1], "did you mean 'fedavg'"),
        (["fedavg", "fedavg"], [1], "fedavg is named twice"),
        (["fedavg"], [2, 2], "2 is named twice"),
        ([], [1], "a method and a seed"),
        (["fedavg"], [-1], "seed"),
    ],
)
def test_what_can_not_be_compared_is_one_line_before_anything_runs(
    methods: list[Any], seeds: list[int], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as line:
        compare.jobs(small(), methods, seeds, tmp_path)
    assert "\n" not in str(line.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "1", "a: {", "[", "a,,b"])
def test_methods_that_are_none_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="methods: "):
        compare.specs(text)


def test_methods_of_a_command_line() -> None:
    assert compare.specs("fedavg, {name: pr_fl, floor: 0.2},own.module:part") == [
        "fedavg", {"name": "pr_fl", "floor": 0.2}, "own.module:part"
    ]  # fmt: skip


@pytest.mark.parametrize("name", table.METHODS)
def test_usual_pacings_take_what_the_experiment_says(name: str) -> None:
    general = small("pacing={name: pacing, in_flight: 4, goal: 2, deadline: 1.5, max_staleness: 7}")
    spec = compare.usual_pacing(name, general)
    assert config.name(spec) == table.METHODS[name].pacing
    made: pacings.Pacing = config.part("pacing", spec, pacings.TABLE)
    assert made.in_flight == 4
    if config.name(spec) == "window":
        assert made.deadline == 1.5
    if config.name(spec) == "buffered":
        assert (made.goal, made.max_staleness) == (2, 7)
    if config.name(spec) == "sync":
        assert (made.goal, made.deadline) == (4, float("inf"))


def test_a_usual_pacing_that_lacks_a_number_is_one_line() -> None:
    assert compare.usual_pacing("fedbuff", small()) == small().pacing
    assert compare.usual_pacing("own.module:part", small()) == small().pacing
    with pytest.raises(ConfigError, match="fedfix: its usual pacing, window, needs seconds"):
        compare.usual_pacing("fedfix", small())


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prfl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["compare", *CHANGES, "--methods", "fedavg,fedbuff", "--seeds", "1,2", "--workers", "serial"]
    assert command(monkeypatch, *asked, "--targets", "0.05,0.1") == 0
    home = Path("runs/default-compare")
    assert "4 runs: runs/default-compare" in capsys.readouterr().out
    assert {p.name for p in home.iterdir()} == {
        "fedavg", "fedbuff", "report.html", "report.md", "report-accuracy.svg", "summaries.json",
    }  # fmt: skip
    told = json.loads((home / "summaries.json").read_text())
    assert told == {
        m: [json.loads((home / m / f"seed-{s}" / "summary.json").read_text()) for s in (1, 2)]
        for m in ("fedavg", "fedbuff")
    }
    picture = ElementTree.fromstring((home / "report-accuracy.svg").read_text())
    panels = [e for e in picture if e.tag.endswith("svg")]
    assert [float(p.attrib["x"]) for p in panels] == [0.0, 320.0, 640.0]
    assert all(sum("polyline" in e.tag for e in p) == 2 for p in panels)  # a curve for each method
    assert "![Accuracy and its cost](report-accuracy.svg)" in (home / "report.md").read_text()
    assert "| until accuracy | 0.05 | 0.1 |" in (home / "report.md").read_text()
    assert "Pacing: buffered (in\\_flight 4, goal 2), for every method." in (home / "report.md").read_text()
    assert command(monkeypatch, *asked, "--usual-pacing", "--out", "usual") == 0
    assert "pacings of their own" in Path("usual/report.md").read_text()
    capsys.readouterr()
    assert command(monkeypatch, *asked) == 0
    assert capsys.readouterr().out.count("was there") == 4
    assert command(monkeypatch, "compare", str(home), "--out", "again") == 0
    assert Path("again/report.md").read_text().count("fedavg") == (home / "report.md").read_text().replace(
        "0.05", ""
    ).count("fedavg")
    assert command(monkeypatch, "report", str(home / "fedavg" / "seed-1")) == 0
    assert (home / "fedavg" / "seed-1" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare"], "--methods"),
        (["compare", "nowhere"], "nowhere holds no finished run"),
        (["compare", "--methods", "fedavg", "--seeds", "one"], "--seeds: numbers with commas between"),
        (["compare", "--methods", "fedavg", "sead=1"], "did you mean 'seed'"),
        (["report", "nowhere"], "nowhere holds no finished run"),
        (["run", "--log", "tensorbord"], "log: no 'tensorbord', did you mean 'tensorboard'?"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_from_python(tmp_path: Path) -> None:
    result = prfl.run("default", {**SMALL, "method": "fedbuff", "seed": 4}, out=tmp_path / "one", workers="serial")
    assert result.folder == tmp_path / "one"
    assert dict(result) == store.summary(tmp_path / "one")
    assert (result["method"], result["seed"], len(result)) == ("fedbuff", 4, len(store.summary(tmp_path / "one")))
    found = prfl.compare(
        "default", SMALL, methods=["fedavg", "fedbuff"], seeds=[1], out=tmp_path / "two", workers="serial"
    )
    assert {k: [r["seed"] for r in v] for k, v in found.runs.items()} == {"fedavg": [1], "fedbuff": [1]}
    assert found.report == tmp_path / "two" / "report.html"
    assert found.report.exists()
    with pytest.raises(ConfigError, match="workers"):
        prfl.run("default", SMALL, out=tmp_path / "three", workers="many")
    with pytest.raises(ConfigError, match="is no value of an experiment"):
        prfl.run("default", {"seed": object()}, out=tmp_path / "three", workers="serial")
    with pytest.raises(ConfigError, match="no field 'sead'"):
        prfl.run("default", {"sead": 1}, out=tmp_path / "three", workers="serial")
    with pytest.raises(AttributeError, match="nothing"):
        prfl.nothing  # noqa: B018


def test_the_package_is_light_until_it_is_asked_for_more() -> None:
    code = "import sys, prfl; print([m for m in ('torch', 'numpy', 'flwr', 'ray', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_sink_that_is_not_installed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=rf"log: {name} is not installed; pip install 'prfl\[{name}\]'"):
            sinks.Sinks([name], tmp_path, {})


def told(folder: Path, *names: str) -> Mapping[str, Any]:
    """A run of which these sinks hear."""
    experiment = small()
    heard = sinks.Sinks(names, folder, config.plain(experiment.model_dump()))
    with heard:
        result = simulate(experiment, folder, watch=heard)
        heard.ended(result)
    return result


def wanted(folder: Path) -> dict[int, float]:
    """Validation accuracy by version."""
    return {e["version"]: e["validation_accuracy"] for e in store.events(folder) if e["kind"] == "evaluation"}


def test_tensorboard_is_told(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(tmp_path / "run", "tensorboard")
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = {e.step: e.value for e in read.Scalars("validation/accuracy")}
    assert found == pytest.approx(wanted(tmp_path / "run"))
    times = [e["at"] for e in store.events(tmp_path / "run") if e["kind"] == "merge"]
    assert [e.wall_time for e in read.Scalars("merge/coverage")] == pytest.approx(times)
    assert {"cost/bytes_up", "run/staleness", "merge/updates", "test/accuracy"} <= set(read.Tags()["scalars"])


def test_mlflow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    result = told(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("default").experiment_id])
    assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "validation/accuracy")} == wanted(
        tmp_path / "run"
    )
    assert (run.info.status, run.data.params["data.clients"]) == ("FINISHED", "6")
    assert run.data.metrics["summary/test_accuracy"] == result["test_accuracy"]


def test_wandb_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert {"project", "name", "dir", "config"} <= set(inspect.signature(wandb.init).parameters)
    told(tmp_path / "run", "wandb")
    wandb.teardown()  # as at the end of the process: its service writes behind
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    for name in (b"validation/accuracy", b"cost/bytes_up", b"merge", b"test_accuracy"):
        assert name in log.read_bytes()


def test_a_sink_hears_nothing_of_single_tasks() -> None:
    tally = Tally({0: "a"})
    assert sinks.scalars({"kind": "send", "at": 0.0, "client": 0}, tally) == {}
    assert sinks.scalars({"kind": "join", "at": 0.0, "client": 0, "class": "a"}, tally) == {}
    assert sinks.flat({"a": {"b": 1, "c": {"d": [2]}}, "e": "x"}) == {"a.b": 1, "a.c.d": [2], "e": "x"}


def test_a_union_of_masks_covers_what_any_of_them_holds() -> None:
    from prfl import masks, overlap

    params = {"w": torch.zeros(2, 4), "b": torch.zeros(4)}
    left = masks.Mask({"w": torch.tensor([[True, True, False, False]] * 2)})
    odd = masks.Mask({"w": torch.tensor([[True, False, True, False]] * 2)})
    assert overlap.covered([left], params) == 0.5
    assert overlap.covered([left, odd, left], params) == 0.75
    assert overlap.covered([left, masks.DENSE], params) == 1.0
    assert overlap.covered([], params) == 0.0
