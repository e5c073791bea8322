"""Device profiles, fleets and a task's luck."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.devices import MB, Device, Watts, draw, fleet, links, load, pr_fl

BOARD = Device("board", {"conv": 4e9, "linear": 1e9}, 2**30, 1e6, 5e5, watts=Watts(2.0, 6.0, 3.0))
PROFILES = {name: replace(BOARD, name=name) for name in ("a", "b", "c")}
OWN = """
flops: {conv: 1.0e+9}
memory: 1073741824
down: 1.0e+6
up: 1.0e+6
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


def own(folder: Path, extra: str = "", name: str = "mine") -> Path:
    return write(folder, f"{name}:\n" + "".join(f"  {line}\n" for line in (OWN + extra).splitlines() if line))


def test_shipped_profiles_are_complete_and_say_where_they_come_from() -> None:
    profiles = load()
    assert set(profiles) >= {"pi3", "pi4", "pi5", "jetson_nano", "jetson_orin_nano", "phone", "laptop"}
    for name, device in profiles.items():
        assert device.name == name
        assert device.source
        assert not device.measured
        assert set(device.flops) == {"conv", "linear"}
        assert 0 < device.watts.idle < device.watts.radio < device.watts.busy
        assert 0 < device.startup < 60
        assert device.seconds({"conv": 7.4e9}) < 10
    speeds = [profiles[name].flops["conv"] for name in ("pi3", "pi4", "pi5", "jetson_nano", "jetson_orin_nano")]
    assert speeds == sorted(speeds)


def test_compute_time_adds_up_over_layer_kinds() -> None:
    assert BOARD.seconds({"conv": 8e9, "linear": 3e9}) == 5.0
    assert BOARD.seconds({}, 7) == 0.0
    assert replace(BOARD, step=0.25).seconds({"conv": 8e9}, 7) == 3.75
    with pytest.raises(ValueError, match="board: no rate for 'attention'; have conv, linear"):
        BOARD.seconds({"conv": 1.0, "attention": 1.0})


def test_joules_by_hand() -> None:
    assert BOARD.watts is not None
    assert BOARD.watts.joules(10.0, 2.0) == 66.0
    assert BOARD.watts.joules(10.0, 2.0, idle=5.0) == 76.0


@pytest.mark.parametrize(
    ("at", "there"),
    [(0, 10), (10, 10), (19.5, 19.5), (20, 50), (49, 50), (59, 59), (60, 110), (99, 110), (115, 115), (260, 310)],
)
def test_availability_by_hand(at: float, there: float) -> None:
    device = replace(BOARD, availability=((10, 20), (50, 60)), period=100)
    assert device.available(at) == there
    assert BOARD.available(at) == at


@given(
    edges=st.sets(st.integers(0, 100), min_size=2).filter(lambda e: len(e) % 2 == 0),
    period=st.floats(1, 1e6),
    at=st.floats(0, 1e8),
)
def test_a_device_that_is_awaited_is_there(edges: set[int], period: float, at: float) -> None:
    marks = [edge / 100 * period for edge in sorted(edges)]
    device = replace(BOARD, availability=tuple(zip(marks[::2], marks[1::2], strict=True)), period=period)
    there = device.available(at)
    assert at <= there <= at + period * 1.001
    assert device.available(there) == there
    slack, phase = period * 1e-6, there % period
    assert any(start - slack <= t <= end + slack for start, end in device.availability for t in (phase, phase - period))


def test_luck_is_the_tasks_own() -> None:
    risky = replace(BOARD, failure=0.3, jitter=0.5)
    draws = [draw(risky, seed) for seed in range(2000)]
    assert draws == [draw(risky, seed) for seed in range(2000)]
    assert 0.25 < sum(d.failed for d in draws) / 2000 < 0.35
    assert 0.95 < median(d.slowdown for d in draws) < 1.05
    assert min(d.slowdown for d in draws) > 0
    sure, steady = replace(risky, failure=0.0), replace(risky, jitter=0.0)
    assert [draw(sure, seed) for seed in range(9)] == [d._replace(failed=False) for d in draws[:9]]
    assert [draw(steady, seed) for seed in range(9)] == [d._replace(slowdown=1.0) for d in draws[:9]]


def test_without_chance_nothing_is_drawn() -> None:
    assert draw(BOARD, 1) is draw(BOARD, 2)
    assert draw(BOARD, 1) == (False, 1.0)


def test_own_file_lies_over_the_shipped_profiles(tmp_path: Path) -> None:
    shipped = load()
    text = "pi4: {flops: {linear: 9.0e+9}, watts: {busy: 6.0}, up: 1e6}"
    found = load(write(tmp_path, text))
    old, new = shipped.pop("pi4"), found.pop("pi4")
    assert found == shipped
    assert new.flops == {"conv": old.flops["conv"], "linear": 9e9}
    assert new.watts == replace(old.watts, busy=6.0)
    assert new.up == 1e6
    assert new.source.startswith("own.yaml; what it leaves out: Raspberry Pi 4B")
    assert replace(new, flops=old.flops, watts=old.watts, up=old.up, source=old.source) == old


def test_own_file_brings_new_devices(tmp_path: Path) -> None:
    text = "source: by hand\nmeasured: true\navailability: [[0, 10], [20, 30]]\nperiod: 40"
    device = load(own(tmp_path, text))["mine"]
    assert device.measured
    assert device.available(35) == 40
    assert device.failure == 0


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("", "mine: source must say where"),
        ("source: x\nspeed: 3", "mine: no field 'speed'; have flops, memory, down, up,"),
        ("source: x\nmemory: lots", "mine: memory: Input should be a valid integer"),
        ("source: x\nup: 0", "mine: up must be above 0, got 0"),
        ("source: x\nup: .nan", "mine: up must be above 0, got nan"),
        ("source: x\nfailure: 1.5", "mine: failure must be within 0 and 1, got 1.5"),
        ("source: x\njitter: -1", "mine: jitter must be at least 0, got -1"),
        ("source: x\nflops: {conv: 0}", "mine: flops of conv must be above 0, got 0"),
        ("source: x\nflops: {conv: fast}", "mine: flops: conv: Input should be a valid number"),
        ("source: x\nwatts: {idle: 1, busy: 2}", "mine: watts: radio: Field required"),
        ("source: x\nwatts: {idle: 1, busy: 2, radio: 3, sleep: 0}", "mine: watts: sleep: Unexpected"),
        ("source: x\nwatts: {idle: -1, busy: 2, radio: 3}", "mine: watts: idle must be at least 0, got -1"),
        ("source: x\navailability: [[5, 3]]", "mine: availability must be ascending windows within 0 and 86400"),
        ("source: x\navailability: [[3, 3]]", "mine: availability must be ascending windows within 0 and 86400"),
        ("source: x\navailability: [[5, 9]]\nperiod: 8", "mine: availability must be ascending windows within 0 and 8"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(tmp_path: Path, extra: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"own\.yaml: ") as error:
        load(own(tmp_path, extra))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("[1, 2]", "maps names to fields"), ("pi4: 3", "maps names to fields"), ("{a: [}", "not YAML")],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        load(write(tmp_path, text))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no device file"):
        load(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("mix", "clients", "counts"),
    [
        ({"a": 0.5, "b": 0.3, "c": 0.2}, 10, {"a": 5, "b": 3, "c": 2}),
        ({"a": 1, "b": 1, "c": 1}, 10, {"a": 4, "b": 3, "c": 3}),
        ({"a": 1, "b": 1, "c": 1}, 2, {"a": 1, "b": 1}),
        ({"a": 0.7, "b": 0.1, "c": 0.2}, 10, {"a": 7, "b": 1, "c": 2}),
        ({"a": 41, "b": 47, "c": 12}, 5, {"a": 2, "b": 2, "c": 1}),
        ({"a": 0, "b": 2}, 3, {"b": 3}),
    ],
)
def test_mix_by_hand(mix: dict[str, float], clients: int, counts: dict[str, int]) -> None:
    assert Counter(device.name for device in fleet(mix, clients, 0, PROFILES)) == counts


@given(st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any), st.integers(1, 200), st.integers(0, 2**31))
def test_a_mix_is_met_up_to_whole_clients(shares: list[int], clients: int, seed: int) -> None:
    devices = fleet(dict(zip("abc", shares, strict=True)), clients, seed, PROFILES)
    counts = Counter(device.name for device in devices)
    assert len(devices) == clients
    for name, share in zip("abc", shares, strict=True):
        assert abs(counts[name] - clients * share / sum(shares)) < 1


def test_the_seed_shuffles_a_mix() -> None:
    mix = {"a": 1, "b": 2}
    order = [[d.name for d in fleet(mix, 60, seed, PROFILES)] for seed in (1, 1, 2)]
    assert order[0] == order[1] != order[2]
    assert sorted(order[0]) == sorted(order[2]) != order[0]


def test_spread_changes_the_speed_and_nothing_else() -> None:
    even, uneven = fleet({"a": 1, "b": 1}, 400, 7, PROFILES), fleet({"a": 1, "b": 1}, 400, 7, PROFILES, spread=0.4)
    factors = [new.flops["conv"] / old.flops["conv"] for old, new in zip(even, uneven, strict=True)]
    assert len(set(factors)) == 400
    assert 0.9 < median(factors) < 1.1
    for old, new, factor in zip(even, uneven, factors, strict=True):
        assert new.flops["linear"] == pytest.approx(old.flops["linear"] * factor)
        assert replace(new, flops=old.flops) == old


def test_a_list_names_every_client() -> None:
    assert [d.name for d in fleet(["c", "a", "c"], 3, 0, PROFILES)] == ["c", "a", "c"]


@pytest.mark.parametrize(
    ("mix", "clients", "says"),
    [
        ({"z": 1.0}, 3, "no device 'z'; have a, b, c"),
        (["a", "z"], 2, "no device 'z'; have a, b, c"),
        (["a"], 2, "one for each of the 2 clients, got 1"),
        ({"a": 0.0}, 3, "shares of at least 0, one above"),
        ({"a": 2.0, "b": -1.0}, 3, "shares of at least 0, one above"),
        ({"a": inf}, 3, "shares of at least 0, one above"),
        ({}, 3, "shares of at least 0, one above"),
        ({"a": 1.0}, 0, "1 client or more"),
    ],
)
def test_a_wrong_mix_says_what_exists(mix: dict[str, float] | list[str], clients: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fleet(mix, clients, 0, PROFILES)
    with pytest.raises(ValueError, match="spread must be at least 0"):
        fleet({"a": 1}, 1, 0, PROFILES, spread=-1)


def test_links_by_hand() -> None:
    devices = links((8, 2, 8, 2), (2, 1, 2, 0.5), startup=0.5)
    assert [d.name for d in devices] == ["link0", "link1", "link0", "link2"]
    assert [d.down / MB for d in devices] == [8, 2, 8, 2]
    assert [d.up / MB for d in devices] == [2, 1, 2, 0.5]
    assert [d.startup + d.seconds({"conv": 1e18, "linear": 1.0}) for d in devices] == [0.5] * 4
    assert links((1,), (1,), compute={"conv": 2.0})[0].seconds({"conv": 3.0}) == 1.5
    assert links((8, 2), (2, 1), clients=5)[4] == links((8, 2), (2, 1), clients=1)[0] == links((8, 2), (2, 1))[0]
    with pytest.raises(ValueError, match="0 clients \\(one for every pair\\) or more, got -1"):
        links((1,), (1,), clients=-1)
    with pytest.raises(ValueError, match="as many speeds down as up, got 2 and 1"):
        links((1, 2), (1,))
    with pytest.raises(ValueError, match="up must be above 0"):
        links((1,), (0,))


def test_pr_fl_has_ten_clients_fastest_first() -> None:
    devices = pr_fl()
    assert len(devices) == 10
    assert [d.down for d in devices] == sorted((d.down for d in devices), reverse=True)
    assert sum(d.down for d in devices) / MB == 78
    assert sum(d.up for d in devices) / MB == pytest.approx(19)
