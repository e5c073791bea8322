"""Workers: Ray's results are those of this process to the bit, whatever dies underneath."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from world import CLIENTS, PACINGS, World, method

from prfl.partition import Noise
from prfl.problem import Problem
from prfl.samples import Dataset
from prfl.store import model_sha256
from prfl.types import Task, Update
from sim import pools
from sim.actors import Ray
from sim.workers import Failed, Run, Serial, Workers, singly
from strategies.pacing import sync
from strategies.server import Stalled, serve


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def make(fatal: str = "") -> Run:
    """A worker's training. Client 1 kills its worker: once, leaving a mark in the folder `fatal`, or "always"."""
    world = World()

    def run(task: Task) -> Update:
        if fatal and task.client == 1:
            mark = Path(fatal) / "died"
            if fatal == "always" or not mark.exists():
                if fatal != "always":
                    mark.touch()
                os._exit(1)
        return world.run(task)

    return singly(run)


def played(workers: Workers, name: str, pacing: str = "buffered", versions: int = 6) -> tuple[str, list[str]]:
    """Model hash and reasons of what was not used."""
    world, m, reasons = World(), method(name), list[str]()
    state = serve(
        m,
        PACINGS[pacing],
        world.transport(workers),
        m.init(world.params, world.architecture, world.classes, 3),
        stop=lambda s, now: s.version >= versions,
        log=lambda e: reasons.append(e["reason"]) if e.get("reason") else None,
    )
    workers.close()
    return model_sha256(state.params), reasons


@pytest.mark.slow
@pytest.mark.parametrize(("name", "small"), [("pr_fl", 0), ("heterofl", 0), ("pr_fl", 2**16)])
def test_ray_agrees_with_serial(cluster: None, monkeypatch: pytest.MonkeyPatch, name: str, small: int) -> None:
    """Whether tensors travel through the object store or with the tasks."""
    monkeypatch.setattr("sim.actors.SMALL", small)
    want = played(Serial(make()), name)
    for workers in (1, 2, 4):  # there is no place for more than two
        assert played(Ray(make, workers), name) == want


@pytest.mark.slow
def test_tasks_given_up_do_not_confuse_the_pool(cluster: None) -> None:
    assert played(Ray(make, 2), "fedavg", "over") == played(Serial(make()), "fedavg", "over")


@pytest.mark.slow
def test_a_dead_worker_s_tasks_run_elsewhere_with_the_same_result(cluster: None, tmp_path: Path) -> None:
    want = played(Serial(make()), "pr_fl", "sync")
    assert played(Ray(partial(make, str(tmp_path)), 2), "pr_fl", "sync") == want
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_a_task_that_kills_every_worker_fails_and_the_run_goes_on(cluster: None) -> None:
    _, reasons = played(Ray(partial(make, "always"), 2), "fedavg", "sync", versions=1)
    assert reasons == ["3 workers died of this task"]


@pytest.mark.slow
def test_actors_take_the_problem_as_it_is_here(cluster: None) -> None:
    """No data set of this kind can be loaded anywhere."""
    world = World()
    parts = [torch.arange(24 * c, 24 * c + 24) for c in range(CLIENTS)]
    problem = Problem(world.model, Dataset("own", world.all, world.all, 3), world.all, parts, Noise(), seed=0)
    workers = pools.Place(2)(problem)
    assert played(workers, "pr_fl") == played(pools.Place()(problem), "pr_fl")


@pytest.mark.slow
def test_a_worker_that_can_not_start_ends_the_run_with_its_reason(cluster: None) -> None:
    def broken() -> Callable[[Task], Update]:
        raise ValueError("no data here")

    with pytest.raises(Stalled, match=r"^a worker could not start: ValueError: no data here$"):
        played(Ray(broken, 1), "fedavg")


@pytest.mark.slow
def test_a_pool_that_finds_no_place_ends_the_run(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr("sim.actors.PATIENCE", 1.0)
    taken = ray.util.placement_group([{"CPU": 2}])
    ray.get(taken.ready())
    try:
        with pytest.raises(Stalled, match=r"^no worker found a place in 1 s; of the Ray cluster's 2 CPUs 0 are free$"):
            played(Ray(make, 2), "fedavg")
    finally:
        ray.util.remove_placement_group(taken)


def test_serial_trains_only_what_is_asked_for() -> None:
    world, workers = World(), Serial(make())
    m = method("fedavg")
    transport = world.transport(workers)
    state = m.init(world.params, world.architecture, world.classes, 3)
    serve(m, sync(2, over=CLIENTS - 2), transport, state, stop=lambda s, now: s.version >= 2)
    with pytest.raises(KeyError):
        workers.result(10_000)


def test_an_error_in_training_is_one_line() -> None:
    def run(task: Task) -> Update:
        raise ValueError("first\nsecond")

    workers = Serial(singly(run))
    workers.submit(0, None)  # type: ignore[arg-type]
    with pytest.raises(Failed, match=r"^first$"):
        workers.result(0)
