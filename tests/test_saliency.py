"""Saliency and signals: laws over the table, golden arrays, errors."""

from collections.abc import Mapping

import pytest
import torch

from prfl import saliency, signals
from prfl.cut import Cut
from prfl.masks import DENSE, Mask
from prfl.saliency import TABLE
from prfl.types import Arrival, Group, Member, Saliency, Task, Tree, Update, Work

SHAPES = {"conv.weight": (4, 3, 3, 3), "bn.bias": (4,), "fc.weight": (5, 4)}
GROUP = Group(4, (Member("conv.weight", 0), Member("bn.bias", 0), Member("fc.weight", 1)))
PARTS: dict[str, Saliency] = {
    **{name: make() for name, make in TABLE.items()},
    "signal(change)": saliency.signal("change"),
    "random(3)": saliency.random(seed=3),
}
REPORTED = ["gradient", "gradient2", "taylor", "signal", "signal(change)"]


def tree(seed: int) -> Tree:
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=draw) for k, s in SHAPES.items()}


def holes(seed: int) -> Tree:
    """A report with NaN in about half the places."""
    draw = torch.Generator().manual_seed(100 + seed)
    return {k: torch.where(torch.rand(v.shape, generator=draw) < 0.5, v, torch.nan) for k, v in tree(seed).items()}


SIGNALS: Mapping[str, Tree | None] = {
    "none": None,
    "full": tree(1),
    "holes": holes(1),
    "nan": {k: torch.full(s, torch.nan) for k, s in SHAPES.items()},
    "zero": {k: torch.zeros(s) for k, s in SHAPES.items()},
    "part": {"fc.weight": tree(1)["fc.weight"]},
    "huge": {k: v * 3e38 for k, v in tree(1).items()},
    "inf": {k: v / 0 for k, v in tree(1).items()},
    "tiny": {k: v * 1e-38 for k, v in holes(1).items()},
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", PARTS)
def test_scores_have_the_shape_and_are_finite_and_nothing_is_changed(name: str, signal: str):
    params, given = tree(0), SIGNALS[signal]
    before = {k: v.clone() for k, v in (given or {}).items()}
    scores = PARTS[name](params, given)
    for k, v in params.items():
        assert scores[k].shape == v.shape
        assert scores[k].dtype == torch.float32
        assert scores[k].isfinite().all()
        assert scores[k].data_ptr() not in {v.data_ptr(), (given or {}).get(k, scores["fc.weight"][:0]).data_ptr()}
    assert all(torch.equal(params[k], v) for k, v in tree(0).items())
    assert all(torch.equal(given[k].nan_to_num(7), v.nan_to_num(7)) for k, v in before.items() if given)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", PARTS)
def test_the_order_of_entries_does_not_matter(name: str, signal: str):
    given = SIGNALS[signal]
    scores = PARTS[name](tree(0), given)
    turned = dict(reversed(given.items())) if given else None
    again = PARTS[name](dict(reversed(tree(0).items())), turned)
    assert all(torch.equal(scores[k], again[k]) for k in scores)


@pytest.mark.parametrize("name", [*REPORTED, "magnitude"])
def test_scores_move_with_their_weights(name: str):
    """Swapping two output channels of params and report swaps their scores."""
    turn = torch.tensor([2, 0, 3, 1])

    def turned(t: Tree) -> Tree:
        return {**t, "conv.weight": t["conv.weight"][turn]}

    scores, again = PARTS[name](tree(0), holes(1)), PARTS[name](turned(tree(0)), turned(holes(1)))
    assert torch.equal(scores["conv.weight"][turn], again["conv.weight"])


@pytest.mark.parametrize("signal", ["none", "nan"])
@pytest.mark.parametrize("name", REPORTED)
def test_without_any_report_magnitude_decides(name: str, signal: str):
    scores = PARTS[name](tree(0), SIGNALS[signal])
    assert all(torch.equal(scores[k], v.abs()) for k, v in tree(0).items())


@pytest.mark.parametrize("signal", ["holes", "part", "tiny"])
@pytest.mark.parametrize("name", REPORTED)
def test_what_nobody_reported_comes_last_and_by_magnitude(name: str, signal: str):
    params, given = tree(0), SIGNALS[signal] or {}
    scores = PARTS[name](params, given)
    seen = {k: ~given[k].isnan() if k in given else torch.zeros(v.shape, dtype=torch.bool) for k, v in params.items()}
    observed = torch.cat([scores[k][seen[k]] for k in params])
    unseen = torch.cat([scores[k][~seen[k]] for k in params])
    weights = torch.cat([params[k][~seen[k]].abs() for k in params])
    assert unseen.max() < observed.min()
    assert unseen[weights.argsort()].diff().min() >= 0
    assert unseen.unique().numel() > 0.9 * unseen.numel()


def test_unreported_weights_of_equal_size_stay_apart_even_if_all_observed_are_zero():
    scores = saliency.gradient2()(
        {"w": torch.tensor([3.0, 1.0, 2.0])}, {"w": torch.tensor([0.0, torch.nan, torch.nan])}
    )
    assert scores["w"].argsort(descending=True).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("part", "needs", "expected"),
    [
        (saliency.magnitude(), "", [2.0, 1.0, 0.5]),
        (saliency.gradient(), "gradient", [3.0, 4.0, 0.0]),
        (saliency.gradient2(), "gradient2", [3.0, -4.0, 0.0]),
        (saliency.taylor(), "gradient", [6.0, 4.0, 0.0]),
        (saliency.signal("change"), "change", [3.0, -4.0, 0.0]),
        (saliency.order(), "", [0.0, -1.0, -2.0]),
    ],
)
def test_golden(part: Saliency, needs: str, expected: list[float]):
    scores = part({"w": torch.tensor([-2.0, 1.0, 0.5])}, {"w": torch.tensor([3.0, -4.0, 0.0])})
    assert scores["w"].tolist() == expected
    assert part.needs == needs


def test_order_keeps_leading_channels():
    params = tree(0)
    cut = Cut(unit="channels", width="linear").rank(saliency.order()(params, None), params, (GROUP,))
    assert [cut.mask(share).channels[GROUP].tolist() for share in (0.25, 0.5, 0.75)] == [[0], [0, 1], [0, 1, 2]]


def test_random_depends_on_the_seed_and_the_entry_alone():
    params = {"a": torch.zeros(50), "b": torch.zeros(50)}
    scores = saliency.random(1)(params, None)
    assert torch.equal(scores["a"], saliency.random(1)({"a": torch.ones(50)}, None)["a"])
    assert not torch.equal(scores["a"], scores["b"])
    assert not torch.equal(scores["a"], saliency.random(2)(params, None)["a"])


def test_signal_refuses_an_unknown_report():
    with pytest.raises(ValueError, match="signal: report must be one of gradient, gradient2, change, got 'loss'"):
        saliency.signal("loss")  # type: ignore[arg-type]


def arrival(report: dict[str, list[float]] | None, mask: Mask = DENSE, client: int = 0, scope: str = "kept") -> Arrival:
    params = {"w": torch.zeros(2, 2)}
    signal = None if report is None else {k: torch.tensor(v) for k, v in report.items()}
    task = Task(client, 0, params, mask, Work(scope=scope), seed=client)  # type: ignore[arg-type]
    return Arrival(task, 0.0, 1.0, 1, 1, Update(client, 0, {}, mask, 1.0, signal=signal))


LEFT = Mask({"w": torch.tensor([[True, False], [True, False]])})
PARAMS = {"w": torch.ones(2, 2), "b": torch.ones(1)}


def test_signal_is_the_mean_over_those_that_held_the_weight():
    signal = signals.observe(None, PARAMS, [arrival({"w": [1.0, 2.0, 3.0, 4.0]}), arrival({"w": [5.0, 7.0]}, LEFT, 1)])
    assert signal is not None
    assert signal.total["w"].tolist() == [[6.0, 2.0], [10.0, 4.0]]
    assert signal.count["w"].tolist() == [[2.0, 1.0], [2.0, 1.0]]
    assert signal.known["w"].isnan().all()
    known = signals.settle(signal).known
    assert known["w"].tolist() == [[3.0, 2.0], [5.0, 4.0]]
    assert known["b"].isnan().all()


def test_settled_means_are_overwritten_only_where_reported_again():
    first = signals.observe(None, PARAMS, [arrival({"w": [5.0, 7.0]}, LEFT)])
    assert first is not None
    settled = signals.settle(first)
    assert settled.known["w"].nan_to_num(-1).tolist() == [[5.0, -1.0], [7.0, -1.0]]
    assert not settled.total["w"].any()
    assert not settled.count["w"].any()
    dense = signals.observe(settled, PARAMS, [arrival({"w": [1.0, 2.0, 3.0, 4.0]}, LEFT, scope="all")])
    assert dense is not None
    assert signals.settle(dense).known["w"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert signals.settle(settled).known["w"].nan_to_num(-1).tolist() == [[5.0, -1.0], [7.0, -1.0]]


def test_observing_is_pure_and_ignores_who_says_nothing():
    assert signals.observe(None, PARAMS, [arrival(None)]) is None
    first = signals.observe(None, PARAMS, [arrival({"w": [5.0, 7.0]}, LEFT)])
    assert first is not None
    total = first.total["w"].clone()
    assert signals.observe(first, PARAMS, [arrival(None)]) is first
    both = [
        arrival({"w": [0.1, 0.7]}, LEFT, 1),
        arrival({"w": [0.3, 1e8, 3.0, 4.0]}, client=2),
        arrival({"w": [0.2, 9.0]}, LEFT),
    ]
    one, other = (signals.observe(first, PARAMS, batch) for batch in (both, both[::-1]))
    assert one is not None
    assert other is not None
    assert torch.equal(one.total["w"], other.total["w"])
    assert torch.equal(first.total["w"], total)
    assert PARAMS["w"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
