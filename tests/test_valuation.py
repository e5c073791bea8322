"""Values of updates: laws over the table, Shapley values by enumeration, golden values, and what they are used for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, permutations
from math import factorial, log, nan
from typing import Any

import numpy as np
import pytest
import torch
from world import CLIENTS, PACINGS, WORK, World

from prfl import merge
from prfl.cut import Cut
from prfl.evaluate import evaluate
from prfl.masks import DENSE, Mask
from prfl.shapley import gtg_shapley, marginals, tmc_shapley
from prfl.standing import by_value
from prfl.types import Architecture, Arrival, State, Task, Tree, Update, Valuation, Work
from prfl.valuation import TABLE, accuracy_delta, diversity, loss_decrease, none, similarity, uncertainty, valued
from strategies.method import Method
from strategies.server import serve

PARTS: dict[str, Valuation] = {
    **{name: make() for name, make in TABLE.items()},
    "loss_decrease(clients)": loss_decrease("clients"),
    "accuracy_delta(others)": accuracy_delta("others", "loss"),
    "tmc_shapley(loss)": tmc_shapley("loss", tolerance=0.0),
    "gtg_shapley(loss)": gtg_shapley("loss", between=0.0, within=0.0),
}
FEW = [name for name in PARTS if name != "none"]


def state(params: Tree, part: Any = None) -> State:
    return State(0, params, Cut().rank(params, params), Architecture(), merge=part.init() if part else None)


def arrival(client: int, values: Sequence[float], mask: Mask = DENSE, weight: float = 1.0, **metrics: float) -> Arrival:
    """A client that moved the one entry by these values, packed."""
    task = Task(client, 0, {"w": torch.zeros(len(values))}, mask, Work(), seed=client)
    update = Update(client, 0, {"w": torch.tensor(values, dtype=torch.float32)}, mask, weight, metrics)
    return Arrival(task, 0.0, 1.0, 1, 1, update)


def only(*kept: bool) -> Mask:
    return Mask({"w": torch.tensor(kept)})


def unknown(some: Sequence[Arrival]) -> Mapping[str, float]:
    raise AssertionError("nobody may ask")


def of(part: Valuation, arrivals: Sequence[Arrival], size: int, worth: Any = unknown, seed: int = 0) -> list[float]:
    return list(part(state({"w": torch.zeros(size)}), arrivals, worth, np.random.default_rng(seed)))


def random_game(players: int, seed: int) -> dict[frozenset[int], float]:
    rng = np.random.default_rng(seed)
    return {frozenset(s): float(rng.random()) for r in range(players + 1) for s in combinations(range(players), r)}


def shapley(v: Mapping[frozenset[int], float], n: int) -> list[float]:
    """The definition: the sum over all coalitions without i, weighed by the orders in which they come first."""
    return [
        sum(
            factorial(len(s)) * factorial(n - len(s) - 1) / factorial(n) * (v[s | {i}] - v[s])
            for s in map(frozenset[int], _subsets(j for j in range(n) if j != i))
        )
        for i in range(n)
    ]


def _subsets(items: Iterable[int]) -> list[tuple[int, ...]]:
    held = list(items)
    return [s for r in range(len(held) + 1) for s in combinations(held, r)]


def playing(v: Mapping[frozenset[int], float], asked: list[frozenset[int]] | None = None) -> Any:
    """The worth of coalitions of arrivals 0, 1, ... in that game."""

    def worth(some: Sequence[Arrival]) -> Mapping[str, float]:
        members = frozenset(a.task.client for a in some)
        if asked is not None:
            asked.append(members)
        return {"accuracy": v[members], "loss": 1 - v[members]}

    return worth


def players(n: int) -> list[Arrival]:
    return [arrival(i, [1.0]) for i in range(n)]


def test_marginals_over_all_orders_are_the_shapley_values() -> None:
    for seed in range(5):
        v = random_game(4, seed)
        mean = np.mean([marginals(v.__getitem__, order, 0.0) for order in permutations(range(4))], axis=0)
        assert mean == pytest.approx(shapley(v, 4))


@pytest.mark.parametrize("make", [tmc_shapley, gtg_shapley])
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_sampled_orders_come_to_the_shapley_values(make: Callable[..., Valuation], metric: str) -> None:
    exact = {"tolerance": 0.0} if make is tmc_shapley else {"between": 0.0, "within": 0.0}
    for seed in range(4):
        v, asked = random_game(4, seed), list[frozenset[int]]()
        part = make(metric, change=0.0, permutations=4000, **exact)
        values = of(part, players(4), 1, playing(v, asked))
        assert values == pytest.approx(shapley(v, 4), abs=0.03)
        assert sum(values) == pytest.approx(v[frozenset(range(4))] - v[frozenset()])
        assert len(asked) == len(set(asked)) == 16  # every coalition is scored once


@pytest.mark.parametrize("make", [tmc_shapley, gtg_shapley])
def test_of_an_additive_game_one_order_is_enough(make: Callable[..., Valuation]) -> None:
    alone = [0.1, 0.0, 0.25, -0.05]
    v = {frozenset(s): sum(alone[i] for i in s) for s in _subsets(range(4))}
    exact = {"tolerance": 0.0} if make is tmc_shapley else {"within": 0.0}
    assert of(make(permutations=1, **exact), players(4), 1, playing(v)) == pytest.approx(alone)


def test_tmc_ends_when_means_have_settled_a_hundred_orders_long() -> None:
    alone = {frozenset(s): 0.1 * len(s) for s in _subsets(range(3))}
    orders = Counting()
    tmc_shapley(tolerance=0.0, permutations=500)(state({"w": torch.zeros(1)}), players(3), playing(alone), orders)
    assert orders.drawn == 101


def test_gtg_ends_after_thirty_orders_and_lets_everybody_begin() -> None:
    alone = {frozenset(s): 0.1 * len(s) for s in _subsets(range(3))}
    orders, asked = Counting(), list[frozenset[int]]()
    gtg_shapley(permutations=500)(state({"w": torch.zeros(1)}), players(3), playing(alone, asked), orders)
    assert orders.drawn == 31
    few: list[frozenset[int]] = []
    of(gtg_shapley(permutations=3), players(3), 1, playing(alone, few))
    assert {frozenset({i}) for i in range(3)} <= set(few)


class Counting(np.random.Generator):
    """Counts the orders that are drawn."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))
        self.drawn = 0

    def permutation(self, x: Any, axis: int = 0) -> Any:
        self.drawn += 1
        return super().permutation(x, axis)


def test_truncation_spares_the_scoring() -> None:
    """Whoever comes first is worth all: nothing after it is scored."""
    v = {frozenset(s): float(bool(s)) for s in _subsets(range(5))}
    for part in (tmc_shapley(), gtg_shapley()):
        asked: list[frozenset[int]] = []
        assert sum(of(part, players(5), 1, playing(v, asked))) == pytest.approx(1.0)
        assert {len(s) for s in asked} == {0, 1, 5}


def test_gtg_gives_nothing_for_a_merge_that_changed_nothing() -> None:
    v, asked = {s: 0.5 + 0.3 * (len(s) == 1) for s in random_game(4, 0)}, list[frozenset[int]]()
    v[frozenset(range(4))] = 0.509
    assert of(gtg_shapley(), players(4), 1, playing(v, asked)) == [0.0] * 4
    assert len(asked) == 2
    assert of(gtg_shapley(between=0.008), players(4), 1, playing(v)) != [0.0] * 4


def test_accuracy_delta_against_nobody_and_against_the_others() -> None:
    v = random_game(3, 1)
    full = frozenset(range(3))
    assert of(accuracy_delta(), players(3), 1, playing(v)) == [v[frozenset({i})] - v[frozenset()] for i in range(3)]
    left_out = [v[full] - v[full - {i}] for i in range(3)]
    assert of(accuracy_delta("others"), players(3), 1, playing(v)) == left_out
    assert of(accuracy_delta("others", "loss"), players(3), 1, playing(v)) == pytest.approx(left_out)


def test_a_model_that_computes_no_number_is_the_worst() -> None:
    def worth(some: Sequence[Arrival]) -> Mapping[str, float]:
        return {"accuracy": 0.1, "loss": nan if some else 2.0}

    assert of(accuracy_delta(metric="loss"), players(1), 1, worth) == [-1e9 + 2]


def test_similarity_golden() -> None:
    """Directions (1, 0) and (0, 1), the second three times as heavy, however far they go."""
    came = [arrival(0, [9.0, 0.0]), arrival(1, [0.0, 0.1], weight=3.0), arrival(2, [0.0, 0.0], weight=0.0001)]
    assert of(similarity(), came, 2) == pytest.approx([1 / 10**0.5, 3 / 10**0.5, 0.0], abs=1e-4)


def test_similarity_is_over_what_the_client_holds() -> None:
    came = [arrival(0, [2.0], only(True, False)), arrival(1, [3.0, 4.0]), arrival(2, [-6.0, 8.0])]
    values = of(similarity(), came, 2)  # the mean is ((1 + 0.6 - 0.6) / 3, 0.8)
    length = (1 / 9 + 0.64) ** 0.5
    assert values == pytest.approx([1.0, (0.6 / 3 + 0.64) / length, (-0.6 / 3 + 0.64) / length])


def test_who_moves_far_the_wrong_way_is_not_what_the_others_are_measured_by() -> None:
    came = [arrival(0, [1.0, 0.1]), arrival(1, [1.0, -0.1]), arrival(2, [-1e6, 0.0])]
    values = of(similarity(), came, 2)
    assert min(values) == values[2] < 0 < values[0]


def test_diversity_is_the_ratio_of_determinants() -> None:
    rng, eps = np.random.default_rng(0), 1e-3
    moves = rng.normal(size=(4, 6)).astype(np.float32)
    unit = moves / np.linalg.norm(moves, axis=1, keepdims=True)
    gram = unit @ unit.T + eps * np.eye(4)
    want = [np.linalg.det(gram) / np.linalg.det(np.delete(np.delete(gram, i, 0), i, 1)) - eps for i in range(4)]
    assert of(diversity(eps), [arrival(i, list(m)) for i, m in enumerate(moves)], 6) == pytest.approx(want, rel=1e-4)


def test_diversity_of_copies_and_of_right_angles() -> None:
    """A copy adds next to nothing; what lies at right angles to all adds all of itself, however long it is."""
    came = [arrival(0, [5.0], only(True, False)), arrival(1, [0.1], only(False, True)), arrival(2, [0.0, 3.0])]
    first, second, third = of(diversity(1e-6), came, 2)
    assert first == pytest.approx(1.0)
    assert second == pytest.approx(third) == pytest.approx(0.0, abs=1e-5)
    assert of(diversity(), [arrival(0, [0.0, 0.0]), arrival(1, [1.0, 0.0])], 2) == pytest.approx([0.0, 1.0])


def test_uncertainty_golden() -> None:
    """Squares 4 and (1, 3 * 1): F = (5, 3), c = 4; what one client alone holds gains more than what two share."""
    came = [arrival(0, [2.0], only(True, False)), arrival(1, [1.0, 1.0])]
    came[1] = replace(came[1], update=replace(came[1].update, delta={"w": torch.tensor([1.0, 3.0**0.5])}))
    first = 0.5 * log((4 + 5) / (4 + 1)) / 2
    second = 0.5 * (log((4 + 5) / (4 + 4)) + log((4 + 3) / 4)) / 2
    assert of(uncertainty(), came, 2) == pytest.approx([first, second])
    assert of(uncertainty(), [arrival(0, [0.0])], 1) == [0.0]


def test_loss_decrease_is_the_same_for_all() -> None:
    v = random_game(3, 2)
    fall = v[frozenset(range(3))] - v[frozenset()]
    assert of(loss_decrease(), players(3), 1, playing(v)) == pytest.approx([fall] * 3)
    came = [arrival(0, [1.0], loss_first=2.0, loss_last=1.0), arrival(1, [1.0], DENSE, 3.0, loss_first=1, loss_last=2)]
    assert of(loss_decrease("clients"), came, 1) == [-0.5, -0.5]
    with pytest.raises(ValueError, match=r"^loss_decrease: client 0 reports no loss_first and loss_last; only loss$"):
        of(loss_decrease("clients"), [arrival(0, [1.0], loss=1.0)], 1)


def some_worth(some: Sequence[Arrival]) -> Mapping[str, float]:
    score = sum((1 + a.task.client) * float(a.update.delta["w"].sum()) for a in some if a.update) / 100
    return {"accuracy": score, "loss": -score}


def batch(seed: int = 0, clients: int = 5) -> list[Arrival]:
    rng = np.random.default_rng(seed)
    masks = [DENSE, only(True, True, False), only(False, True, True)]
    return [
        arrival(c, list(rng.random((3, 2, 2)[c % 3])), masks[c % 3], 1.0 + c, loss_first=2.0, loss_last=float(c))
        for c in range(clients)
    ]


def test_every_row_of_the_table_is_tried() -> None:
    assert {type(part) for part in PARTS.values()} == set(TABLE.values())


@pytest.mark.parametrize("name", FEW)
def test_every_update_gets_a_number_whatever_order_it_came_in(name: str) -> None:
    part, now, came = PARTS[name], state({"w": torch.zeros(3)}), batch()
    lost = replace(came[0], task=replace(came[0].task, client=9), update=None, reason="device failed")
    first = valued(part, now, [*came, lost], some_worth, np.random.default_rng(0))
    assert all(isinstance(a.value, float) for a in first[:-1])
    assert first[-1] == lost
    other = valued(part, now, [lost, *came[::-1]], some_worth, np.random.default_rng(0))
    assert [a.value for a in other[::-1][:-1]] == [a.value for a in first[:-1]]
    assert valued(part, now, [lost], some_worth, np.random.default_rng(0)) == [lost]


@pytest.mark.parametrize("name", [n for n in FEW if not PARTS[n].judged])
def test_who_needs_no_judge_asks_for_nobodys_worth(name: str) -> None:
    assert len(of(PARTS[name], batch(), 3, unknown)) == 5


def test_no_valuation_is_no_value_and_no_number_is_none() -> None:
    now, came = state({"w": torch.zeros(3)}), batch()
    assert [a.value for a in valued(none(), now, came, unknown, np.random.default_rng(0))] == [None] * 5

    def worth(some: Sequence[Arrival]) -> Mapping[str, float]:
        return {"accuracy": nan}

    assert {a.value for a in valued(accuracy_delta(), now, came, worth, np.random.default_rng(0))} == {0.0}


START = {"w": torch.zeros(2)}


def worth_of(part: by_value, *values: float | None, memory: Any = None) -> tuple[list[float], Any]:
    """The shares that clients with these values get, each moving a weight of its own by 1."""
    size = len(values)
    came = [replace(arrival(c, [float(c == i) for i in range(size)]), value=v) for c, v in enumerate(values)]
    now = replace(state({"w": torch.zeros(size)}, part))
    merged, after = part(now if memory is None else replace(now, merge=memory), came)
    return merged["w"].tolist(), after


def test_by_value_golden() -> None:
    shares, memory = worth_of(by_value(merge.fed_avg()), 4.0, 2.0, -1.0)
    assert shares == pytest.approx([1 / 1.6, 0.5 / 1.6, 0.1 / 1.6])
    shares, memory = worth_of(by_value(merge.fed_avg(), rho=0.5), 0.0, 6.0, -1.0, memory=memory)
    assert memory.clients == {0: 2.0, 1: 4.0, 2: -1.0}
    assert shares == pytest.approx([0.5 / 1.6, 1 / 1.6, 0.1 / 1.6])


def test_by_value_where_nothing_is_known_or_good_is_the_inner_merge() -> None:
    for values in [(None, None), (-1.0, -2.0), (0.0, 0.0), (3.0, 3.0)]:
        assert worth_of(by_value(merge.fed_avg()), *values)[0] == [0.5, 0.5]
    assert worth_of(by_value(merge.fed_avg()))[0] == []


def test_by_value_refuses_a_merge_that_does_not_weigh() -> None:
    with pytest.raises(ValueError, match=r"^by_value: its inner merge must weigh by samples, "):
        by_value(merge.fedbuff())


def played(world: World, method: Method, pacing: str = "buffered", versions: int = 4, run: Any = None) -> State:
    begin = method.init(world.params, world.architecture, world.classes, 3)
    transport = world.transport(run=run)
    return serve(method, PACINGS[pacing], transport, begin, stop=lambda s, now: s.version >= versions)


def judged(world: World, seen: list[Tree] | None = None, **parts: Any) -> Method:
    def scorer(params: Tree) -> Mapping[str, float]:
        if seen is not None:
            seen.append(params)
        return evaluate(params, world.model, world.all)

    return Method(**parts, work=WORK, scorer=scorer)


@pytest.mark.parametrize("name", PARTS)
def test_every_valuation_in_the_loop_the_same_to_the_bit(name: str) -> None:
    runs = []
    for _ in range(2):
        world = World()
        method = judged(world, valuation=PARTS[name], merge=by_value(merge.masked_mean(), rho=0.0))
        runs.append(played(world, method))
    assert all(torch.equal(v, runs[1].params[k]) for k, v in runs[0].params.items())
    assert runs[0].merge.clients == runs[1].merge.clients
    assert bool(runs[0].merge.clients) == (name != "none")


def test_coalitions_are_merged_by_the_methods_own_merge() -> None:
    world, seen = World(), list[Tree]()
    method = judged(world, seen, valuation=accuracy_delta("others"), merge=merge.r2sp())
    last = played(world, method, "sync", versions=1)
    assert len(seen) == CLIENTS + 1
    assert all(torch.equal(v, last.params[k]) for k, v in seen[0].items())


def test_a_method_that_needs_a_judge_says_so() -> None:
    world = World()
    with pytest.raises(ValueError, match=r"^valuation: gtg_shapley needs scores of models on the server"):
        played(world, Method(valuation=gtg_shapley(), work=WORK))


def test_what_clients_say_they_are_worth_counts_for_nothing() -> None:
    world = World()

    def boast(task: Task) -> Update:
        update = world.run(task)
        return replace(update, metrics={**update.metrics, "value": 1e6})

    honest, loud = (
        played(world, Method(valuation=similarity(), merge=by_value(merge.fed_avg()), work=WORK), run=run)
        for run in (world.run, boast)
    )
    assert all(torch.equal(v, loud.params[k]) for k, v in honest.params.items())


def test_a_client_with_wrong_labels_is_worth_least() -> None:
    """Its labels are shifted by one: every valuation that looks at the data's use must say so."""
    for part in (
        accuracy_delta(metric="loss"),
        gtg_shapley("loss"),
        tmc_shapley("loss", permutations=30),
        similarity(),
    ):
        world = World()
        world.data[2] = replace(world.data[2], y=(world.data[2].y + 1) % 3)
        last = played(
            world, judged(world, valuation=part, merge=by_value(merge.fed_avg(), rho=0.5)), "sync", versions=3
        )
        standing = last.merge.clients
        assert min(standing, key=lambda c: standing[c]) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accuracy_delta("all"), "accuracy_delta: against must be one of nobody, others, got 'all'"),
        (lambda: accuracy_delta(metric="f1"), "accuracy_delta: metric must be one of accuracy, loss, got 'f1'"),
        (lambda: tmc_shapley(permutations=0), "tmc_shapley: permutations must be 1 or more, got 0"),
        (lambda: gtg_shapley(between=-1.0), "gtg_shapley: between must be 0 or more, got -1"),
        (lambda: diversity(0.0), "diversity: eps must be above 0, got 0"),
        (lambda: uncertainty(0.0), "uncertainty: prior must be above 0, got 0"),
        (lambda: by_value(merge.fed_avg(), rho=1.0), r"by_value: rho must be in \[0, 1\), got 1"),
    ],
)
def test_refuses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()
