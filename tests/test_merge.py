"""Merges: laws over the table, equality with FedAvg, golden arrays, errors."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from prfl import merge
from prfl.average import OPEN, Term, average, keep, local
from prfl.cache import ROWS, Cached, normalised
from prfl.cut import Cut
from prfl.masks import DENSE, Mask
from prfl.merge import TABLE
from prfl.staleness import constant, hinge, polynomial
from prfl.types import Architecture, Arrival, Group, Member, Merge, State, Task, Tree, Update, Work

SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "bn.running_mean": (4,),
    "bn.running_var": (4,),
    "fc.weight": (5, 16),
    "fc.bias": (5,),
}
GROUP = Group(
    4, (Member("conv.weight", 0), Member("bn.running_mean", 0), Member("bn.running_var", 0), Member("fc.weight", 1, 4))
)


def tree(seed: int) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.rand(shape, generator=draw) + 0.1 for k, shape in SHAPES.items()}


def bits(seed: int, share: float = 0.5) -> Mask:
    draw = torch.Generator().manual_seed(seed)
    return Mask({k: torch.rand(s, generator=draw) < share for k, s in SHAPES.items() if len(s) > 1})


def channels(kept: Sequence[int]) -> Mask:
    return Mask(channels={GROUP: torch.tensor(kept)})


def state(params: Tree, part: Merge, version: int = 0) -> State:
    return State(version, params, Cut().rank(params, params), Architecture(), merge=part.init())


def arrival(
    start: Tree,
    local: Tree,
    mask: Mask = DENSE,
    client: int = 0,
    version: int = 0,
    weight: float = 1.0,
    at: float = 1.0,
) -> Arrival:
    """A client that took `mask` of `start` to `local`."""
    delta = {k: mask.gather(k, local[k]) - mask.gather(k, v) for k, v in start.items()}
    task = Task(client, version, start, mask, Work(), seed=client)
    return Arrival(task, 0.0, at, 1, 1, Update(client, version, delta, mask, weight))


def one(**values: float | list[float]) -> Tree:
    return {k: torch.tensor(v).reshape(-1) for k, v in values.items()}


def batch_of(start: Tree, masks: Sequence[Mask], version: int = 0) -> list[Arrival]:
    return [
        arrival(start, tree(10 + i), mask, client=i, version=version, weight=1.0 + i, at=3.0 - i % 2)
        for i, mask in enumerate(masks)
    ]


MASKS = {
    "dense": [DENSE] * 4,
    "weights": [bits(i) for i in range(4)],
    "channels": [channels(kept) for kept in ([0], [0, 2], [0, 2], [0, 1, 2])],
    "mixed": [DENSE, bits(1), channels([1, 3]), bits(2, 0.2)],
}
PLAIN = [name for name in TABLE if name not in ("momentum", "adam", "by_value", "by_quality")]
PARTS: dict[str, Merge] = {
    **{name: TABLE[name]() for name in PLAIN},
    **{f"{name}(uniform)": TABLE[name](weigh="uniform") for name in PLAIN if name != "fedasync"},
    **{f"masked_mean({m})": merge.masked_mean(missing=m) for m in ("residual", "zero")},
    "fedbuff(holders)": merge.fedbuff(missing="holders"),
    "fedasync(hinge)": merge.fedasync(alpha=1.0, staleness=hinge()),
    "mask_fed_avg(eta)": merge.mask_fed_avg(eta=0.5),
    "buff_mask_fed_avg(frozen)": merge.buff_mask_fed_avg(age="frozen"),
    "buff_fed_avg(frozen)": merge.buff_fed_avg(age="frozen"),
    "heterofl(head)": merge.heterofl(head=("fc.weight", "fc.bias")),
    "momentum": merge.momentum(merge.masked_mean()),
    "momentum(cache)": merge.momentum(merge.buff_mask_fed_avg()),
    "adam": merge.adam(merge.fed_avg()),
    "by_value": merge.by_value(merge.masked_mean()),
    "by_quality": merge.by_quality(merge.masked_mean()),
}


def same(a: Tree, b: Tree) -> bool:
    return list(a) == list(b) and all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)


def close(a: Tree, b: Tree, tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(a[k], b[k], rtol=tolerance, atol=tolerance) for k in b)


def test_every_row_of_the_table_is_tried():
    assert {type(part) for part in PARTS.values()} == set(TABLE.values())


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", PARTS)
def test_order_of_a_batch_does_not_matter_to_the_bit(name: str, masks: str):
    part, start = PARTS[name], tree(0)
    arrivals = [
        *batch_of(start, MASKS[masks], version=2),
        arrival(tree(1), tree(3), MASKS[masks][1], client=7, version=1, weight=0.3),
        arrival(tree(1), tree(4), MASKS[masks][2], client=7, version=2, weight=0.3),
    ]
    before = state(start, part, version=4)
    merged, memory = part(before, arrivals)
    for seed in range(3):
        shuffled = [arrivals[i] for i in np.random.default_rng(seed).permutation(len(arrivals))]
        again, other = part(before, shuffled)
        assert same(merged, again)
        follow, _ = part(replace(before, version=5, params=merged, merge=memory), arrivals[:1])
        assert same(follow, part(replace(before, version=5, params=again, merge=other), arrivals[:1])[0])


@pytest.mark.parametrize("masks", ["weights", "channels"])
@pytest.mark.parametrize("name", PARTS)
def test_what_nobody_holds_keeps_its_value_to_the_bit(name: str, masks: str):
    part, old = PARTS[name], {k: v - 0.6 for k, v in tree(0).items()}
    old["fc.weight"][0, :4] = -0.0
    arrivals = batch_of(tree(1), MASKS[masks], version=1)
    merged, memory = part(state(old, part, version=3), arrivals)
    again, _ = part(replace(state(merged, part, version=4), merge=memory), arrivals[:1])
    nobody = 0
    for k, v in old.items():
        free = ~torch.stack([a.task.mask.where(k, v.shape) for a in arrivals]).any(dim=0)
        nobody += int(free.sum())
        for new in (merged, again):
            assert new[k][free].numpy().tobytes() == v[free].numpy().tobytes()
    assert nobody
    assert not same(merged, old)


@pytest.mark.parametrize("name", PARTS)
def test_no_arrival_changes_nothing(name: str):
    part, old = PARTS[name], tree(0)
    assert same(part(state(old, part), [])[0], old)
    failed = replace(arrival(old, tree(1)), update=None)
    assert same(part(state(old, part), [failed])[0], old)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", PARTS)
def test_a_merge_is_a_pure_function(name: str, masks: str):
    part, old = PARTS[name], tree(0)
    arrivals = batch_of(tree(1), MASKS[masks])
    first, memory = part(state(old, part), arrivals[:2])
    before = replace(state(first, part, version=1), merge=memory)
    kept = [dict(memory)] if isinstance(memory, dict) else [memory]
    frozen = {k: v.clone() for k, v in first.items()}
    deltas = [{k: v.clone() for k, v in a.update.delta.items()} for a in arrivals if a.update]
    merged, newer = part(before, arrivals)
    assert same(part(before, arrivals)[0], merged)
    assert same(first, frozen)
    assert same(tree(1), arrivals[0].task.params)
    assert all(same(a.update.delta, d) for a, d in zip(arrivals, deltas, strict=True) if a.update)
    assert kept == ([dict(memory)] if isinstance(memory, dict) else [memory])
    assert memory is None or newer is not memory
    for k, v in merged.items():
        assert v.shape == old[k].shape
        assert v.dtype == torch.float32
        assert v.isfinite().all()
        assert v.data_ptr() not in {first[k].data_ptr(), arrivals[0].update.delta[k].data_ptr()}  # type: ignore[union-attr]


SETTLED = {name: part for name, part in PARTS.items() if name not in ("adam", "fedasync", "mask_fed_avg(eta)")}


@pytest.mark.parametrize("name", SETTLED)
def test_equal_updates_merge_to_that_update(name: str):
    part, start, local = SETTLED[name], tree(0), tree(1)
    arrivals = [arrival(start, local, client=i, weight=2.0 + i) for i in range(5)]
    assert close(part(state(start, part), arrivals)[0], local)


HOLDERS = [
    n for n in SETTLED if not any(s in n for s in ("fed_avg", "residual", "zero", "r2sp", "gradient_avg", "fedbuff"))
]
HOLDERS += ["mask_fed_avg", "buff_mask_fed_avg", "buff_mask_fed_avg(frozen)", "fedbuff(holders)"]


@pytest.mark.parametrize("masks", ["weights", "channels", "mixed"])
@pytest.mark.parametrize("name", HOLDERS)
def test_equal_updates_merge_to_that_update_wherever_held(name: str, masks: str):
    part, start, local = SETTLED[name], tree(0), tree(1)
    arrivals = [arrival(start, local, mask, client=i, weight=2.0 + i) for i, mask in enumerate(MASKS[masks])]
    merged, _ = part(state(start, part), arrivals)
    for k, v in merged.items():
        held = torch.stack([m.where(k, v.shape) for m in MASKS[masks]]).any(dim=0)
        assert torch.allclose(v[held], local[k][held], atol=1e-6)


def fed_avg(locals_: Sequence[Tree], weights: Sequence[float]) -> Tree:
    """McMahan et al. 2017, in float64: sum(n_k w_k) / sum(n_k)."""
    return {
        k: sum(n * v[k].double() for n, v in zip(weights, locals_, strict=True)).div(sum(weights)).float()  # type: ignore[union-attr]
        for k in SHAPES
    }


EQUAL = {
    **{
        n: p for n, p in SETTLED.items() if "uniform" not in n and not n.startswith(("fedbuff", "heterofl", "fedasync"))
    },
    "fedbuff": merge.fedbuff(weigh="samples"),
    "fedbuff(holders)": merge.fedbuff(weigh="samples", missing="holders"),
    "heterofl": merge.heterofl(weigh="samples"),
    "heterofl(head)": merge.heterofl(weigh="samples", head=("fc.weight",)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_dense_and_all_present_is_textbook_fed_avg(name: str):
    part, start = EQUAL[name], tree(0)
    arrivals = batch_of(start, [DENSE] * 6)
    expected = fed_avg([tree(10 + i) for i in range(6)], [1.0 + i for i in range(6)])
    assert close(part(state(start, part), arrivals)[0], expected)
    assert {type(p) for p in EQUAL.values()} >= {TABLE[n] for n in TABLE if n not in ("fedasync", "adam")}


DAMPED = {
    "masked_mean": merge.masked_mean(staleness=polynomial(1.0)),
    "masked_mean(residual)": merge.masked_mean("residual", polynomial(1.0)),
    "masked_mean(zero)": merge.masked_mean("zero", polynomial(1.0)),
    "masked_mean(uniform)": merge.masked_mean(staleness=polynomial(1.0), weigh="uniform"),
    "fedbuff": merge.fedbuff(staleness=polynomial(1.0)),
    "fedbuff(samples)": merge.fedbuff(staleness=polynomial(1.0), weigh="samples"),
    "fedasync": merge.fedasync(alpha=1.0, staleness=polynomial(1.0)),
}


@pytest.mark.parametrize("masks", ["dense", "weights"])
@pytest.mark.parametrize("name", DAMPED)
def test_staleness_damps_the_step_of_one_update_alone(name: str, masks: str):
    part, start, local = DAMPED[name], tree(0), tree(1)
    alone = [arrival(start, local, MASKS[masks][0], weight=7.0)]
    fresh, _ = part(state(start, part), alone)
    stale, _ = part(state(start, part, version=3), alone)
    assert close({k: v - start[k] for k, v in stale.items()}, {k: (v - start[k]) / 4 for k, v in fresh.items()})
    assert not close(fresh, start)


SHARED = ["fed_avg", "mask_fed_avg", "buff_mask_fed_avg", "buff_fed_avg", "r2sp", "gradient_avg", "heterofl", "voted"]


@pytest.mark.parametrize("name", SHARED)
def test_staleness_sets_the_shares(name: str):
    """One stale update alone has all the say; beside a fresh one it has the lesser share."""
    part, start = TABLE[name](staleness=polynomial(1.0)), one(w=[0.0])
    old = arrival(start, one(w=[1.0]), client=0, version=0)
    new = arrival(start, one(w=[-1.0]), client=1, version=1)
    assert part(state(start, part, version=1), [old])[0]["w"].item() == 1.0
    assert part(state(start, part, version=1), [old, new])[0]["w"].item() == pytest.approx(-1 / 3)


def three(*masks: list[bool]) -> list[Arrival]:
    """PR-FL's worked example: values (1, 3, 2); the second weight is 1 where held; the third is held by none."""
    start = one(w=[0.0, 0.0, 3.0])
    values = ([1.0, 1.0, 0.0], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0])
    kept = [Mask({"w": torch.tensor(m)}) for m in masks]
    return [arrival(start, one(w=v), m, client=i) for i, (v, m) in enumerate(zip(values, kept, strict=True))]


EXAMPLE = [True, True, False], [True, False, False], [True, False, False]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (merge.buff_mask_fed_avg(), [2.0, 1.0, 3.0]),
        (merge.mask_fed_avg(), [2.0, 1.0, 3.0]),
        (merge.mask_fed_avg(eta=0.5), [1.0, 0.5, 3.0]),
        (merge.heterofl(), [2.0, 1.0, 3.0]),
        (merge.masked_mean(), [2.0, 1.0, 3.0]),
        (merge.fed_avg(), [2.0, 1 / 3, 3.0]),
        (merge.buff_fed_avg(), [2.0, 1 / 3, 3.0]),
        (merge.masked_mean("zero"), [2.0, 1 / 3, 3.0]),
        (merge.masked_mean("residual"), [2.0, 1 / 3, 3.0]),
        (merge.r2sp(), [2.0, 1 / 3, 3.0]),
        (merge.gradient_avg(), [2.0, 1 / 3, 3.0]),
        (merge.fedbuff(), [2.0, 1 / 3, 3.0]),
        (merge.fedbuff(missing="holders"), [2.0, 1.0, 3.0]),
        (merge.fedasync(alpha=0.5), [1.875, 0.5, 3.0]),  # 0 -> .5 -> 1.75 -> 1.875
    ],
)
def test_pr_fl_example(part: Merge, expected: list[float]):
    merged, _ = part(state(one(w=[0.0, 0.0, 3.0]), part), three(*EXAMPLE))
    assert merged["w"].tolist() == pytest.approx(expected)


def test_what_a_missing_weight_counts_as():
    """Two clients from W_i = 4 at version 0, merged into W = 10; the first holds the weight and takes it to 6."""
    start, now = one(w=[4.0, 0.0]), one(w=[10.0, 0.0])
    only = [Mask({"w": torch.tensor(m)}) for m in ([True, True], [False, True])]
    arrivals = [arrival(start, one(w=[6.0, 0.0]), m, client=i) for i, m in enumerate(only)]
    expected = {
        merge.masked_mean(): 12.0,  # 10 + 2
        merge.masked_mean("residual"): 11.0,  # 10 + 2 / 2
        merge.masked_mean("zero"): 6.0,  # 10 + (2 - 10) / 2
        merge.fed_avg(): 3.0,  # 6 / 2
        merge.mask_fed_avg(): 6.0,
        merge.buff_mask_fed_avg(): 6.0,
        merge.buff_fed_avg(): 3.0,
        merge.r2sp(): 5.0,  # (6 + 4) / 2
        merge.gradient_avg(): 8.0,  # (6 + 10) / 2
        merge.fedbuff(staleness=constant()): 11.0,
        merge.fedasync(alpha=0.5, staleness=constant()): 8.0,
        merge.heterofl(): 6.0,
    }
    got = {part: part(state(now, part, version=1), arrivals)[0]["w"][0].item() for part in expected}
    assert got == pytest.approx(expected)


def test_fedasync_follows_arrival_times():
    part, start = merge.fedasync(alpha=0.5, staleness=constant()), one(w=[0.0])
    first, second = (arrival(start, one(w=[v]), client=1 - i, at=float(i)) for i, v in enumerate([4.0, 8.0]))
    assert part(state(start, part), [second, first])[0]["w"].item() == 5.0  # 0 -> 2 -> 5


def test_fedbuff_divides_by_the_buffer():
    part, start = merge.fedbuff(lr=2.0, staleness=polynomial(1.0)), one(w=[1.0])
    arrivals = [arrival(start, one(w=[1.0 + d]), client=i, version=v) for i, (d, v) in enumerate([(3.0, 1), (2.0, 0)])]
    assert part(state(start, part, version=1), arrivals)[0]["w"].item() == 1.0 + 2.0 * (3.0 + 2.0 / 2) / 2


def test_cache_keeps_absent_clients_and_only_packed_values():
    start, mask = one(w=[0.0, 5.0]), Mask({"w": torch.tensor([True, False])})
    for age, share in (("growing", 1 / 3), ("frozen", 1.0)):
        part = merge.buff_mask_fed_avg(age=age, staleness=polynomial(1.0))
        merged, memory = part(state(start, part), [arrival(start, one(w=[3.0, 0.0]), mask, client=0)])
        assert merged["w"].tolist() == [3.0, 5.0]
        assert isinstance(memory[0], Cached)
        assert memory[0].values.tolist() == [3.0]
        assert memory[0].at.tolist() == [0]
        later = replace(state(merged, part, version=2), merge=memory)
        new = arrival(merged, one(w=[7.0, 5.0]), mask, client=1, version=2)
        both, memory = part(later, [new])
        assert both["w"].tolist() == pytest.approx([(share * 3 + 7) / (share + 1), 5.0])
        assert sorted(memory) == [0, 1]


@pytest.mark.parametrize("masks", MASKS)
def test_a_large_cache_is_the_average_of_its_clients(masks: str):
    """More values than are summed in one go."""
    part, start, clients = merge.buff_mask_fed_avg(), tree(0), 700
    assert clients * sum(v.numel() for v in start.values()) > ROWS
    arrivals = batch_of(start, [MASKS[masks][i % 4] for i in range(clients)])
    merged, memory = part(state(start, part), arrivals)
    terms = [(a.update.mask, local(a.task, a.update), a.update.weight, a.update.weight) for a in arrivals]
    mean, held = average(start, terms)
    assert close(merged, keep(held(), mean, start), 1e-5)
    assert {c.at is None for c in memory.values()} == {MASKS[masks][i] is DENSE for i in range(4)}


def textbook(params: Tree, terms: Sequence[Term], over: float | None) -> tuple[Tree, Tree]:
    """Mean and count in float64, one term after another."""
    total = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in params.items()}
    count = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in params.items()}
    for mask, values, factor, share in terms:
        for k, v in values.items():
            held = mask.where(k, total[k].shape)
            total[k][held] += factor * v.double()
            count[k][held] += share
    return {k: total[k] / (count[k].clamp_min(1e-30) if over is None else over) for k in params}, count


SHARING = {
    "one for all": [bits(1)],
    "dense": [DENSE],
    "tiers": [bits(1, 0.2), bits(1, 0.5), DENSE],
    "channels and weights": [channels([0, 2]), bits(2), channels([0, 2])],
    "more than are open at once": [bits(i, 0.1 + 0.04 * i) for i in range(2 * OPEN + 3)],
}


@pytest.mark.parametrize("over", [None, 7.5])
@pytest.mark.parametrize("masks", SHARING)
def test_terms_that_share_masks_are_summed_as_one_by_one(masks: str, over: float | None):
    start, apart = tree(0), SHARING[masks]
    terms: list[Term] = []
    for i in range(3 * len(apart)):
        mask = apart[i % len(apart)]
        names = list(SHAPES)[i % 2 :]  # not all name every entry
        terms.append((mask, {k: mask.gather(k, tree(i)[k]) for k in names}, 0.5 + i, 1.0 + i % 4))
    before = [{k: v.clone() for k, v in values.items()} for _, values, _, _ in terms]
    mean, count = average(start, iter(terms), over)
    expected, held = textbook(start, terms, over)
    assert close({k: v.double() for k, v in mean.items()}, expected)
    assert close({k: v.double() for k, v in count().items()}, held)
    for k, v in mean.items():
        nobody = held[k] == 0
        assert torch.equal(torch.signbit(v[nobody]), torch.ones_like(nobody[nobody]))
        assert not v[nobody].any()
    assert all(same(values, b) for (_, values, _, _), b in zip(terms, before, strict=True))
    regrouped, _ = average(start, sorted(terms, key=lambda term: apart.index(term[0])), over)
    assert len(apart) > OPEN or same(regrouped, mean)


@pytest.mark.parametrize("masks", SHARING)
@pytest.mark.parametrize("name", PARTS)
def test_order_does_not_matter_to_the_bit_where_masks_are_shared(name: str, masks: str):
    part, start, apart = PARTS[name], tree(0), SHARING[masks]
    arrivals = batch_of(start, [apart[i % len(apart)] for i in range(2 * len(apart) + 1)])
    before = state(start, part, version=2)
    merged, _ = part(before, arrivals)
    for order in (np.random.default_rng(1).permutation(len(arrivals)), range(len(arrivals) - 1, -1, -1)):
        assert same(merged, part(before, [arrivals[i] for i in order])[0])


def test_clients_with_the_same_places_share_them_in_the_cache():
    """Whatever mask they come from, and from one merge to the next."""
    part, start = merge.buff_mask_fed_avg(), tree(0)
    by_weight = Mask({k: channels([0, 2]).where(k, torch.Size(s)) for k, s in SHAPES.items() if k != "fc.bias"})
    first, memory = part(state(start, part), batch_of(start, [channels([0, 2]), by_weight, bits(1), DENSE]))
    assert memory[0].at is memory[1].at is not None
    assert memory[3].at is None
    later = [arrival(first, tree(20), m, client=4 + i, version=1) for i, m in enumerate((channels([0, 2]), bits(1)))]
    _, memory = part(replace(state(first, part, version=1), merge=memory), later)
    assert memory[4].at is memory[0].at
    assert memory[5].at is memory[2].at
    assert len({id(c.at) for c in memory.values()}) == 3


@pytest.mark.parametrize("name", ["buff_mask_fed_avg", "buff_fed_avg"])
def test_cache_sums_in_client_order(name: str):
    part, start = TABLE[name](), tree(0)
    merged, memory = part(state(start, part), batch_of(start, MASKS["mixed"]))
    backwards = dict(reversed(memory.items()))
    assert same(merged, part(replace(state(start, part), merge=backwards), [])[0])


def test_mask_fed_avg_mixes_by_the_staleness_of_all_clients_seen():
    part, start = merge.mask_fed_avg(staleness=polynomial(1.0)), one(w=[0.0])
    first = [arrival(start, one(w=[0.0]), client=i) for i in range(3)]
    _, memory = part(state(start, part), first)
    assert memory == {0: 1.0, 1: 1.0, 2: 1.0}
    late = arrival(start, one(w=[8.0]), client=2, version=0)
    merged, memory = part(replace(state(start, part, version=1), merge=memory), [late])
    assert memory == {0: 1.0, 1: 1.0, 2: 0.5}
    assert merged["w"].item() == pytest.approx(8.0 * 0.5 / 2.5)
    assert sum(normalised(memory).values()) == pytest.approx(1.0)


def test_heterofl_head_rows_come_from_clients_that_hold_the_class():
    part, start = merge.heterofl(head=("head",)), {"head": torch.zeros(3, 2), "body": torch.zeros(1)}
    locals_ = [{"head": torch.full((3, 2), v), "body": torch.tensor([v])} for v in (1.0, 3.0, 8.0)]
    arrivals = [arrival(start, local, client=i) for i, local in enumerate(locals_)]
    said: list[dict[str, float]] = [
        {"class/0": 1.0, "class/2": 0.0, "class/99": 1.0, "class/x": 1.0},
        {"class/1": 1.0},
        {},
    ]
    arrivals = [
        replace(a, update=replace(a.update, metrics=m)) for a, m in zip(arrivals, said, strict=True) if a.update
    ]
    merged, _ = part(state(start, part), arrivals)
    assert merged["body"].item() == 4.0
    assert merged["head"].tolist() == [[4.5, 4.5], [5.5, 5.5], [8.0, 8.0]]
    narrow, old = Mask({"head": torch.tensor([[True, False]] * 3)}), {**start, "head": torch.full((3, 2), 2.0)}
    sliced = arrival(old, locals_[0], narrow)
    assert sliced.update is not None
    merged, _ = part(state(old, part), [replace(sliced, update=replace(sliced.update, metrics=said[0]))])
    assert merged["head"].tolist() == [[1.0, 2.0], [2.0, 2.0], [2.0, 2.0]]


def test_variance_never_becomes_negative_from_old_moves():
    start, now = one(running_var=[9.0]), {"bn.running_var": torch.tensor([1.0])}
    start = {"bn.running_var": start["running_var"]}
    old = [arrival(start, {"bn.running_var": torch.tensor([2.0])}, client=i) for i in range(3)]
    for part in (
        merge.masked_mean(lr=3.0),
        merge.fedbuff(lr=3.0),
        merge.momentum(merge.fed_avg(), lr=5.0),
        merge.adam(merge.fed_avg()),
    ):
        merged, memory = part(state(now, part, version=1), old)
        merged, _ = part(replace(state(merged, part, version=2), merge=memory), old)
        assert 1.0 <= merged["bn.running_var"].item() <= 2.0


def test_momentum_golden():
    part, start = merge.momentum(merge.fed_avg(), beta=0.5, lr=2.0), one(w=[0.0, 0.0])
    first, memory = part(state(start, part), [arrival(start, one(w=[1.0, 0.0]))])
    assert first["w"].tolist() == [2.0, 0.0]
    second, memory = part(replace(state(first, part, version=1), merge=memory), [arrival(first, one(w=[3.0, 0.0]))])
    assert memory.first["w"].tolist() == [1.5, 0.0]
    assert second["w"].tolist() == [5.0, 0.0]


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_moments_rest_where_nobody_holds_and_nothing_moved(name: str):
    part, start, half = TABLE[name](merge.fed_avg()), one(w=[0.0, 0.0]), Mask({"w": torch.tensor([True, False])})
    first, memory = part(state(start, part), [arrival(start, one(w=[1.0, 1.0]))])
    second, newer = part(replace(state(first, part, version=1), merge=memory), [arrival(first, start, half)])
    assert second["w"][1] == first["w"][1]
    assert newer.first["w"][1] == memory.first["w"][1]
    assert second["w"][0] != first["w"][0]


def test_momentum_follows_a_cache_where_no_arrival_holds():
    """w: 0 from version 0, 6 from version 1; their shares change with age though only v arrives."""
    part, start = merge.momentum(merge.buff_mask_fed_avg(staleness=polynomial(1.0)), beta=0.5), one(w=[0.0], v=[0.0])
    w, v = (Mask({"w": torch.tensor([a]), "v": torch.tensor([not a])}) for a in (True, False))
    came = [arrival(start, one(w=[u], v=[0.0]), w, client=i, version=i) for i, u in enumerate([0.0, 6.0])]
    first, memory = part(state(start, part, version=1), came)
    assert first["w"].item() == pytest.approx(4.0)
    new = arrival(first, one(w=[0.0], v=[1.0]), v, client=2, version=2)
    second, _ = part(replace(state(first, part, version=2), merge=memory), [new])
    assert second["w"].item() == pytest.approx(4.0 + (3.6 - 4.0) + 0.5 * 4.0)


def test_adam_golden():
    """m = .1 D, v = .99 tau^2 + .01 D^2; W + lr m / (sqrt(v) + tau)."""
    part, start = merge.adam(merge.fed_avg(), lr=0.5, tau=0.1), one(w=[1.0])
    merged, memory = part(state(start, part), [arrival(start, one(w=[3.0]))])
    v = 0.99 * 0.01 + 0.01 * 4
    assert memory.first["w"].item() == pytest.approx(0.2)
    assert memory.second["w"].item() == pytest.approx(v)
    assert merged["w"].item() == pytest.approx(1 + 0.5 * 0.2 / (v**0.5 + 0.1))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("masked_mean", {"missing": "none"}, "masked_mean: missing must be one of holders, residual, zero, got 'none'"),
        ("masked_mean", {"lr": 0.0}, "masked_mean: lr must be above 0, got 0"),
        ("fedbuff", {"missing": "zero"}, "fedbuff: missing must be one of everyone, holders, got 'zero'"),
        ("fed_avg", {"weigh": "size"}, "fed_avg: weigh must be one of samples, uniform, got 'size'"),
        ("mask_fed_avg", {"eta": 1.5}, r"mask_fed_avg: eta must be in \(0, 1\], got 1.5"),
        ("buff_fed_avg", {"age": "old"}, "buff_fed_avg: age must be one of growing, frozen, got 'old'"),
        ("fedasync", {"alpha": 0.0}, r"fedasync: alpha must be in \(0, 1\], got 0"),
        ("adam", {"inner": merge.fed_avg(), "beta1": 1.0}, r"adam: beta1 must be in \[0, 1\), got 1"),
        ("momentum", {"inner": merge.fed_avg(), "lr": -1.0}, "momentum: lr must be above 0, got -1"),
    ],
)
def test_refuses(name: str, fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        TABLE[name](**fields)


def test_heterofl_names_what_exists():
    part, start = merge.heterofl(head=("top",)), one(w=[0.0])
    with pytest.raises(ValueError, match="heterofl: the model has no entry 'top' for its head; has w"):
        part(state(start, part), [arrival(start, start)])


@pytest.mark.parametrize("name", PARTS)
def test_a_small_merge_takes_less_than_a_millisecond(name: str):
    part, start = PARTS[name], {"fc.weight": torch.zeros(10, 10)}
    if name == "heterofl(head)":
        part = merge.heterofl(head=("fc.weight",))
    arrivals = [arrival(start, {"fc.weight": torch.ones(10, 10)}, client=i) for i in range(10)]
    before = state(start, part)
    best = min(_seconds(part, before, arrivals) for _ in range(30))
    assert best < 1e-3


def _seconds(part: Merge, before: State, arrivals: list[Arrival]) -> float:
    began = time.perf_counter()
    part(before, arrivals)
    return time.perf_counter() - began
