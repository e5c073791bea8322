"""MyFed and FedAsync: rewards by hand, the check-in's counts, stale lists, staleness by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_server import of_kind, played
from world import World, method

from prfl import staleness
from prfl.config import ConfigError
from prfl.masks import DENSE, Mask
from prfl.types import Arrival, State, Task, Tree, Update, Work
from sim import devices
from strategies import selector
from strategies.method import Method
from strategies.myfed import Seen, rewarded
from strategies.pacing import one_arrival

START: Tree = {"w": torch.tensor([[1.0, 1.0]])}


def state(version: int, memory: Seen, params: Tree = START) -> State:
    return replace(Method().init(params), version=version, merge=memory)


def arrival(move: list[float], samples: float, version: int = 0, at: float = 1.0, mask: Mask = DENSE) -> Arrival:
    task = Task(int(at), version, START, mask, Work(), seed=int(at))
    return Arrival(task, 0.0, at, 1, 1, Update(int(at), version, {"w": torch.tensor(move)}, mask, samples))


def test_a_fresh_update_is_mixed_in_by_alpha_alone() -> None:
    params, seen = rewarded(alpha=0.1)(state(4, Seen(1, 100.0, 100.0)), [arrival([2.0, 0.0], 10.0)])
    assert params["w"].tolist() == [[pytest.approx(1.2), 1.0]]  # age 4 is still within b
    assert seen == Seen(2, 110.0, 104.0)


def test_a_stale_update_with_much_data_and_far_away_counts_more() -> None:
    """Age 5: s = 1 / 11. Mean samples (10 + 30) / 2 = 20, C = 2 - 20/30; mean distance (0 + 4) / 2, Q = 2 - 2/4."""
    params, seen = rewarded(alpha=0.1)(state(5, Seen(1, 10.0, 0.0)), [arrival([2.0, 0.0], 30.0)])
    rate = 0.1 / 11 * (2 - 20 / 30) * (2 - 2 / 4)
    assert params["w"][0, 0].item() == pytest.approx(1 + 2 * rate)
    assert seen == Seen(2, 40.0, 4.0)


def test_below_the_mean_nothing_is_added() -> None:
    params, _ = rewarded(alpha=0.1)(state(5, Seen(1, 90.0, 100.0)), [arrival([2.0, 0.0], 10.0)])
    assert params["w"][0, 0].item() == pytest.approx(1 + 2 * 0.1 / 11)


def test_the_rate_never_passes_one() -> None:
    params, _ = rewarded(alpha=1.0, r=50.0, staleness=staleness.hinge(0.0, 0.0))(
        state(5, Seen(1, 1.0, 0.1)), [arrival([2.0, 4.0], 10.0)]
    )
    assert params["w"].tolist() == [[3.0, 5.0]]


def test_arrivals_come_one_after_another_and_missing_weights_stay() -> None:
    half = Mask({"w": torch.tensor([[True, False]])})
    batch = [arrival([1.0], 1.0, at=2.0, mask=half), arrival([2.0, 2.0], 1.0, at=1.0)]
    params, _ = rewarded(alpha=0.5)(state(0, Seen()), batch)
    assert params["w"].tolist() == [[2.0, 2.0]]  # 1 -> 2 by the first, then half of (2 - 2)
    turned, _ = rewarded(alpha=0.5)(state(0, Seen()), batch[::-1])
    assert torch.equal(params["w"], turned["w"])


def test_the_method_learns_and_is_fedasync_while_nothing_is_stale() -> None:
    """In flight one: no update is ever stale, and without FedAsync's proximal term both are the same."""
    mine, _ = played(World(), method("myfed", alpha=0.3), one_arrival(1), versions=8)
    other, _ = played(World(), method("fedasync", alpha=0.3, rho=0.0), one_arrival(1), versions=8)
    for k, v in mine.params.items():
        torch.testing.assert_close(v, other.params[k], rtol=0, atol=1e-6)


# Check-in and scheduler


def test_at_the_start_all_join_with_the_configurations_numbers() -> None:
    part = selector.checkin()
    now = Method().init(START, classes=dict.fromkeys(range(50), "d"))
    assert part.there(now) == set(range(50))


def test_clients_check_in_by_and_by() -> None:
    part = selector.checkin(first=0.1, interval=10, num=5)
    sizes = {}
    for version in (0, 9, 10, 25, 1000):
        now = replace(Method().init(START, classes=dict.fromkeys(range(120), "d"), seed=3), version=version)
        there = part.there(now)
        assert there >= {*range(10), *range(100, 110)}  # by their number mod 100
        sizes[version] = len(there)
    assert sizes == {0: 25, 9: 25, 10: 30, 25: 35, 1000: 120}


def test_the_scheduler_asks_once_in_every_so_many_versions() -> None:
    _, events = played(
        World(), method("myfed"), one_arrival(6), versions=12, selector=selector.checkin(every=3, share=0.1)
    )
    sends = [e["version"] for e in of_kind(events, "send")]
    counts = {v: sends.count(v) for v in sorted(set(sends))}
    assert set(counts) <= {0, 3, 6, 9, 12}
    assert counts[0] == 4  # max(int(0.1 * 6), 3 + 1)
    assert all(n <= 4 for n in counts.values())


def test_when_all_answers_fail_somebody_is_asked_all_the_same() -> None:
    state, events = played(
        World(failure=0.5), method("myfed"), one_arrival(6), versions=12, selector=selector.checkin(every=5)
    )
    assert state.version == 12
    assert any(not e["used"] for e in of_kind(events, "arrival"))


def test_numbers_that_make_no_sense_are_refused() -> None:
    for options in ({"first": 1.0}, {"share": 0.0}, {"interval": 0}, {"every": 0}, {"num": -1}):
        with pytest.raises(ValueError, match=f"selector checkin: {next(iter(options))} must be"):
            selector.checkin(**options)  # type: ignore[arg-type]


# Stale lists


def test_a_stale_list_by_bands() -> None:
    fleet = devices.stale(bands=(10, 10, 10, 5, 5, 5, 5), seed=1)
    assert [d.name for d in fleet] == [f"stale{b}" for b, n in enumerate((10, 10, 10, 5, 5, 5, 5)) for _ in range(n)]
    assert {d.startup for d in fleet[:10]} == {0.0}
    for band in range(1, 7):
        delays = {d.startup for d in fleet if d.name == f"stale{band}"}
        assert delays <= {float(band - 1), float(band)}
    wide = devices.stale(bands=(0, 400, 400), step=10)
    assert {d.startup for d in wide[:400]} == set(map(float, range(11)))
    assert {d.startup for d in wide[400:]} == set(map(float, range(10, 21)))


def test_a_stale_list_is_the_seeds_and_may_be_shuffled() -> None:
    plain, again, other = (devices.stale(seed=s) for s in (1, 1, 2))
    assert plain == again != other
    shuffled = devices.stale(seed=1, shuffle=True)
    assert shuffled != plain
    assert sorted(d.startup for d in shuffled) == sorted(d.startup for d in plain)


def test_delays_are_what_a_task_takes() -> None:
    fleet = [replace(d, flops={"linear": np.inf}) for d in devices.stale(bands=(3, 3), step=5)]
    _, events = played(World(), method("fedasync"), one_arrival(6), versions=12, fleet=fleet)
    for e in of_kind(events, "arrival"):
        assert e["seconds"] == pytest.approx(fleet[e["client"]].startup, abs=1e-6)


# FedAsync


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("constant", staleness.constant()),
        ({"name": "polynomial", "a": 0.7}, staleness.polynomial(0.7)),
        ({"name": "hinge", "a": 3, "b": 2}, staleness.hinge(3, 2)),
    ],
)
def test_fedasync_takes_all_three_staleness_functions(spec: object, part: object) -> None:
    made = method("fedasync", staleness=spec)
    assert made.merge.staleness == part  # type: ignore[attr-defined]


def test_an_unknown_staleness_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"no 'linear'.*have constant, hinge, polynomial"):
        method("fedasync", staleness="linear")
