"""From YAML to objects: overrides, parts by name, by their options and from a user's own module, and every default."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prfl import config, density, merge, models
from prfl.config import ConfigError, Experiment
from prfl.cut import Cut
from prfl.staleness import hinge
from prfl.types import Work
from sim import experiments, plan
from strategies import pacing, table
from strategies.method import never, rerank

OWN = """
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prfl.types import Arrival, Density, State

if TYPE_CHECKING:
    from nowhere import Nothing

@dataclass(frozen=True)
class halves:
    share: float = 0.5

    def init(self) -> None:
        return None

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        return self.share

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> None:
        return None

@dataclass(frozen=True)
class outer:
    inside: Density
    first: int = 3

class plain:
    def __init__(self, steps: int = 2):
        self.steps = steps

def unresolved(value: Nothing = 1) -> Any:
    return value
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module."""
    (tmp_path / "my_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    return "my_parts"


def written(folder: Path, text: str) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return path


def test_without_a_file_there_are_defaults() -> None:
    assert config.load(None) == Experiment()
    assert config.load(None, ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("text", "override", "want"),
    [
        ("pacing: {name: buffered, in_flight: 8, goal: 4}", "pacing.goal=5", pacing.buffered(8, 5)),
        ("", "pacing.goal=5", pacing.buffered(30, 5)),
        ("pacing: sync", "pacing.clients=5", pacing.sync(5)),
        ("pacing: sync", "pacing={name: window, in_flight: 3, seconds: 2}", pacing.window(3, 2.0)),
    ],
)
def test_overrides_reach_into_a_part(tmp_path: Path, text: str, override: str, want: pacing.Pacing) -> None:
    experiment = config.load(written(tmp_path, text), [override])
    assert config.part("pacing", experiment.pacing, pacing.TABLE) == want


def test_overrides_leave_the_rest_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {clients: 7}\nstop: {seconds: 3}")
    experiment = config.load(path, ["data.validation=0.2", "stop.versions=4", "devices.mix.pi5=1", "work.lr=1e-2"])
    assert (experiment.data.clients, experiment.data.validation) == (7, 0.2)
    assert (experiment.stop.seconds, experiment.stop.versions) == (3, 4)
    assert experiment.devices.mix == {**Experiment().devices.mix, "pi5": 1}
    assert config.work(experiment.work).lr == 0.01


def test_a_method_may_be_a_name_or_its_parts(tmp_path: Path) -> None:
    assert table.method(config.load(None, ["method=fedbuff"]).method, Work()) == table.method("fedbuff", Work())
    text = """
method:
  density: {name: cubic, end: 0.2, last: 10}
  merge: {name: momentum, beta: 0.5, inner: {name: masked_mean, missing: residual, staleness: {name: hinge, b: 2}}}
  cut: {spread: erk}
  remask: {every: 5}
work: {lr: 0.3}
"""
    experiment = config.load(written(tmp_path, text))
    made = table.method(experiment.method, config.work(experiment.work))
    assert made.density == density.cubic(end=0.2, last=10)
    assert made.merge == merge.momentum(merge.masked_mean("residual", hinge(b=2)), 0.5)
    assert (made.cut, made.remask, made.work) == (Cut(spread="erk"), rerank(5), Work(lr=0.3))
    assert table.method({"remask": "never"}, Work()).remask == never()


def test_work_of_a_method_goes_over_the_experiment_s() -> None:
    made = table.method({"name": "fedprox", "mu": 0.5, "work": {"lr": 0.3}}, Work(lr=0.7, batch=3))
    assert made.work == Work(lr=0.3, batch=3, proximal=0.5)


def test_a_part_of_one_s_own(own: str) -> None:
    made = table.method({"density": {"name": f"{own}:halves", "share": 0.25}}, Work())
    assert made.density.share == 0.25  # type: ignore[attr-defined]
    nested = config.part("density", {"name": f"{own}:outer", "inside": "constant", "first": 4}, {})
    assert (nested.inside, nested.first) == (density.constant(), 4)
    assert config.part("any", {"name": f"{own}:plain", "steps": "4"}, {}).steps == 4
    assert config.part("any", {"name": f"{own}:unresolved", "value": 5}, {}) == 5
    assert config.spelled(f"{own}:halves", {}) == {"name": f"{own}:halves", "share": 0.5}
    with pytest.raises(ConfigError, match="no field 'shore', did you mean 'share'"):
        config.part("density", {"name": f"{own}:halves", "shore": 1}, {})
    with pytest.raises(ConfigError, match="steps: Input should be a valid integer"):
        config.part("any", {"name": f"{own}:plain", "steps": "x"}, {})


def test_a_broken_module_of_one_s_own_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^density: my_broken:x: division by zero$"):
        config.part("density", "my_broken:x", {})


@pytest.mark.parametrize("name", sorted(table.METHODS))
def test_a_method_spelled_out_is_the_same_method(name: str) -> None:
    spec = table.spelled(name)
    made, again = table.method(name, Work()), table.method(spec, Work())
    assert (made.density, made.saliency, made.merge) == (again.density, again.saliency, again.merge)
    assert (made.cut, made.remask, made.work) == (again.cut, again.remask, again.work)
    assert table.spelled(spec) == spec


def test_parts_are_spelled_out_to_the_last_option() -> None:
    assert config.spelled({"name": "momentum", "inner": "fedbuff"}, merge.TABLE) == {
        "name": "momentum",
        "inner": {
            "name": "fedbuff",
            "lr": 1.0,
            "missing": "everyone",
            "staleness": {"name": "polynomial", "a": 0.5},
            "weigh": "uniform",
        },
        "beta": 0.9,
        "lr": 1.0,
    }
    assert config.spelled("mlp", models.TABLE) == {"name": "mlp", "hidden": [200, 200]}
    assert table.spelled({"cut": {"floor": 0.1}})["cut"] == {"name": "cut", **config.plain(vars(Cut(floor=0.1)))}
    assert set(table.spelled({"density": "cubic"})) == set(table.PARTS)


def test_an_experiment_spelled_out_is_the_same_and_stands_alone() -> None:
    experiment = config.load(experiments.path("default"), ["devices.spread=0.2"])
    full = plan.spelled(experiment)
    assert plan.of(full).fleet == plan.of(experiment).fleet
    assert plan.spelled(full) == full
    assert set(full.devices.profiles or {}) == set(experiment.devices.mix)
    assert set(full.work) == set(Work.__dataclass_fields__)


def test_experiments_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert "default" in experiments.names()
    assert experiments.chosen([]) == (experiments.path("default"), [])
    path = written(tmp_path, "seed: 1")
    assert experiments.chosen(["a=1", str(path), "b.c=2"]) == (path, ["a=1", "b.c=2"])
