"""Virtual time: the clock's laws, the bytes on it, and what simulated devices remember."""

from __future__ import annotations

import gc
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any
from weakref import ref

import pytest
import torch
from world import CLIENTS, WORK, World, method

from prfl import density, models
from prfl.codec import Codec, Layout
from prfl.cut import Cut, Ranking
from prfl.groups import architecture
from prfl.masks import DENSE, Mask
from prfl.types import GIVEN_UP, Arrival, State, Task, Update, Work
from sim.devices import Device
from sim.network import links, shared
from sim.transport import VirtualTransport
from strategies.method import Method, rerank
from strategies.pacing import sync
from strategies.server import serve

DEVICE = Device("d", {"linear": 1000.0}, 2**30, down=100.0, up=50.0, latency=0.5, startup=0.25, step=0.125)
LEVELS = (0.2, 0.5, 1.0)


def task_for(world: World, client: int = 0, mask: Mask = DENSE, version: int = 0, seed: int = 0) -> Task:
    return Task(client, version, world.params, mask, WORK, seed, 1.0)


def still(task: Task) -> Update:
    """Training that changes nothing."""
    delta = {k: torch.zeros(task.mask.count(k, v.shape)) for k, v in task.params.items()}
    return Update(task.client, task.version, delta, task.mask, 1.0, {"loss": 1.0})


def ranked(world: World) -> Ranking:
    return Cut(spread="model").rank({k: v.abs() for k, v in world.params.items()}, world.params)


def received(transport: VirtualTransport) -> list[Arrival]:
    """All that comes until nothing is under way."""
    out = []
    while arrival := transport.wait():
        out.append(arrival)
    return out


def one(world: World, task: Task, **more: Any) -> Arrival:
    """What becomes of a task alone."""
    transport = world.transport(**more)
    transport.send(task)
    return received(transport)[0]


@dataclass
class Ledger:
    """A network of `links` that writes down what went down."""

    parts: list[Sequence[tuple[Hashable, int]]] = field(default_factory=list)

    def down(self, now: float, device: Device, parts: Sequence[tuple[Hashable, int]], seed: int) -> float:
        self.parts.append(parts)
        return links().down(now, device, parts, seed)

    def up(self, now: float, device: Device, size: int, seed: int) -> float:
        return links().up(now, device, size, seed)


def test_the_time_of_one_task_by_hand() -> None:
    world = World()
    task = task_for(world)
    arrival = one(world, task, fleet=[DEVICE])
    down = len(Codec().encode_task(task, world.layout))
    up = len(Codec().encode_update(world.run(task), task, world.layout)[0])
    assert (arrival.bytes_down, arrival.bytes_up) == (down, up)
    flops = 3 * 2 * (16 * 8 + 8 * 3) * 3 * 8  # forward and backward, multiply-adds, 3 batches of 8
    assert arrival.at == pytest.approx(0.5 + down / 100 + 0.25 + 3 * 0.125 + flops / 1000 + 0.5 + up / 50)
    assert (arrival.sent, arrival.reason) == (0.0, "")


@pytest.mark.parametrize(("work", "steps"), [({"steps": 5}, 5), ({"epochs": 2, "batch": 10}, 6), ({"batch": 30}, 1)])
def test_a_mini_batch_takes_its_time_whatever_is_in_it(work: dict[str, Any], steps: int) -> None:
    world = World(samples=24)
    task = replace(task_for(world), work=Work(**work))
    slow, fast = (one(world, task, fleet=[replace(DEVICE, step=step)]).at for step in (1.0, 0.0))
    assert slow - fast == pytest.approx(steps)


@pytest.mark.parametrize(
    "change",
    [{"flops": {"linear": 500.0}}, {"down": 50.0}, {"up": 25.0}, {"latency": 1.0}, {"startup": 0.5}, {"step": 0.2}],
    ids=lambda change: str(*change),
)
def test_a_slower_device_is_slower(change: dict[str, Any]) -> None:
    world = World()
    fast, slow = (one(world, task_for(world), fleet=[device]) for device in (DEVICE, replace(DEVICE, **change)))
    assert slow.at > fast.at


def test_arrivals_come_in_the_order_of_their_time_and_sooner_with_smaller_models() -> None:
    world = World(jitter=0.5)
    rank = ranked(world)
    transport = world.transport()
    idle = transport.idle()
    for client in idle:
        transport.send(task_for(world, client, rank.mask(LEVELS[client % 3]), seed=client))
    arrivals = received(transport)
    assert list(idle) == transport.idle() == list(range(CLIENTS))
    assert len(arrivals) == CLIENTS
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert transport.now() == arrivals[-1].at
    times = [one(world, task_for(world, mask=rank.mask(level)), fleet=[DEVICE]).at for level in LEVELS]
    assert times == sorted(times)
    assert len(set(times)) == 3


def test_failures_depend_on_the_seed_of_the_task_alone() -> None:
    world = World(failure=0.3)
    seeds = range(200)
    first = {seed: one(world, task_for(world, 0, seed=seed), run=still).reason for seed in seeds}
    transport, second = world.transport(run=still), dict[int, str]()
    for seed in reversed(seeds):
        transport.send(task_for(world, seed % CLIENTS, version=seed, seed=seed))
        if not transport.idle() or not seed:
            second |= {a.task.seed: a.reason for a in received(transport)}
    assert first == second
    assert 30 < sum(reason == "device failed" for reason in first.values()) < 90


def test_idle_are_those_that_are_there_and_not_at_work() -> None:
    world = World()
    fleet = [replace(d, availability=((10.0 * c, 10.0 * c + 15.0),), period=1e6) for c, d in enumerate(world.fleet)]
    transport = world.transport(fleet=fleet, run=still)
    assert transport.wait(9.0) is None
    assert transport.now() == 9.0
    assert transport.idle() == [0]
    transport.wait(12.0)
    assert transport.idle() == [0, 1]
    before = transport.idle()
    transport.send(task_for(world, 1))
    assert (before, transport.idle(), transport.busy()) == ([0, 1], [0], 1)
    assert transport.wait() is not None
    assert transport.busy() == 0
    transport.wait(19.0)
    assert transport.idle() == [1]  # 0 has left at 15
    transport.wait(1000.0)
    assert transport.wait() is None
    assert transport.now() == 1e6  # the clock moves on to the next who comes


def test_a_device_that_leaves_at_work_answers_all_the_same() -> None:
    world = World()
    arrival = one(world, task_for(world), fleet=[replace(DEVICE, availability=((0.0, 1.0),))])
    assert arrival.update is not None
    assert arrival.at > 1.0


def test_forgotten_tasks_are_not_awaited_and_their_devices_not_idle_before_they_would_have_answered() -> None:
    world = World()
    task = task_for(world)
    usual = one(world, task, fleet=[DEVICE])
    transport = world.transport(fleet=[DEVICE])
    transport.send(task)
    transport.forget()
    assert (transport.busy(), transport.idle()) == (0, [])
    trained, upload = len(world.tasks), usual.bytes_up / 50
    assert transport.wait(usual.at - 0.9 * upload) is None
    assert transport.idle() == []  # trained, and uploading
    (late,) = received(transport)
    assert (late.update, late.reason, transport.busy(), transport.idle()) == (None, GIVEN_UP, 0, [0])
    assert late.at == pytest.approx(usual.at, rel=0.1)
    assert len(world.tasks) == trained  # its training is saved


def test_a_task_forgotten_while_it_uploads_brings_nothing() -> None:
    world = World()
    task = task_for(world)
    usual = one(world, task, fleet=[DEVICE])
    transport = world.transport(fleet=[DEVICE])
    transport.send(task)
    assert transport.wait(usual.at - 0.5) is None
    transport.forget()
    (late,) = received(transport)
    assert late == replace(usual, update=None, reason=GIVEN_UP)


def test_a_mask_goes_down_once_and_again_after_a_failure() -> None:
    world = World(failure=0.5)
    rank = ranked(world)
    transport = world.transport(run=still)
    half, other = rank.mask(0.5), ranked(world).mask(0.5)
    with_mask, without = (len(Codec().encode_task(task_for(world, mask=half), world.layout, known=k)) for k in (0, 1))
    assert without < with_mask
    held, sizes = False, set()
    for seed, mask in enumerate([half] * 12 + [other] * 2 + [half] * 6):
        transport.send(task_for(world, 0, mask, version=seed, seed=seed))
        (arrival,) = received(transport)
        held = held and seed not in (12, 14)
        assert arrival.bytes_down == (without if held else with_mask)
        sizes.add(arrival.bytes_down)
        held = arrival.update is not None
    assert sizes == {with_mask, without}


def wide(clients: int) -> World:
    """A world whose model outweighs its messages' heads."""
    world = World(clients)
    world.model = models.build("mlp", (1, 4, 4), 3, 0, {"hidden": (256,)})
    world.params = models.values(world.model)
    world.architecture = architecture(world.model, world.all.x[:1])
    world.layout = Layout.of(world.params, world.architecture.groups)
    return world


def tiered(every: int = 2) -> Method:
    return Method(density.tiers(LEVELS), cut=Cut(spread="model"), work=WORK, remask=rerank(every))


def played(world: World, m: Method, versions: int, clients: int, **more: Any) -> list[dict[str, Any]]:
    """The arrivals of a synchronous run."""
    events: list[dict[str, Any]] = []
    serve(
        m,
        sync(clients),
        world.transport(**more),
        m.init(world.params, world.architecture, dict.fromkeys(range(clients), "d"), 0),
        stop=lambda s, now: s.version >= versions,
        log=events.append,
    )
    return [e for e in events if e["kind"] == "arrival"]


def bytes_down(arrivals: list[dict[str, Any]]) -> dict[tuple[int, int], int]:
    return {(a["version"], a["client"]): a["bytes_down"] for a in arrivals}


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_increments_cost_a_client_little_more_than_its_sub_model(codec: Any) -> None:
    world = wide(6)
    plain, split = (
        bytes_down(played(world, tiered(), 6, 6, run=still, residual=r, codec=Codec(codec))) for r in (False, True)
    )
    assert plain.keys() == split.keys()
    missing = sum(v.numel() for v in world.params.values())
    for at, size in split.items():
        level = LEVELS.index(LEVELS[at[1] * 3 // 6]) + 1
        assert size <= plain[at] + level * (80 + 8 * len(world.params) + ceil(missing / 8)) + 9


@pytest.mark.parametrize("residual", [False, True])
def test_a_server_that_multicasts_pushes_increments_once(residual: bool) -> None:
    world, server = wide(12), shared(1e6, 1e6).open()
    arrivals = played(world, tiered(), 4, 12, run=still, residual=residual, network=server)
    pulled = sum(a["bytes_down"] for a in arrivals)
    assert server.egress < pulled / 3 if residual else server.egress == pulled


def test_masks_travel_in_increments_of_their_own_until_the_next_ranking() -> None:
    world, ledger = wide(3), Ledger()
    transport = world.transport(run=still, residual=True, network=ledger)
    first, second = ranked(world), ranked(world)
    rounds = [(first, 1.0), (first, 1.0), (first, 0.5), (first, 0.5), (second, 0.5)]
    for version, (rank, level) in enumerate(rounds):
        for client, share in enumerate((0.2, level)):
            transport.send(replace(task_for(world, client, rank.mask(share), version, client), density=share))
        received(transport)
    low, high = ledger.parts[::2], ledger.parts[1::2]
    assert [sizes[0][1] for sizes in (*low, *high)] == [low[0][0][1]] * 10  # the clients' own messages
    assert len({parts[0][0] for parts in (*low, *high)}) == 10
    steps = [[key[1:] for key, _ in parts[1:]] for parts in high]
    assert steps == [
        [(0.0, 0.2, False), (0.2, 1.0, False)],
        [(0.0, 0.2, True), (0.2, 1.0, True)],
        [(0.0, 0.2, False), (0.2, 0.5, False)],  # another mask than the last one
        [(0.0, 0.2, True), (0.2, 0.5, True)],
        [(0.0, 0.2, False), (0.2, 0.5, False)],
    ]
    assert low[0][1:] == high[0][1:2]  # the same content for both
    assert high[3][2][1] < high[2][2][1]  # without the mask


def test_increments_need_masks_of_one_ranking() -> None:
    world = World()
    with pytest.raises(ValueError, match="residual: the method's masks are not cut from one ranking"):
        world.transport(residual=True).send(task_for(world))


@pytest.mark.parametrize(("values", "tolerance"), [("float16", 2e-3), ("int8", 0.1)])
@pytest.mark.parametrize("residual", [False, True])
def test_lossy_codecs_give_nearly_the_same_model(values: Any, tolerance: float, residual: bool) -> None:
    def last(codec: Codec) -> State:
        world, m = World(), tiered()
        state = m.init(world.params, world.architecture, world.classes, 3)
        transport = world.transport(codec=codec, residual=residual)
        return serve(m, sync(CLIENTS), transport, state, stop=lambda s, now: s.version >= 2)

    exact, rounded = last(Codec()), last(Codec(values))
    off = max(float((v - rounded.params[k]).abs().max()) for k, v in exact.params.items())
    assert 0 < off < tolerance


def test_what_rounding_withholds_goes_up_later() -> None:
    world, tasks = World(), 40
    wanted = {k: torch.randn(v.shape, generator=torch.Generator().manual_seed(1)) for k, v in world.params.items()}

    def run(task: Task) -> Update:
        return replace(still(task), delta={k: v.flatten() for k, v in wanted.items()})

    transport = world.transport(codec=Codec("int8"), run=run)
    total = {k: torch.zeros_like(v) for k, v in wanted.items()}
    for version in range(tasks):
        transport.send(task_for(world, version=version, seed=version))
        (arrival,) = received(transport)
        assert arrival.update is not None
        total = {k: v + arrival.update.delta[k].view(v.shape) for k, v in total.items()}
    for k, v in wanted.items():
        step = float(v.abs().max()) / 127
        assert float((total[k] - tasks * v).abs().max()) < 1.5 * step


def test_masks_of_old_rankings_are_not_kept() -> None:
    world, m = World(), method("pr_fl", every=1, floor=0.2)
    masks = []

    def log(event: Any) -> None:
        masks.extend(ref(task.mask) for task in world.tasks)
        world.tasks.clear()

    state = m.init(world.params, world.architecture, world.classes, 3)
    transport = world.transport()
    state = serve(m, sync(CLIENTS), transport, state, stop=lambda s, now: s.version >= 8, log=log)
    gc.collect()
    alive = {mask for r in masks if (mask := r()) is not None}
    assert len(masks) == 8 * CLIENTS
    assert all(mask.ranking is state.rank for mask in alive)
