"""Weights by data quality: divergences and weights by hand, and what clients tell of their classes."""

from __future__ import annotations

from dataclasses import replace
from math import log2

import pytest
import torch
from test_server import played
from world import CLIENTS, WORK, World

from clients.train import train
from prfl import merge
from prfl.masks import DENSE
from prfl.quality import divergence
from prfl.types import Arrival, Task, Tree, Update, Work
from strategies.method import Method, never
from strategies.pacing import sync

START: Tree = {"w": torch.tensor([[0.0]])}


def arrival(client: int, to: float, samples: float, classes: dict[str, float]) -> Arrival:
    metrics = {f"class/{c}": n for c, n in classes.items()}
    task = Task(client, 0, START, DENSE, Work(), seed=client)
    return Arrival(task, 0.0, 1.0, 1, 1, Update(client, 0, {"w": torch.tensor([to])}, DENSE, samples, metrics))


def test_divergence_by_hand() -> None:
    assert divergence({"a": 3.0, "b": 1.0}, {"a": 30.0, "b": 10.0}) == 0.0
    assert divergence({"a": 1.0}, {"b": 5.0}) == 1.0
    half = divergence({"a": 1.0}, {"a": 1.0, "b": 1.0})  # M = 3/4, 1/4
    assert half == pytest.approx(0.5 * log2(4 / 3) + 0.5 * (0.5 * log2(2 / 3) + 0.5 * log2(2)))
    assert divergence({}, {"a": 1.0}) == 1.0


def test_weights_by_hand() -> None:
    """30 samples of both classes and 10 of one: everybody is (25, 15); n / (D + eps) decides."""
    batch = [arrival(0, 1.0, 30.0, {"a": 15, "b": 15}), arrival(1, -1.0, 10.0, {"a": 10})]
    params, _ = merge.by_quality(merge.fed_avg(), eps=0.01)(Method().init(START), batch)
    everybody = {"a": 25.0, "b": 15.0}
    weights = [30 / (divergence({"a": 15, "b": 15}, everybody) + 0.01), 10 / (divergence({"a": 10}, everybody) + 0.01)]
    assert params["w"].item() == pytest.approx((weights[0] - weights[1]) / sum(weights))
    assert weights[0] / weights[1] > 3 * 3  # three times the samples, and much more like all


def test_where_nobody_tells_samples_decide() -> None:
    batch = [arrival(0, 1.0, 30.0, {}), arrival(1, -1.0, 10.0, {})]
    params, _ = merge.by_quality(merge.fed_avg())(Method().init(START), batch)
    assert params["w"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("lie", [1.7e308, -1.0, 0.0])
def test_what_a_client_makes_up_harms_no_number(lie: float) -> None:
    batch = [arrival(0, 1.0, 30.0, {"a": lie, "b": lie}), arrival(1, -1.0, 10.0, {"a": 10})]
    params, _ = merge.by_quality(merge.fed_avg())(Method().init(START), batch)
    assert bool(params["w"].isfinite().all())


def test_clients_tell_their_classes_when_asked() -> None:
    world = World()
    told = {}
    for labels in (False, True):
        task = Task(0, 0, world.params, DENSE, replace(WORK, labels=labels), seed=1)
        metrics = train(task, world.model, world.data[0]).metrics
        told[labels] = {k: v for k, v in metrics.items() if k.startswith("class/")}
    counts = torch.bincount(world.data[0].y)
    assert told == {False: {}, True: {f"class/{c}": float(n) for c, n in enumerate(counts) if n}}


def test_a_run_by_quality_differs_from_one_by_samples() -> None:
    runs = []
    for part in (merge.fed_avg(), merge.by_quality(merge.fed_avg())):
        world = World()
        world.data = [d.subset(torch.arange(24 - 2 * c)) for c, d in enumerate(world.data)]
        work = replace(WORK, labels=True)
        runs.append(played(world, Method(merge=part, work=work, remask=never()), sync(CLIENTS))[0].params)
    assert any(not torch.allclose(v, runs[1][k], atol=1e-4) for k, v in runs[0].items())
