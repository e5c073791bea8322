"""The one loop: every method in every pacing, a textbook beside it, and what happens when devices misbehave."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from world import CLIENTS, PACINGS, WORK, World, method

from prfl import merge, models
from prfl.arrivals import key
from prfl.masks import DENSE
from prfl.overlap import nested
from prfl.store import model_sha256
from prfl.types import GIVEN_UP, Arrival, State, Task, Tree, Update, Work
from sim.devices import Device
from strategies import selector, table
from strategies.method import Method, never
from strategies.pacing import Pacing, buffered, one_arrival, sync, window
from strategies.server import Scores, Stalled, serve

METHODS = sorted(table.METHODS)
Events = list[dict[str, Any]]


def played(
    world: World, m: Method, pacing: Pacing, versions: int = 4, seed: int = 3, **more: Any
) -> tuple[State, Events]:
    """A run of so many versions: its last state and its events."""
    events: Events = []
    serving = {k: more.pop(k) for k in ("selector", "evaluate", "keep") if k in more}
    state = m.init(world.params, world.architecture, world.classes, seed)
    last = serve(
        m,
        pacing,
        world.transport(**more),
        state,
        stop=lambda s, now: s.version >= versions,
        log=events.append,
        **serving,
    )
    return last, events


def of_kind(events: Events, kind: str) -> Events:
    return [e for e in events if e["kind"] == kind]


@pytest.mark.parametrize("pacing", PACINGS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_in_every_pacing(name: str, pacing: str) -> None:
    world = World()
    state, events = played(world, method(name), PACINGS[pacing])
    assert state.version == 4
    assert all(bool(v.isfinite().all()) for v in state.params.values())
    assert any(not torch.equal(v, world.params[k]) for k, v in state.params.items())
    times = [e["at"] for e in events]
    assert times == sorted(times)
    assert all(0 < e["density"] <= 1 for e in of_kind(events, "send"))


@pytest.mark.parametrize("pacing", PACINGS)
@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_run_to_the_bit(name: str, pacing: str) -> None:
    runs = [played(World(jitter=0.3), method(name), PACINGS[pacing], seed=s) for s in (3, 3, 4)]
    hashes = [model_sha256(state.params) for state, _ in runs]
    assert hashes[0] == hashes[1] != hashes[2]
    assert runs[0][1] == runs[1][1] != runs[2][1]


def textbook(world: World, rounds: int, work: Work, seeds: dict[tuple[int, int], int]) -> Tree:
    """Synchronous FedAvg as in the paper, with torch's own SGD: sample-weighted mean of what the clients came to."""
    server = {k: v.clone() for k, v in world.params.items()}
    for version in range(rounds):
        local, sizes = [], []
        for client in range(CLIENTS):
            models.load(world.model, server)
            optimiser, data = torch.optim.SGD(world.model.parameters(), work.lr), world.data[client]
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seeds[version, client]))
            for at in order.split(work.batch)[: work.steps]:
                x, y = data.batch(at)
                optimiser.zero_grad()
                F.cross_entropy(world.model(x), y).backward()
                optimiser.step()
            local.append(models.values(world.model))
            sizes.append(len(data))
        server = {k: sum(n * w[k] for n, w in zip(sizes, local, strict=True)) / sum(sizes) for k in server}
    return server


def test_sync_fedavg_is_the_textbooks() -> None:
    world = World()
    world.data = [d.subset(torch.arange(24 - 2 * c)) for c, d in enumerate(world.data)]  # unequal sizes
    work = replace(WORK, steps=1)
    state, _ = played(world, table.method("fedavg", work), sync(CLIENTS), versions=3)
    want = textbook(world, 3, work, {(t.version, t.client): t.seed for t in world.tasks})
    for k, v in state.params.items():
        torch.testing.assert_close(v, want[k], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(merge.TABLE) - {"fedasync", "momentum", "adam", "by_value", "by_quality"}))
def test_dense_and_all_present_every_merge_is_fedavg(name: str) -> None:
    runs = []
    for part in (merge.TABLE["fed_avg"](), merge.TABLE[name](weigh="samples")):
        world = World()
        world.data = [d.subset(torch.arange(24 - 2 * c)) for c, d in enumerate(world.data)]
        runs.append(played(world, Method(merge=part, work=WORK, remask=never()), sync(CLIENTS))[0].params)
    for k, v in runs[0].items():
        torch.testing.assert_close(runs[1][k], v, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pacing", PACINGS)
def test_failing_devices_never_stop_the_run(pacing: str) -> None:
    state, events = played(World(failure=0.4), method("pr_fl"), PACINGS[pacing], versions=6)
    failed = [e for e in of_kind(events, "arrival") if not e["used"] and e["reason"] != GIVEN_UP]
    assert state.version == 6
    assert failed
    assert {e["reason"] for e in failed} == {"device failed"}


def test_a_device_given_up_is_not_asked_again_before_it_would_have_answered() -> None:
    world = World()
    _, events = played(world, method("fedavg"), sync(2, over=4), versions=12)
    busy_until: dict[int, float] = {}
    dense = [e["seconds"] for e in of_kind(events, "arrival") if e["used"]]
    slowest = [c for c, d in enumerate(world.fleet) if d.flops["linear"] == min(d.flops["linear"] for d in world.fleet)]
    for e in of_kind(events, "send"):
        assert e["at"] >= busy_until.get(e["client"], 0.0)
        if e["client"] in slowest:  # never among the two first, so always given up
            busy_until[e["client"]] = e["at"] + max(dense)
    arrivals = of_kind(events, "arrival")
    assert {e["client"] for e in arrivals if e["used"]}.isdisjoint(slowest)
    late = [e for e in arrivals if e["client"] in slowest]
    assert {e["reason"] for e in late} == {GIVEN_UP}
    assert all(e["bytes_down"] > 0 and e["bytes_up"] > 0 for e in late)  # what was for nothing is counted all the same


def test_too_stale_updates_are_refused() -> None:
    _, events = played(World(), method("fedavg"), one_arrival(6, max_staleness=1), versions=12)
    arrivals = of_kind(events, "arrival")
    assert {e["used"] for e in arrivals} == {True, False}
    assert all(e["used"] == (e["staleness"] <= 1) for e in arrivals)
    assert {e["reason"] for e in arrivals if not e["used"]} == {"too stale"}


def test_a_client_that_diverges_is_logged_and_the_run_goes_on() -> None:
    world = World()

    def run(task: Task) -> Update:
        return world.run(replace(task, work=replace(task.work, lr=1e30)) if task.client == 1 else task)

    state, events = played(world, method("fedavg"), sync(CLIENTS), run=run)
    lost = [e for e in of_kind(events, "arrival") if not e["used"]]
    assert state.version == 4
    assert {e["client"] for e in lost} == {1}
    assert all("became" in e["reason"] and "\n" not in e["reason"] for e in lost)
    assert all(bool(v.isfinite().all()) for v in state.params.values())


def test_absent_devices_are_waited_for() -> None:
    world = World()
    fleet = [replace(d, availability=((100.0, 200.0),), period=1000.0) for d in world.fleet]
    _, events = played(world, method("fedavg"), sync(CLIENTS), fleet=fleet)
    assert all(100 <= e["at"] % 1000 < 200 for e in of_kind(events, "send"))


def test_a_run_that_can_not_go_on_says_so() -> None:
    nobody: tuple[Device, ...] = ()
    world = World()
    m = method("fedavg")
    transport = world.transport(fleet=nobody)
    with pytest.raises(Stalled, match="nobody left to ask"):
        serve(m, sync(2), transport, m.init(world.params), stop=lambda s, now: False)


def test_masks_of_a_version_are_nested_and_frozen_between_rankings() -> None:
    world = World()
    played(world, method("pr_fl", every=3, floor=0.2), sync(CLIENTS), versions=7)
    by_ranking: dict[int, list[Task]] = {}
    for t in world.tasks:
        by_ranking.setdefault(t.version // 3, []).append(t)
    for tasks in by_ranking.values():
        ordered = sorted(tasks, key=lambda t: t.density)
        assert all(nested(a.mask, b.mask, world.params) for a, b in pairwise(ordered))
        assert len({id(t.mask) for t in tasks}) == len({t.density for t in tasks})
    assert min(t.density for t in world.tasks) < 1


def test_the_statistic_is_asked_for_before_a_ranking_only() -> None:
    world = World()
    played(world, method("pr_fl", every=3, listen=1), sync(CLIENTS), versions=7)
    assert {t.version for t in world.tasks if t.work.report} == {2, 5}


def test_evaluation_steers_through_the_state_and_test_scores_stay_out() -> None:
    seen: list[State] = []

    def evaluate(state: State) -> Scores | None:
        return Scores({"accuracy": state.version / 10}, {"accuracy": 0.9}) if state.version % 2 == 0 else None

    _, events = played(World(), method("fedavg"), sync(CLIENTS), evaluate=evaluate, keep=seen.append)
    assert [s.validation["accuracy"] for s in seen] == [0.0, 0.2, 0.2, 0.4]
    assert [e["test_accuracy"] for e in of_kind(events, "evaluation")] == [0.9, 0.9, 0.9]


@pytest.mark.parametrize("part", [selector.random(), selector.round_robin(), selector.power_of_choice(4)])
def test_selectors_ask_idle_clients_once(part: Any) -> None:
    state, events = played(World(), method("fedavg"), buffered(3, 2), versions=8, selector=part)
    at_work: set[int] = set()
    for e in events:
        if e["kind"] == "send":
            assert e["client"] not in at_work
            at_work.add(e["client"])
        elif e["kind"] == "arrival":
            at_work.remove(e["client"])
    assert state.version == 8


def test_round_robin_asks_everybody_equally_often() -> None:
    _, events = played(World(), method("fedavg"), sync(3), versions=10, selector=selector.round_robin())
    counts = np.bincount([e["client"] for e in of_kind(events, "send")], minlength=CLIENTS)
    assert counts.max() - counts.min() <= 1


def test_round_robin_takes_numbers_with_gaps() -> None:
    part, clients = selector.round_robin(), {0: "", 2: "", 4: "", 7: ""}
    now = method("fedavg").init(World().params, classes=clients)
    asked = [part.ask(replace(now, sent=sent), list(clients), 1, np.random.default_rng(0))[0] for sent in range(8)]
    assert asked == [0, 2, 4, 7] * 2


def test_in_a_window_a_client_works_on_a_version_once_and_waits_for_its_end() -> None:
    """Devices need 0.1 to 1 s, so all are done and wait when a window of 4 s ends; a failure may be tried again."""
    world = World(failure=0.3)
    _, events = played(world, method("fedfix"), window(CLIENTS, 4.0), versions=5)
    used = [(e["client"], e["version"]) for e in of_kind(events, "arrival") if e["used"]]
    assert len(used) == len(set(used)) == 5 * CLIENTS
    assert [e["at"] for e in of_kind(events, "merge")] == pytest.approx([4.0, 8.0, 12.0, 16.0, 20.0])
    assert any(not e["used"] for e in of_kind(events, "arrival"))


def test_a_metric_that_nobody_asked_for_is_not_logged() -> None:
    world = World()

    def boasting(task: Task) -> Update:
        update = world.run(task)
        return replace(update, metrics={**update.metrics, "held_out": 1e300})

    _, events = played(world, method("fedavg"), sync(CLIENTS), versions=1, run=boasting)
    assert all("held_out" not in e for e in of_kind(events, "arrival"))


def test_a_clients_newest_update_comes_last() -> None:
    task = Task(1, 0, {}, DENSE, Work(), seed=9)
    first, second = Arrival(task, 0.0, 1.0, 0, 0, None), Arrival(replace(task, seed=3), 1.0, 2.0, 0, 0, None)
    assert sorted([second, first], key=key) == [first, second]


def test_of_clients_that_a_selector_leaves_alone_one_is_asked_when_all_is_quiet() -> None:
    class nobody(selector.random):
        def ask(self, *given: Any) -> list[int]:
            return []

    _, events = played(World(), method("fedavg"), one_arrival(4), versions=3, selector=nobody())
    assert [e["kind"] for e in events if e["kind"] in ("send", "merge")] == ["send", "merge"] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pacing(0, 1), "in_flight must be at least 1"),
        (lambda: sync(3, deadline=-1), "deadline must be above 0"),
        (lambda: Pacing(3, 5, 3, drop_late=True), "goal 5 can not be reached with 3 in flight"),
        (lambda: buffered(3, 2, max_staleness=-1), "max_staleness must be at least 0, got -1"),
        (lambda: Pacing(3, float("inf")), "without a goal there must be a deadline"),
        (lambda: buffered(3, 2).__class__(3, 2, refill=4), "refill must be from 1 to in_flight"),
    ],
)
def test_pacings_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
