"""Workers: Ray's results are those of this process to the bit, whatever dies underneath."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from world import CLIENTS, PACINGS, World, method

from prfl.store import model_sha256
from prfl.types import Task, Update
from sim.actors import Ray
from sim.workers import Failed, Serial, Workers
from strategies.pacing import sync
from strategies.server import serve


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def make(fatal: str = "") -> Callable[[Task], Update]:
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

    return run


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
@pytest.mark.parametrize("name", ["pr_fl", "heterofl"])
def test_ray_agrees_with_serial(cluster: None, name: str) -> None:
    want = played(Serial(make()), name)
    for workers in (1, 2):
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

    workers = Serial(run)
    workers.submit(0, None)  # type: ignore[arg-type]
    with pytest.raises(Failed, match=r"^first$"):
        workers.result(0)
