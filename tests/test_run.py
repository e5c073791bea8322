"""A run from experiment to folder: the same to the bit, honest sums, splits that never touch, an end that is an end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prfl import config, models, problem, store
from prfl.archives import DataError
from prfl.config import Experiment
from prfl.interrupt import Gate
from prfl.tally import Tally
from sim import experiments, pools
from sim.run import simulate

SMALL = ["data.clients=8", "model={name: mlp, hidden: [16]}", "pacing={name: buffered, in_flight: 5, goal: 3}",
         "work={steps: 3}", "stop={versions: 6}", "evaluate_every=2"]  # fmt: skip
HASHES = ("model_sha256", "events_sha256")
NEEDED = {
    "method", "pacing", "seed", "versions", "virtual_seconds", "wall_seconds", "client_updates", "test_accuracy",
    "test_loss", "validation_accuracy", "best_validation_accuracy", "bytes_up", "bytes_down", "mean_density",
    "final_density", "model_sha256", "events_sha256", "stopped",
}  # fmt: skip


def small(*more: str) -> Experiment:
    return config.load(experiments.path("default"), [*SMALL, *more])


def events(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [e for e in found if kind in ("", e["kind"])]


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path: Path) -> None:
    seeds = (1, 1, 2)
    runs = [simulate(small(f"seed={s}"), tmp_path / str(i)) for i, s in enumerate(seeds)]
    for key in HASHES:
        assert runs[0][key] == runs[1][key] != runs[2][key]
    stripped = [[{k: v for k, v in e.items() if k != "wall"} for e in events(tmp_path / str(i))] for i in range(3)]
    assert stripped[0] == stripped[1] != stripped[2]


@pytest.mark.parametrize(
    "changes",
    [
        ["method={name: pr_fl, every: 2}"],
        ["method={name: fedbuff, staleness: {name: hinge, a: 2}}", "codec.values=float16"],
        ["method={density: {name: cubic, last: 4}, merge: r2sp, remask: {every: 2}}", "devices.spread=0.3"],
        ["method={name: heterofl, levels: {pi3: 0.3, pi4: 0.5, jetson_nano: 1, laptop: 1}}", "data.noise.labels=0.1"],
        ["devices.fleet={name: links, down: [1, 2], up: [1, 1], clients: 8}", "devices.network=pr_fl", "residual=true"],
    ],
)
def test_the_config_of_a_run_gives_the_same_run(tmp_path: Path, changes: list[str]) -> None:
    first = simulate(small(*changes), tmp_path / "a")
    again = simulate(config.load(tmp_path / "a" / "config.yaml"), tmp_path / "b")
    assert [first[key] for key in HASHES] == [again[key] for key in HASHES]
    assert (tmp_path / "a" / "config.yaml").read_text() == (tmp_path / "b" / "config.yaml").read_text()


def test_the_summary_adds_up_to_the_events(tmp_path: Path) -> None:
    result = simulate(small("method={name: pr_fl, every: 2, floor: 0.3}", "stop.versions=10"), tmp_path)
    arrivals, sends = events(tmp_path, "arrival"), events(tmp_path, "send")
    used = [e for e in arrivals if e["used"]]
    latest = {e["client"]: e["density"] for e in sends}
    last = events(tmp_path, "evaluation")[-1]
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    assert result.keys() >= NEEDED
    assert result["bytes_up"] == sum(e["bytes_up"] for e in arrivals)
    assert result["bytes_down"] == sum(e["bytes_down"] for e in arrivals)
    assert result["client_updates"] == len(used) == sum(e["updates"] for e in events(tmp_path, "merge"))
    assert result["failed_updates"] == len(arrivals) - len(used)
    assert result["mean_density"] == pytest.approx(sum(e["density"] for e in used) / len(used))
    assert result["final_density"] == pytest.approx(sum(latest.values()) / len(latest))
    assert result["final_density"] < 1
    assert result["virtual_seconds"] == max(e["at"] for e in events(tmp_path))
    assert (result["test_accuracy"], result["validation_accuracy"]) == (
        last["test_accuracy"],
        last["validation_accuracy"],
    )
    assert result["best_validation_accuracy"] == max(e["validation_accuracy"] for e in events(tmp_path, "evaluation"))
    assert sum(result["updates_by_class"].values()) == len(used)
    assert result["stopped"] is None


def test_the_test_split_may_be_left_to_the_end(tmp_path: Path) -> None:
    always, end = (simulate(small(f"test={when}"), tmp_path / when) for when in ("always", "end"))
    assert all("test_accuracy" in e for e in events(tmp_path / "always", "evaluation"))
    assert not any(k.startswith("test") for e in events(tmp_path / "end", "evaluation") for k in e)
    for key in ("model_sha256", "test_accuracy", "test_loss", "validation_accuracy", "best_validation_accuracy"):
        assert always[key] == end[key]


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_that_ships_runs(name: str, tmp_path: Path) -> None:
    experiment = config.load(experiments.path(name), ["stop={versions: 2}", "evaluate_every=1", "test=end"])
    given = os.environ.get("PRFL_DATA")
    try:
        result = simulate(experiment, tmp_path, data_dir=Path(given) if given else None)
    except DataError as absent:
        pytest.skip(str(absent))
    assert (result["versions"], result["stopped"]) == (2, None)


def test_all_device_classes_take_part_in_the_default_experiment(tmp_path: Path) -> None:
    changes = ["work.epochs=1", "stop={updates: 120}", "evaluate_every=100", "selector=round_robin"]
    result = simulate(config.load(experiments.path("default"), changes), tmp_path)
    assert set(result["updates_by_class"]) == {"pi3", "pi4", "jetson_nano", "laptop"}
    assert 120 <= result["client_updates"] < 130


@pytest.mark.parametrize(
    ("stop", "key", "least"), [("seconds: 1.5", "virtual_seconds", 1.5), ("updates: 7", "client_updates", 7),
                               ("accuracy: 0.2", "best_validation_accuracy", 0.2)]
)  # fmt: skip
def test_a_run_ends_at_what_was_asked(tmp_path: Path, stop: str, key: str, least: float) -> None:
    result = simulate(small(f"stop={{{stop}, versions: 500}}", "evaluate_every=1", "work.lr=0.3"), tmp_path)
    assert result[key] >= least
    assert result["versions"] < 500


def same(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many samples of a are in b."""
    known = {row.numpy().tobytes() for row in b}
    return sum(row.numpy().tobytes() in known for row in a)


def test_training_validation_and_test_never_share_a_sample() -> None:
    changes = ["data.set={name: synthetic, samples: 400, test: 100}", "data.clients=5"]
    given = problem.build(config.load(None, changes))
    clients = torch.cat([given.samples(c).x for c in range(5)])
    splits = {"train": clients, "validation": given.validation.x, "test": given.dataset.test.x}
    assert {k: len(v) for k, v in splits.items()} == {"train": 360, "validation": 40, "test": 100}
    for one in splits:
        assert same(splits[one], splits[one]) == len(splits[one])
        assert all(same(splits[one], splits[other]) == 0 for other in splits if other != one)


def test_the_problem_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (problem.build(small(f"seed={seed}")) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert store.model_sha256(models.values(a.model)) == store.model_sha256(models.values(b.model))
    assert store.model_sha256(models.values(a.model)) != store.model_sha256(models.values(c.model))
    assert all(torch.equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))
    assert torch.equal(a.validation.x, b.validation.x)


def test_a_part_that_fails_on_the_way_ends_the_run_whole(tmp_path: Path) -> None:
    regrow = "method={density: {name: recover, first: constant, metric: sharpness, every: 1}}"
    result = simulate(small(regrow), tmp_path)
    assert result["stopped"].startswith("recover: no client reports 'sharpness'")
    assert result["versions"] == 0
    assert (tmp_path / "model.safetensors").exists()


def test_ctrl_c_between_a_merge_and_its_state_waits(tmp_path: Path) -> None:
    def watch(event: Mapping[str, Any], tally: Tally) -> None:
        if event["kind"] == "merge" and event["version"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    result = simulate(small(), tmp_path, watch=watch)
    assert (result["stopped"], result["interrupted"], result["versions"]) == ("interrupted", True, 3)
    assert [e["version"] for e in events(tmp_path, "merge")] == [1, 2, 3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_open_gate_lets_ctrl_c_through_and_a_shut_one_keeps_it() -> None:
    with Gate() as gate:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        gate.shut()
        gate.shut()
        os.kill(os.getpid(), signal.SIGINT)
        gate.open()
        with pytest.raises(KeyboardInterrupt):
            gate.open()


def test_tasks_given_up_are_in_flight_no_more() -> None:
    send = {"kind": "send", "at": 0.0, "client": 0, "density": 1.0}
    came = {"kind": "arrival", "at": 1.0, "client": 0, "density": 1.0, "staleness": 0, "used": True}
    for drop_late, want in ((True, 0), (False, 1)):
        tally = Tally({0: "a", 1: "a"}, drop_late)
        tally(send)
        tally({**send, "client": 1})
        tally({**came, "bytes_up": 1, "bytes_down": 2})
        tally({"kind": "merge", "at": 1.0, "version": 1})
        assert len(tally.at_work) == want


@pytest.mark.slow
def test_actors_give_the_same_run(tmp_path: Path) -> None:
    experiment = small("method={name: pr_fl, every: 2}")
    here = simulate(experiment, tmp_path / "serial")
    there = simulate(experiment, tmp_path / "processes", pool=pools.Place(2))
    assert [here[key] for key in HASHES] == [there[key] for key in HASHES]
