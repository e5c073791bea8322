"""FedMP and its kin: a textbook round beside ours, the same run from parts, and what the server may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_server import played
from world import CLIENTS, PACINGS, WORK, World, method

from prfl import config, models, problem
from prfl.bandits import e_ucb
from prfl.evaluate import evaluate
from prfl.types import State, Tree
from sim.run import simulate
from strategies.judge import Judge, judged
from strategies.method import Method
from strategies.pacing import sync

HIDDEN = 8


def kept(weight: torch.Tensor, ratio: float) -> torch.Tensor:
    """Which neurons stay: all but those of the least L1 norm, the ratio of them at most."""
    norms = weight.abs().sum(dim=1)
    stays = ceil((1 - ratio) * len(norms) - 1e-6)
    return torch.zeros(len(norms), dtype=torch.bool).index_fill_(0, norms.argsort(descending=True)[:stays], True)


def textbook(world: World, ratios: Mapping[tuple[int, int], float], seeds: Mapping[tuple[int, int], int]) -> Tree:
    """FedMP's rounds step by step: sparse model and residual, local SGD on what is left, recovery, uniform mean."""
    server = {k: v.clone() for k, v in world.params.items()}
    for version in range(max(v for v, _ in ratios) + 1):
        recovered = []
        for client in range(CLIENTS):
            keep = kept(server["fc1.weight"], ratios[version, client])
            masks = {k: torch.ones_like(v) for k, v in server.items()}
            masks["fc1.weight"] *= keep[:, None]
            masks["fc1.bias"] *= keep
            masks["fc2.weight"] *= keep[None, :]
            sparse = {k: v * masks[k] for k, v in server.items()}
            residual = {k: v - sparse[k] for k, v in server.items()}
            models.load(world.model, sparse)
            parameters = dict(world.model.named_parameters())
            optimiser, data = torch.optim.SGD(parameters.values(), WORK.lr), world.data[client]
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seeds[version, client]))
            for at in order.split(WORK.batch)[: WORK.steps]:
                x, y = data.batch(at)
                optimiser.zero_grad()
                F.cross_entropy(world.model(x), y).backward()  # type: ignore[no-untyped-call]
                for k, p in parameters.items():
                    p.grad *= masks[k]
                optimiser.step()
            recovered.append({k: v + residual[k] for k, v in models.values(world.model).items()})
        server = {k: sum(r[k] for r in recovered) / CLIENTS for k in server}
    return server


@pytest.mark.parametrize("name", ["fedmp", "up_fl"])
def test_rounds_are_the_textbooks(name: str) -> None:
    world = World(samples=34)
    world.data = [d.subset(torch.arange(34 - 2 * c)) for c, d in enumerate(world.data)]  # the mean is uniform still
    last, _ = played(world, method(name), sync(CLIENTS), versions=4)
    ratios = {(t.version, t.client): 1 - t.density for t in world.tasks}
    assert len({kept(world.params["fc1.weight"], r).sum().item() for r in ratios.values()}) > (name == "fedmp") * 2
    fresh = World()
    fresh.data = world.data
    want = textbook(fresh, ratios, {(t.version, t.client): t.seed for t in world.tasks})
    assert set(last.params) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    for k, v in last.params.items():
        torch.testing.assert_close(v, want[k], rtol=0, atol=1e-6)


def test_up_fl_prunes_all_alike_and_syn_fl_nobody() -> None:
    for name, options, share in [("up_fl", {"ratio": 0.25}, 0.75), ("up_fl", {"ratio": 0.0}, 1.0), ("syn_fl", {}, 1.0)]:
        world = World()
        played(world, method(name, **options), sync(CLIENTS))
        assert {t.density for t in world.tasks} == {share}
    with pytest.raises(config.ConfigError, match=r"ratio must be in \[0, 1\), got 1$"):
        method("up_fl", ratio=1.0)


def test_syn_fl_by_samples_is_fedavg_and_up_fl_without_pruning_is_syn_fl() -> None:
    def run(name: str, **options: Any) -> State:
        world = World()
        world.data = [d.subset(torch.arange(24 - 2 * c)) for c, d in enumerate(world.data)]
        return played(world, method(name, **options), sync(CLIENTS))[0]

    for a, b in [
        (run("syn_fl", weigh="samples"), run("fedavg")),
        (run("up_fl", ratio=0.0), run("syn_fl")),
    ]:
        for k, v in a.params.items():
            torch.testing.assert_close(v, b.params[k], rtol=0, atol=1e-6)
    assert not torch.equal(run("syn_fl").params["fc1.weight"], run("fedavg").params["fc1.weight"])


@pytest.mark.parametrize("name", ["fedmp", "data_value", "up_fl", "syn_fl"])
@pytest.mark.parametrize("pacing", ["sync", "buffered"])
def test_it_learns(name: str, pacing: str) -> None:
    world = World()
    last, _ = played(world, method(name), PACINGS[pacing], versions=30)
    before, after = (evaluate(p, world.model, world.all)["accuracy"] for p in (world.params, last.params))
    assert before < 0.6
    assert after > 0.9


OWN: dict[str, dict[str, Any]] = {"fedmp": {"valuation": "loss_decrease"}, "data_value": {}}


@pytest.mark.parametrize("name", OWN)
def test_slow_devices_come_to_hold_less(name: str) -> None:
    """Three speeds, 1, 1/2 and 1/4, and links that take no time."""
    world = World()
    world.fleet = [
        replace(d, flops=dict.fromkeys(d.flops, 1e6 / 2 ** (c % 3)), down=1e9, up=1e9)
        for c, d in enumerate(world.fleet)
    ]
    m = replace(method(name, **OWN[name]), scorer=lambda params: evaluate(params, world.model, world.all))
    played(world, m, sync(CLIENTS), versions=80)
    late = [t for t in world.tasks if t.version >= 50]
    fast, slow = ([t.density for t in late if t.client % 3 == kind] for kind in (0, 2))
    assert sum(slow) / len(slow) < 0.75 * sum(fast) / len(fast)


def test_every_client_has_a_bandit_of_its_own() -> None:
    world = World()
    last, _ = played(world, method("fedmp"), sync(CLIENTS), versions=3)
    assert {c: len(agent.pulls) for c, agent in last.density.agents.items()} == dict.fromkeys(range(CLIENTS), 3)
    assert all(reward > 0 for agent in last.density.agents.values() for _, reward in agent.pulls[:1])
    assert isinstance(method("fedmp").density, e_ucb)


EXPERIMENT = [
    "data={set: digits, clients: 6, partition: iid}", "model={name: mlp, hidden: [16]}", "work={epochs: 1, batch: 20}",
    "pacing={name: sync, clients: 3}", "stop={versions: 4}", "evaluate_every=2", "seed=5",
]  # fmt: skip


def test_a_run_brings_the_judge_and_shows_it_the_validation_split_only(tmp_path: Path) -> None:
    spec = "method={name: data_value, valuation: {name: gtg_shapley, between: 0.0}, rho: 0.0}"
    experiment = config.load(None, [*EXPERIMENT, spec])
    given = problem.build(experiment)
    small = problem.Problem(given.model, replace(given.dataset, test=given.dataset.test.subset(torch.arange(9))),
                            given.validation, given.parts, given.noise, given.seed)  # fmt: skip
    runs = [simulate(experiment, tmp_path / name, given=g) for name, g in (("a", given), ("b", given), ("c", small))]
    assert runs[0]["versions"] == 4
    assert runs[0]["stopped"] is None
    assert len({r["model_sha256"] for r in runs}) == 1  # another test split, the same model
    assert runs[0]["test_accuracy"] != runs[2]["test_accuracy"]
    judge = Judge(given, False)
    params = models.values(given.model)
    assert judge.steer(params) == evaluate(params, given.model, given.validation)
    bound = judged(Method(), judge)
    assert bound.scorer is not None
    assert judged(replace(bound, scorer=len), judge).scorer is len  # type: ignore[arg-type]


def test_a_valuation_goes_with_any_method_of_parts(tmp_path: Path) -> None:
    spec = "method={density: {name: d_ucb, arms: [0.5, 1.0]}, valuation: {name: accuracy_delta, metric: loss}}"
    result = simulate(config.load(None, [*EXPERIMENT, spec]), tmp_path / "own")
    assert result["stopped"] is None
    assert 0.5 < result["mean_density"] < 1
