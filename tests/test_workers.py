"""Workers: results of processes and of Ray are those of this process to the bit, whatever dies underneath."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from world import CLIENTS, PACINGS, World, method

from prfl import models
from prfl.masks import DENSE
from prfl.partition import Noise
from prfl.problem import Problem
from prfl.samples import Dataset, Samples
from prfl.store import model_sha256
from prfl.types import Task, Update, Work
from sim import pools
from sim.actor import Small
from sim.actors import Actors, Backend
from sim.cluster import Cluster
from sim.files import Stored, opened
from sim.processes import Processes
from sim.workers import Failed, Run, Serial, Workers, singly
from strategies.pacing import sync
from strategies.server import Stalled, serve


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(params=["processes", "ray"])
def backend(request: pytest.FixtureRequest) -> Callable[[int], Backend]:
    if request.param == "processes":
        return Processes
    request.getfixturevalue("cluster")
    return Cluster


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


def once(workers: Workers, name: str, pacing: str = "buffered", versions: int = 6) -> tuple[str, list[str]]:
    """What `played` tells, by workers that end with it."""
    with closing(workers):
        return played(workers, name, pacing, versions)


def played(workers: Workers, name: str, pacing: str = "buffered", versions: int = 6) -> tuple[str, list[str]]:
    """Model hash and reasons of what was not used; the workers may play again."""
    world, m, reasons = World(), method(name), list[str]()
    state = serve(
        m,
        PACINGS[pacing],
        world.transport(workers),
        m.init(world.params, world.architecture, world.classes, 3),
        stop=lambda s, now: s.version >= versions,
        log=lambda e: reasons.append(e["reason"]) if e.get("reason") else None,
    )
    return model_sha256(state.params), reasons


def _own() -> tuple[Dataset, Samples, list[Tensor], Noise, int]:
    """All of a problem but its model."""
    every = World().all
    parts = [torch.arange(24 * c, 24 * c + 24) for c in range(CLIENTS)]
    return Dataset("own", every, every, 3), every, parts, Noise(), 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])  # on Ray there is no place for more than two
def test_actors_agree_with_serial(
    backend: Callable[[int], Backend], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they did before, and whether tensors are stored or travel with the tasks."""
    with closing(Actors(backend(workers), make)) as pool:
        for name, small in (("pr_fl", 0), ("heterofl", 0), ("pr_fl", 2**16)):
            monkeypatch.setattr("sim.actors.SMALL", small)
            pool.forget()
            assert played(pool, name) == played(Serial(make()), name)


@pytest.mark.slow
def test_tasks_given_up_do_not_confuse_the_pool(backend: Callable[[int], Backend]) -> None:
    assert once(Actors(backend(2), make), "fedavg", "over") == played(Serial(make()), "fedavg", "over")


@pytest.mark.slow
def test_a_dead_worker_s_tasks_run_elsewhere_with_the_same_result(
    backend: Callable[[int], Backend], tmp_path: Path
) -> None:
    want = played(Serial(make()), "pr_fl", "sync")
    assert once(Actors(backend(2), partial(make, str(tmp_path))), "pr_fl", "sync") == want
    assert (tmp_path / "died").exists()


@pytest.mark.slow
def test_a_task_that_kills_every_worker_fails_and_the_run_goes_on(backend: Callable[[int], Backend]) -> None:
    pool = Actors(backend(2), partial(make, "always"))
    pool._pace = 1e-3  # batches from the start: others share the first one's fate, but not its end
    _, reasons = once(pool, "fedavg", "sync", versions=1)
    assert reasons == ["3 workers died of this task"]


@pytest.mark.slow
def test_who_waited_behind_it_is_not_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an actor's calls the one that waited may be the first whose end is heard of."""
    wait, kill, killed = Processes.wait, Processes.kill, list[object]()
    monkeypatch.setattr(Processes, "wait", lambda self, calls, timeout: wait(self, calls[::-1], timeout))
    monkeypatch.setattr(Processes, "kill", lambda self, actor: killed.append(actor) or kill(self, actor))
    pool = Actors(Processes(1), partial(make, "always"))
    pool._pace = 1e-3
    _, reasons = once(pool, "fedavg", "sync", versions=1)
    assert reasons == ["3 workers died of this task"]
    assert len(killed) == 3 + 1  # the last at the end of the run


@pytest.mark.slow
def test_actors_take_the_problem_as_it_is_here(backend: Callable[[int], Backend]) -> None:
    """No data set of this kind can be loaded anywhere."""
    problem = Problem(World().model, *_own())
    workers = pools.Place(2, ray=backend is Cluster)(problem)
    assert once(workers, "pr_fl") == played(pools.Place()(problem), "pr_fl")


@pytest.mark.slow
def test_a_worker_that_can_not_start_ends_the_run_with_its_reason(backend: Callable[[int], Backend]) -> None:
    def broken() -> Callable[[Task], Update]:
        raise ValueError("no data here")

    with pytest.raises(Stalled, match=r"^a worker could not start: ValueError: no data here$"):
        once(Actors(backend(1), broken), "fedavg")


@pytest.mark.slow
def test_a_pool_that_finds_no_place_ends_the_run(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr("sim.actors.PATIENCE", 1.0)
    taken = ray.util.placement_group([{"CPU": 2}])
    ray.get(taken.ready())
    try:
        with pytest.raises(Stalled, match=r"^no worker found a place in 1 s; of the Ray cluster's 2 CPUs 0 are free$"):
            once(Actors(Cluster(2), make), "fedavg")
    finally:
        ray.util.remove_placement_group(taken)


def test_a_process_that_can_not_start_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(Stalled, match=r"^a worker could not start: its process ended with code 1$"):
        once(Actors(Processes(2), make), "fedavg")


@pytest.mark.slow
def test_neither_side_of_a_pipe_waits_for_the_other_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders and answers of megabytes, both under way at once."""
    monkeypatch.setattr("sim.actors.SMALL", 2**30)
    given = Problem(models.build("mlp", (1, 4, 4), 3, seed=0, options={"hidden": [4000]}), *_own())
    params = models.values(given.model)
    tasks = [Task(i % CLIENTS, 0, {k: v + i for k, v in params.items()}, DENSE, Work(steps=1), i) for i in range(60)]
    pool = Actors(Processes(1), partial(pools.trainer, given))
    with closing(pool):
        for i, task in enumerate(tasks):
            pool.submit(i, task)
        moved = [pool.result(i) for i in range(60)]
    assert [u.client for u in moved] == [t.client for t in tasks]


def test_large_arrays_of_many_calls_at_once_do_not_mix() -> None:
    """More calls than there are boxes for arrays; and answers that are wanted later than others."""
    with closing(Processes(1)) as backend:
        kept = backend.put(make)
        actor, up = backend.hire(kept)
        backend.get(up)
        calls = [backend.call(actor, "_read", Small(i, torch.full((10**5 + i,), i))) for i in range(7)]
        for i in (3, 6, 0, 5, 1, 2, 4):
            echo = backend.get(calls[i])
            assert echo.shape == (10**5 + i,)
            assert echo.unique().tolist() == [i]
        backend.kill(actor)


def test_what_is_stored_is_shared_until_somebody_writes() -> None:
    with closing(Processes(1)) as backend:
        value = {"view": torch.arange(10**6)[:3], "half": torch.ones(2, dtype=torch.bfloat16), "none": torch.zeros(0)}
        stored = backend.put(value)
        assert Path(stored.path).stat().st_size < 10_000  # no more of it than is seen
        one, other = stored.read(), Stored(stored.path).read()
        one["view"][0] = 7
        assert other["view"].tolist() == [0, 1, 2]
        assert one["half"].tolist() == [1, 1]
        assert one["none"].shape == (0,)
        path = Path(stored.path)
        del stored
        assert not path.exists()  # who has read it keeps it
        assert one["view"].tolist() == [7, 1, 2]
    assert not path.parent.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a file system takes root")
def test_what_memory_for_files_is_too_small_for_lies_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB are usual in a container."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        monkeypatch.setattr("sim.processes.MEMORY", tmp_path)
        with closing(Processes(1)) as backend:
            small, large = backend.put(torch.ones(10)), backend.put(torch.ones(10**5))
            assert Path(small.path).is_relative_to(tmp_path)
            assert not Path(large.path).is_relative_to(tmp_path)
            assert large.read().sum() == 10**5
            assert backend.put(torch.ones(10)).path.startswith(str(tmp_path))  # nothing is left of what did not fit
            for size in (10**5, 5000, 10**5):
                assert opened(backend._files.letter(torch.ones(size), "box")).sum() == size
    finally:
        subprocess.run(["umount", tmp_path], check=True)


LONELY = """
import os, time
from test_workers import make
from sim.actors import Actors
from sim.processes import Processes
backend = Processes(2)
pool = Actors(backend, make)
while len(pool.nodes) < 2:
    pool._collect()
print(len(backend._folders), *(f.name for f in backend._folders), flush=True, end=' ')
print(*(actor.process.pid for actor in pool._actors.values()), flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_run_that_was_killed() -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    driver = subprocess.Popen(
        [sys.executable, "-c", LONELY], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    assert driver.stdout is not None
    count, *found = driver.stdout.readline().decode().split()
    folders, workers = found[: int(count)], found[int(count) :]
    assert len(workers) == 2
    assert all(map(os.path.isdir, folders))
    driver.kill()
    driver.wait()
    driver.stdout.close()
    until = time.monotonic() + 60
    while any(map(os.path.exists, folders)) or any(Path("/proc", pid).exists() for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.05)


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
