"""Density and recovery: laws over the table under random histories, golden values, errors."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prfl import density
from prfl.cut import Cut
from prfl.density import TABLE, by_time, constant, cosine, cubic, linear, recover, tiers
from prfl.masks import DENSE
from prfl.recovery import Plateau, Recovery
from prfl.types import Architecture, Arrival, Density, State, Task, Update, Work

PARAMS = {"w": torch.zeros(2, 2)}
RANK = Cut().rank(PARAMS, PARAMS)
CLASSES = {i: ("fast", "slow")[i % 2] for i in range(6)}
RNG = np.random.default_rng(0)


def state(part: Density, version: int = 0, classes: Mapping[int, str] = CLASSES) -> State:
    return State(version, PARAMS, RANK, Architecture(), classes, density=part.init())


def arrival(
    client: int, seconds: float = 1.0, held: float = 1.0, loss: float = 1.0, version: int = 0, failed: bool = False
) -> Arrival:
    task = Task(client, version, PARAMS, DENSE, Work(), seed=version, density=held)
    update = Update(client, version, {}, DENSE, 1.0, {"loss": loss, "accuracy": -loss})
    return Arrival(task, 2.0, 2.0 + seconds, 1, 1, None if failed else update)


def asked(part: Density, now: State) -> list[float]:
    return [part.ask(now, client, RNG) for client in CLASSES]


def told(part: Density, now: State, arrivals: Sequence[Arrival]) -> State:
    """The state after a merge of these arrivals."""
    return replace(now, version=now.version + 1, density=part.tell(now, arrivals))


PARTS: dict[str, Density] = {
    **{name: make() for name, make in TABLE.items() if name != "recover"},
    "constant(.3)": constant(0.3),
    "tiers(class)": tiers({"fast": 1.0, "slow": 0.2}),
    "tiers(dynamic)": tiers((1.0, 0.5), dynamic=True),
    "linear(up)": linear(0.05, 1.0, 3, 11),
    "cubic(down)": cubic(1.0, 0.05, 3, 11),
    "cosine(step)": cosine(0.9, 0.3, 7, 7),
    **{f"by_time({rule})": by_time(0.1, rule, window=4, every=3) for rule in ("ratio", "tuned", "eq4")},
    "by_time(start)": by_time(0.3, "tuned", window=2, every=1, start=0.5),
    "recover": recover(by_time(window=4, every=3), patience=2, every=3),
    "recover(ladder)": recover(tiers((0.5, 0.1)), ladder=(0.05, 0.1, 0.2, 0.5, 1.0), patience=1, every=2, floor=0.05),
    "recover(fedgmr)": recover(constant(0.2), ladder=(0.2, 0.5), patience=1, every=1, rest=1, forget=True),
    "recover(time)": recover(cubic(1.0, 0.1, 0, 20), trigger="time", times=(4, 9, 15)),
    "recover(mixed)": recover(
        by_time(every=1), 0.3, trigger="mixed", times=(5,), patience=1, every=1, metric="accuracy", better="higher"
    ),
}


def history(seed: int, versions: int = 40) -> list[tuple[list[Arrival], dict[str, float]]]:
    rng = np.random.default_rng(seed)
    return [
        (
            [
                arrival(
                    int(c),
                    float(rng.lognormal(c, 1)) * (rng.random() > 0.05),
                    loss=float(rng.normal()),
                    failed=rng.random() < 0.2,
                )
                for c in rng.choice(6, size=rng.integers(0, 7), replace=False)
            ],
            {"accuracy": float(rng.choice([0.1, 0.2, rng.random()]))} if rng.random() < 0.8 else {},
        )
        for _ in range(versions)
    ]


def after(part: Density, arrivals: Sequence[Arrival], now: State) -> list[Arrival]:
    """The arrivals as of this state: at the density and version they would have been sent with."""
    return [
        replace(a, task=replace(a.task, version=now.version, density=part.ask(now, a.task.client, RNG)))
        for a in arrivals
    ]


def test_every_row_of_the_table_is_tried():
    assert {type(part) for part in PARTS.values()} == set(TABLE.values())


@pytest.mark.parametrize("name", PARTS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_shares_are_in_reach_and_memory_is_a_value(name: str, seed: int):
    part = PARTS[name]
    now = state(part)
    for arrivals, validation in history(seed):
        assert all(0 < share <= 1 for share in asked(part, now))
        came, old = after(part, arrivals, now), deepcopy(now.density)
        now = replace(now, validation=validation)
        memory = part.tell(now, came)
        assert part.tell(now, came[::-1]) == memory
        assert now.density == old
        assert memory is None or memory is not now.density
        now = replace(now, version=now.version + 1, density=memory)


@pytest.mark.parametrize("name", [n for n in PARTS if n.startswith("recover")])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_densities_never_fall_in_stage_two(name: str, seed: int):
    part = PARTS[name]
    now, last = state(part), [0.0] * 6
    for arrivals, validation in history(seed):
        now = told(part, replace(now, validation=validation), after(part, arrivals, now))
        assert isinstance(now.density, Recovery)
        if now.density.began is not None:
            shares = asked(part, now)
            assert all(new >= old for new, old in zip(shares, last, strict=True))
            last = shares


def test_stage_two_is_reached_by_the_histories():
    for name in (n for n in PARTS if n.startswith("recover")):
        now = state(PARTS[name])
        for arrivals, validation in history(1, 100):
            now = told(PARTS[name], replace(now, validation=validation), after(PARTS[name], arrivals, now))
        assert now.density.began is not None
        assert min(asked(PARTS[name], now)) > 0.1


def test_schedules_golden():
    versions = (0, 10, 15, 20, 99)
    expected = {
        linear(1.0, 0.2, 10, 20): [1.0, 1.0, 0.6, 0.2, 0.2],
        cubic(1.0, 0.2, 10, 20): [1.0, 1.0, 0.3, 0.2, 0.2],
        cosine(1.0, 0.2, 10, 20): [1.0, 1.0, 0.6, 0.2, 0.2],
    }
    for part, shares in expected.items():
        assert [part.ask(state(part, v), 0, RNG) for v in versions] == pytest.approx(shares)
    assert cosine(1.0, 0.2, 0, 4).ask(state(cosine(), 1), 0, RNG) == pytest.approx(0.6 + 0.4 / 2**0.5)
    assert [cubic(1.0, 0.2, 5, 5).ask(state(cubic(), v), 0, RNG) for v in (4, 5)] == [1.0, 0.2]


def test_tiers_by_block_and_by_class():
    assert asked(tiers((1.0, 0.5, 0.25)), state(tiers())) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert asked(tiers({"slow": 0.2, "fast": 0.9}), state(tiers())) == [0.9, 0.2] * 3
    part = tiers({"fast": 1.0, "slow": 0.2}, dynamic=True)
    drawn = [part.ask(state(part), 0, np.random.default_rng(i)) for i in range(40)]
    assert set(drawn) == {1.0, 0.2}


def test_tiers_say_what_is_missing():
    with pytest.raises(ValueError, match="tiers: levels have no device class 'slow'; have fast"):
        tiers({"fast": 1.0}).ask(state(tiers()), 1, RNG)
    with pytest.raises(ValueError, match="tiers: client 9 has no device class; 6 clients have one"):
        tiers().ask(state(tiers()), 9, RNG)


def times(part: Density, seconds: Sequence[float], merges: int) -> list[float]:
    """Shares after merges of all clients, each as long as its device needs for its share."""
    now = state(part, classes=dict.fromkeys(range(len(seconds)), ""))
    for _ in range(merges):
        shares = [part.ask(now, c, RNG) for c in range(len(seconds))]
        now = told(part, now, [arrival(c, t * s, s) for c, (t, s) in enumerate(zip(seconds, shares, strict=True))])
    return [part.ask(now, c, RNG) for c in range(len(seconds))]


def test_by_time_ratio_is_the_papers_rule_and_stays():
    part = by_time(floor=0.1, every=1, window=3)
    for merges in (1, 2, 7):
        assert times(part, [10.0, 20.0, 40.0, 1000.0], merges) == pytest.approx([1.0, 0.5, 0.25, 0.1])


def test_by_time_ratio_stays_where_start_up_takes_the_time():
    part, now = by_time(floor=0.1, every=1, window=3), state(by_time(every=1))
    for _ in range(6):
        shares = [part.ask(now, c, RNG) for c in range(2)]
        now = told(part, now, [arrival(0, 10.0, shares[0]), arrival(1, 20.0, shares[1])])  # however small the model
    assert [part.ask(now, c, RNG) for c in range(2)] == [1.0, 0.5]


def test_by_time_ratio_times_a_client_at_the_most_that_it_holds():
    """Both devices need 20 s for a whole model; one has memory for half of it, and the fastest needs 10."""
    part = by_time(floor=0.1, every=1)
    now = replace(state(part), limits={1: 0.5})
    now = told(part, now, [arrival(0, 20.0), arrival(1, 10.0, 0.5), arrival(2, 10.0), arrival(3, 1.0, 0.5)])
    assert asked(part, now)[:4] == [0.5, 0.5, 1.0, 1.0]


def test_by_time_takes_the_mean_of_the_window_and_skips_failures():
    part = by_time(floor=0.01, every=4, window=2)
    now = state(part, version=1)
    for seconds in (99.0, 10.0, 30.0):
        now = told(part, now, [arrival(0, 5.0), arrival(1, seconds), arrival(2, 0.1, failed=True)])
    assert asked(part, now)[:2] == [1.0, 1.0]
    now = told(part, now, [])
    assert now.version == 5
    assert asked(part, now)[:3] == [1.0, 0.25, 1.0]


def test_by_time_one_step_golden():
    assert times(by_time(0.1, "tuned", every=1), [10.0, 20.0, 10.4], 1) == pytest.approx([1.0, 0.55, 1.0])
    assert times(by_time(0.1, "eq4", every=1), [10.0, 20.0, 10.4], 1) == pytest.approx([1.0, 0.75, 1 - 0.2 / 10.4])
    assert times(by_time(0.8, "tuned", every=1), [10.0, 20.0], 1) == [1.0, 0.8]


@pytest.mark.parametrize("rule", ["tuned", "eq4"])
def test_by_time_steps_reach_equal_times(rule: str):
    shares = times(by_time(0.01, rule, every=1, start=0.5), [10.0, 25.0, 80.0], 40)  # type: ignore[arg-type]
    assert shares == pytest.approx([0.5, 0.2, 0.0625], rel=0.06)


def test_a_decision_is_taken_once_per_version():
    part = by_time(0.1, "eq4", every=1)
    now = replace(state(part), density=part.tell(state(part), [arrival(0, 10.0), arrival(1, 20.0)]))
    assert part.ask(now, 1, RNG) == 0.75
    assert part.ask(replace(now, density=part.tell(now, [arrival(1, 20.0)])), 1, RNG) == 0.75


def test_plateau_counts_as_pr_fl_does():
    plateau, counts = Plateau(), []
    for score in (0.5, 0.5, 0.4, 0.4, 0.5, 0.6, 0.6):
        plateau = plateau.seen(score)
        counts.append(plateau.count)
    assert counts == [0, 0, 1, 1, 2, 0, 0]
    assert plateau.best == 0.6


def losses(
    part: recover, rows: Sequence[Mapping[int, float]], accuracy: Sequence[float] = (), every: int = 1
) -> list[list[float]]:
    """All shares after each merge; a row has the losses of the clients that arrived."""
    now, shares = state(part), []
    for i, row in enumerate(rows):
        now = replace(now, validation={"accuracy": accuracy[i]} if accuracy else {})
        came = [arrival(c, held=part.ask(now, c, RNG), loss=loss, version=i) for c, loss in row.items()]
        now = told(part, now, came)
        shares.append([round(s, 6) for s in asked(part, now)])
    return shares


def test_a_client_that_stops_improving_gets_a_step():
    part = recover(constant(0.3), step=0.2, patience=2, every=1, floor=0.1)
    rows: list[dict[int, float]] = [{0: 1.0, 1: 1.0}, {0: 1.1, 1: 0.9}, {1: 0.8}, {0: 1.2, 1: 0.7}, {0: 1.3}, {0: 1.1}]
    assert [s[:2] for s in losses(part, rows)] == [[0.3, 0.3]] * 3 + [[0.5, 0.3]] * 2 + [[0.7, 0.3]]
    assert [s[2] for s in losses(part, rows)] == [0.3] * 6


def test_a_ladder_is_climbed_rung_by_rung_to_dense():
    part = recover(constant(0.1), ladder=(0.05, 0.1, 0.2, 0.5), patience=1, every=1, floor=0.05)
    rows = [{0: 1.0 + i} for i in range(6)]
    assert [s[0] for s in losses(part, rows)] == [0.1, 0.2, 0.5, 1.0, 1.0, 1.0]


def test_only_interval_steps_count():
    part = recover(constant(0.1), step=0.2, patience=1, every=3)
    assert [s[0] for s in losses(part, [{0: 1.0 + i} for i in range(8)])] == [0.1] * 3 + [0.3] * 3 + [0.5] * 2


def test_the_servers_plateau_lifts_everybody_above_the_least_share():
    part = recover(tiers((0.6, 0.3)), step=0.2, patience=2, every=1, floor=0.1)
    rows = [{0: -1.0 - i, 5: -1.0 - i} for i in range(5)]
    shares = losses(part, rows, accuracy=[0.5, 0.4, 0.45, 0.2, 0.4])
    assert [(s[0], s[5]) for s in shares] == [(0.6, 0.3)] * 2 + [(0.6, 0.5)] * 2 + [(0.7, 0.7)]


def test_with_a_ladder_the_servers_plateau_lifts_the_floor_to_its_next_rung():
    """FedGMR: whoever holds more than that keeps what it has."""
    part = recover(tiers((0.5, 0.2)), ladder=(0.05, 0.1, 0.2, 0.5, 1.0), patience=1, every=1, floor=0.05)
    now, floors = replace(state(part), validation={"accuracy": 0.9}), []
    for i in range(5):
        now = told(part, now, [arrival(0, held=0.5, loss=-float(i)), arrival(5, held=0.2, loss=-float(i))])
        now = replace(now, validation={"accuracy": 0.8 - i / 10})
        floors.append((now.density.floor, part.ask(now, 0, RNG), part.ask(now, 5, RNG)))
    assert floors == [(0.05, 0.5, 0.2), (0.1, 0.5, 0.2), (0.2, 0.5, 0.2), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)]


def test_time_lifts_the_floor_at_its_versions():
    part = recover(constant(0.3), ladder=(0.05, 0.1, 0.2, 0.5, 1.0), floor=0.05, trigger="time", times=(1, 2, 4, 6))
    assert [s[0] for s in losses(part, [{} for _ in range(8)])] == [0.3, 0.3, 0.3, 0.3, 0.5, 0.5, 1.0, 1.0]


def test_rest_and_forget():
    """A raised client is left alone for 2 rest steps and then measured anew."""
    part = recover(constant(0.1), step=0.1, patience=1, every=1, rest=1, forget=True)
    rows = [{0: 1.0 + i} for i in range(8)]
    assert [s[0] for s in losses(part, rows)] == [0.1, 0.2, 0.2, 0.2, 0.2, 0.3, 0.3, 0.3]
    lifted = losses(part, [{0: -1.0 - i} for i in range(6)], accuracy=[0.5, 0.4, 0.3, 0.2, 0.1, 0.05])
    assert [s[0] for s in lifted] == [0.1, 0.2, 0.2, 0.2, 0.3, 0.3]


def test_a_raised_client_makes_the_server_start_anew():
    part = recover(tiers((0.6, 0.3)), step=0.1, patience=1, every=1, rest=1, forget=True)
    now = replace(state(part), validation={"accuracy": 0.9})
    now = told(part, now, [arrival(0, held=0.6, loss=1.0)])
    now = told(part, now, [arrival(0, held=0.6, loss=2.0)])
    assert now.density.server == Plateau()
    kept = replace(part, forget=False)
    assert told(kept, now, [arrival(0, held=0.6, loss=3.0)]).density.server == Plateau(0.9, 0.9)


def test_patience_counts_a_version_once():
    part = recover(constant(0.3), patience=2, every=1)
    now = told(part, state(part), [arrival(0, held=0.3, loss=1.0)])
    for loss in (2.0, 3.0, 4.0):
        now = replace(now, density=part.tell(now, [arrival(0, held=0.3, loss=loss)]))
    assert part.ask(now, 0, RNG) == 0.3


def test_stage_one_ends_for_good():
    part = recover(by_time(floor=0.1, every=1, window=1), step=0.2, patience=1, every=1, floor=0.1)
    now = told(part, state(part), [arrival(0, 10.0), arrival(1, 20.0)])
    assert asked(part, now)[:2] == [1.0, 0.5]
    now = told(part, now, [arrival(1, 10.0, held=0.5, loss=2.0)])  # its first loss at less than the whole model
    assert asked(part, now)[:2] == [1.0, 0.5]
    now = told(part, now, [arrival(1, 10.0, held=0.5, loss=3.0)])
    assert asked(part, now)[:2] == [1.0, 0.7]
    now = told(part, now, [arrival(0, 1.0), arrival(1, 99.0, held=0.7, loss=0.1)])
    assert asked(part, now)[:2] == [1.0, 0.7]


def test_recover_says_which_metric_is_missing():
    part = recover(constant(0.5), metric="f1")
    with pytest.raises(ValueError, match="recover: no client reports 'f1'; they report loss, accuracy"):
        part.tell(state(part), [arrival(3)])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("constant", {"keep": 0.0}, r"constant: keep must be in \(0, 1\], got 0"),
        ("constant", {"keep": float("nan")}, r"constant: keep must be in \(0, 1\], got nan"),
        ("tiers", {"levels": (1.0, 1.5)}, r"tiers: levels must be in \(0, 1\], got 1.5"),
        ("tiers", {"levels": {"slow": -1.0}}, r"tiers: levels must be in \(0, 1\], got -1"),
        ("tiers", {"levels": ()}, "tiers: levels must name at least one share"),
        ("linear", {"end": 0.0}, r"linear: end must be in \(0, 1\], got 0"),
        ("cubic", {"start": 2.0}, r"cubic: start must be in \(0, 1\], got 2"),
        ("cosine", {"first": 9, "last": 3}, "cosine: needs 0 <= first <= last, got first=9, last=3"),
        ("by_time", {"rule": "best"}, "by_time: rule must be one of ratio, tuned, eq4, got 'best'"),
        ("by_time", {"every": 0}, "by_time: every must be 1 or more, got 0"),
        ("recover", {"step": 0.0}, r"recover: step must be in \(0, 1\], got 0"),
        ("recover", {"ladder": (0.0, 1.0)}, r"recover: ladder must be in \(0, 1\], got 0"),
        ("recover", {"patience": 0}, "recover: patience must be 1 or more, got 0"),
        ("recover", {"trigger": "time"}, "recover: trigger 'time' needs times, the versions at which the floor rises"),
        ("recover", {"better": "best"}, "recover: better must be one of lower, higher, got 'best'"),
    ],
)
def test_refuses(name: str, fields: dict[str, object], message: str):
    given_ = {"first": constant(), **fields} if name == "recover" else fields
    with pytest.raises(ValueError, match=f"^{message}$"):
        density.TABLE[name](**given_)
