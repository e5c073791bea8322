"""Clients trained at once: what each comes to alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from clients import stacked
from clients.crew import STACK, Crew
from clients.outcome import Diverged
from clients.train import train
from prfl import models
from prfl.cut import Cut
from prfl.groups import architecture
from prfl.masks import DENSE, Mask
from prfl.samples import Samples
from prfl.types import Task, Update, Work

MODEL = models.build("mlp", (1, 6, 6), 5, seed=0, options={"hidden": (24, 16)})
PARAMS = models.values(MODEL)
SCORES = {k: v.abs() for k, v in PARAMS.items()}
GROUPS = architecture(MODEL, torch.zeros(1, 1, 6, 6)).groups
MASKS = {
    "dense": DENSE,
    "weights": Cut().rank(SCORES, PARAMS).mask(0.3),
    "channels": Cut(unit="channels").rank(SCORES, PARAMS, GROUPS).mask(0.4),
}
WORKS = {
    "epoch": Work(epochs=1, batch=10, lr=0.1),
    "steps": Work(steps=7, batch=4, lr=0.1),
    "all of SGD": Work(epochs=2, batch=7, lr=0.05, momentum=0.9, weight_decay=1e-3, proximal=0.1),
}
SIZES = (31, 30, 30, 12, 3, 1, 20, 20)


def data(client: int) -> Samples:
    draw = torch.Generator().manual_seed(client)
    size = SIZES[client % len(SIZES)]
    x = torch.randint(0, 256, (size, 1, 6, 6), dtype=torch.uint8, generator=draw)
    return Samples(x, torch.randint(0, 5, (size,), generator=draw), (120.0,), (70.0,))


def tasks(work: Work, mask: Mask = DENSE, clients: Sequence[int] = range(8)) -> list[Task]:
    return [Task(c, 3, PARAMS, mask, work, seed=c + 100) for c in clients]


def singly(some: Sequence[Task]) -> list[Update]:
    return [train(task, MODEL, data(task.client)) for task in some]


def by_autograd(task: Task) -> Task:
    """The same task by torch's own layers, which is not done stacked."""
    return replace(task, work=replace(task.work, fast=False))


def check_same(one: Update | Exception, other: Update | Exception) -> None:
    assert isinstance(one, Update)
    assert isinstance(other, Update)
    assert (one.client, one.version, one.weight, one.metrics) == (
        other.client,
        other.version,
        other.weight,
        other.metrics,
    )
    assert one.mask is other.mask
    assert one.delta.keys() == other.delta.keys()
    assert all(torch.equal(v, other.delta[k]) for k, v in one.delta.items())


def crew_of(samples: Callable[[int], Samples]) -> Crew:
    return Crew(MODEL, samples, lambda task: train(task, MODEL, samples(task.client)))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("work", WORKS)
def test_stacked_is_autograd_but_for_rounding(work: str, mask: str) -> None:
    """Clients with different numbers of samples, down to one, step together as far as they can."""
    some = tasks(WORKS[work], MASKS[mask])
    assert not stacked.stackable(MODEL, by_autograd(some[0]).work)
    wanted = singly([by_autograd(task) for task in some])
    for ours, want in zip(stacked.train(some, MODEL, [data(t.client) for t in some]), wanted, strict=True):
        assert isinstance(ours, Update)
        assert ours.metrics == pytest.approx(want.metrics, rel=1e-5)
        assert (ours.metrics["samples"], ours.metrics["steps"]) == (want.metrics["samples"], want.metrics["steps"])
        for k, v in want.delta.items():
            torch.testing.assert_close(ours.delta[k], v, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("work", WORKS)
def test_a_crew_trains_what_each_would_alone_to_the_bit(work: str, mask: str) -> None:
    some, crew = tasks(WORKS[work], MASKS[mask]), crew_of(data)
    for _ in range(2):  # the first time it looks whether stacking is exact, then it relies on it
        for ours, want in zip(crew(some), singly(some), strict=True):
            check_same(ours, want)


def test_a_kind_is_looked_at_once_whatever_its_learning_rate() -> None:
    alone: list[int] = []

    def counted(task: Task) -> Update:
        alone.append(task.client)
        return train(task, MODEL, data(task.client))

    crew = Crew(MODEL, data, counted)
    for lr in (0.1, 0.05):
        crew(tasks(replace(WORKS["epoch"], lr=lr)))
    assert alone == list(range(8))
    crew(tasks(replace(WORKS["epoch"], momentum=0.9)))
    assert len(alone) == 16


def test_different_tasks_find_their_places_again() -> None:
    """Other masks, other work, more clients than one stack takes, and work that is not done stacked."""
    mixed = [
        task
        for work in (
            WORKS["epoch"],
            WORKS["steps"],
            Work(steps=2, batch=4, clip=1.0),
            Work(steps=2, report="gradient2"),
        )
        for mask in MASKS.values()
        for task in tasks(work, mask, range(STACK + 3))
    ][::-1]
    crew = crew_of(data)
    crew(mixed)
    for ours, task in zip(crew(mixed), mixed, strict=True):
        check_same(ours, train(task, MODEL, data(task.client)))


def test_one_client_diverges_and_the_others_do_not() -> None:
    def wild(client: int) -> Samples:
        return (
            replace(data(client), x=data(client).x.float() * 1e30)
            if client == 2
            else replace(data(client), x=data(client).x.float())
        )

    some, crew = tasks(WORKS["epoch"]), crew_of(wild)
    for _ in range(2):
        ended = crew(some)
        assert [isinstance(u, Diverged) for u in ended] == [c == 2 for c in range(8)]
        with pytest.raises(Diverged, match=str(ended[2]).replace("(", r"\(").replace(")", r"\)")):
            train(some[2], MODEL, wild(2))


def test_a_client_without_samples_fails_alone() -> None:
    def some(client: int) -> Samples:
        return data(client).subset(torch.arange(0)) if client == 1 else data(client)

    ended = crew_of(some)(tasks(WORKS["epoch"]))
    assert str(ended[1]) == "client 1 has no samples to train on"
    assert sum(isinstance(u, Update) for u in ended) == 7


@pytest.mark.parametrize(
    ("name", "work", "can"),
    [
        ("mlp", Work(), True),
        ("mlp", Work(clip=1.0), False),
        ("mlp", Work(loss="bce"), False),
        ("lenet5", Work(), False),
    ],
)
def test_what_can_be_stacked(name: str, work: Work, can: bool) -> None:
    assert stacked.stackable(models.build(name, (1, 28, 28), 10, seed=0, options={}), work) is can
