"""The network: PR-FL's fixtures, and laws over every part of the table."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import exp, inf
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.devices import MB, Device, pr_fl
from sim.network import KEEP, TABLE, Network, Part, links, shared
from sim.network import pr_fl as pr_fl_server

Parts = Sequence[tuple[Hashable, int]]

BOARD = Device("board", {}, 2**30, down=1e6, up=5e5, latency=0.5)
NEAR = Device("near", {}, 2**30, down=1e6, up=5e5)

PRUNABLE, BIASES = 6_601_504, 2_206  # PR-FL's FEMNIST model
DENSITIES = (1, 1, 0.6, 0.6, 0.3, 0.3, 0.1, 0.1, 0.1, 0.1)
LADDER = (0, 0.1, 0.3, 0.6, 1)

EXAMPLES: dict[str, Part] = {
    "links": links(),
    "noisy links": links(noise=0.3),
    "shared": shared(3e6, 2e6),
    "unicast": shared(3e6, 2e6, multicast=False),
    "noisy": shared(3e6, 2e6, noise=0.3, server_noise=0.1),
    "pr_fl": pr_fl_server(),
}
QUIET = [name for name in EXAMPLES if name not in ("noisy links", "noisy", "pr_fl")]


def model(density: float) -> int:
    return round(4 * density * PRUNABLE + PRUNABLE / 8) + 4 * BIASES


def dense(_: float) -> Parts:
    return [("dense", model(1))]


def residual(density: float) -> Parts:
    ranks = range(1, LADDER.index(density) + 1)
    sizes = [round(4 * (LADDER[r] - LADDER[r - 1]) * PRUNABLE + PRUNABLE / 8) + 4 * BIASES * (r == 1) for r in ranks]
    return [((0, r), size) for r, size in zip(ranks, sizes, strict=True)]


def own_file(density: float) -> Parts:
    return [(density, model(density))]


def round_trip(densities: Sequence[float], parts: Callable[[float], Parts]) -> tuple[list[float], list[float], float]:
    """When each client's download and upload end, and MB pushed: mean speeds, no computing, smallest models first."""
    server, devices = pr_fl_server(noise=0, server_noise=0, quantum=0.05).open(), pr_fl()
    down, up = [0.0] * 10, [0.0] * 10
    for i in sorted(range(10), key=lambda i: densities[i]):
        down[i] = server.down(0.0, devices[i], parts(densities[i]), seed=i)
    for i in sorted(range(10), key=lambda i: down[i]):
        up[i] = server.up(down[i], devices[i], model(densities[i]), seed=i)
    return down, up, server.egress / MB


def test_fixture_dense_synchronous() -> None:
    down, up, egress = round_trip((1,) * 10, dense)
    assert down == pytest.approx([2.6, 2.6, 2.6, 2.6, 4.35, 6.5, 10.85, 13, 13, 16.25], rel=0.02)
    assert up == pytest.approx([7.8, 9.1, 11.3, 13.0, 21.7, 32.5, 54.1, 64.9, 64.9, 81.2], rel=0.02)
    assert egress == pytest.approx(25.97, rel=0.001)


def test_fixture_residual_split() -> None:
    _, up, egress = round_trip(DENSITIES, residual)
    assert up == pytest.approx([8.0, 9.3, 7.0, 8.1, 7.1, 10.6, 6.9, 8.3, 8.3, 10.4], rel=0.02)
    assert egress == pytest.approx(28.3, rel=0.02)


def test_fixture_own_file_only() -> None:
    _, up, egress = round_trip(DENSITIES, own_file)
    assert egress == pytest.approx(53.5, rel=0.02)
    assert max(up) == pytest.approx(11.9, rel=0.02)


def test_without_rounding_a_link_has_its_mean_speed() -> None:
    slowest = pr_fl()[-1]
    exact = pr_fl_server(0, 0).open().down(0.0, slowest, [("dense", 24 * MB)], seed=0)
    rounded = pr_fl_server(0, 0, quantum=0.05).open().down(0.0, slowest, [("dense", 24 * MB)], seed=0)
    assert exact == pytest.approx(16.0)
    assert rounded == pytest.approx(15.0)
    with pytest.raises(ValueError, match="rounds a link of 1e\\+06 bytes per second to nothing"):
        shared(inf, inf, quantum=0.001).open().down(0.0, NEAR, [("x", 1)], seed=0)


def test_links_by_hand() -> None:
    network = links().open()
    assert network.down(10.0, BOARD, [("a", 1_000_000), ("b", 500_000)], seed=0) == 12.0
    assert network.up(10.0, BOARD, 1_000_000, seed=0) == 12.5


def test_a_shared_server_by_hand() -> None:
    server = shared(egress=2e6, ingress=1e6).open()
    assert server.down(0.0, NEAR, [("a", 4_000_000)], seed=0) == 4.0  # its own link is the slower
    assert server.down(0.0, NEAR, [("b", 2_000_000)], seed=1) == 4.0  # pushed from 2 to 3, pulled from 2 to 4
    assert server.down(1.0, NEAR, [("a", 4_000_000), ("b", 2_000_000)], seed=2) == 7.0
    assert server.egress == 6_000_000
    assert [server.up(8.0, NEAR, 1_000_000, seed=i) for i in range(4)] == [10.0, 10.0, 11.0, 12.0]


def test_a_server_without_limits_is_independent_links() -> None:
    server, free = shared(inf, inf).open(), links().open()
    for now in range(5):
        parts = [((now, rank), 1000 * rank) for rank in range(1, 4)]
        assert server.down(now, BOARD, parts, seed=now) == pytest.approx(free.down(now, BOARD, parts, seed=now))
        assert server.up(now, BOARD, 12345, seed=now) == pytest.approx(free.up(now, BOARD, 12345, seed=now))


def test_multicast_pushes_a_content_once() -> None:
    once, each = shared(1e6, 1e6).open(), shared(1e6, 1e6, multicast=False).open()
    assert [once.down(0.0, NEAR, [((0, 1), 1_000_000)], seed=i) for i in range(3)] == [1.0, 1.0, 1.0]
    assert [each.down(0.0, NEAR, [((0, 1), 1_000_000)], seed=i) for i in range(3)] == [1.0, 2.0, 3.0]
    assert (once.egress, each.egress) == (1_000_000, 3_000_000)
    once.down(1.0, NEAR, [((0, 1), 7)], seed=0)
    assert once.egress == 1_000_007


def test_old_contents_are_forgotten_and_pushed_anew() -> None:
    server = shared(inf, inf).open()
    for version in range(KEEP + 1):
        server.down(float(version), NEAR, [((version, 0), 1)], seed=0)
    server.down(KEEP + 1.0, NEAR, [((KEEP, 0), 1)], seed=0)
    assert server.egress == KEEP + 1
    server.down(KEEP + 1.0, NEAR, [((0, 0), 1)], seed=0)
    assert server.egress == KEEP + 2


def test_every_row_of_the_table_has_an_example() -> None:
    assert {type(TABLE[name]() if name != "shared" else shared(1, 1)) for name in TABLE} == {links, shared}
    assert set(TABLE) <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
@given(sizes=st.lists(st.integers(0, 10**8), min_size=1, max_size=4), more=st.integers(1, 10**8), seed=st.integers(0))
@settings(max_examples=25)
def test_more_bytes_take_longer(name: str, sizes: list[int], more: int, seed: int) -> None:
    small, big = list(enumerate(sizes)), list(enumerate([sizes[0] + more, *sizes[1:]]))
    few, many = EXAMPLES[name].open(), EXAMPLES[name].open()
    assert BOARD.latency <= few.down(0.0, BOARD, small, seed) < many.down(0.0, BOARD, big, seed)
    assert BOARD.latency <= few.up(0.0, BOARD, sizes[0], seed) < many.up(0.0, BOARD, sizes[0] + more, seed)


def trace(network: Network, calls: list[tuple[float, int, bool]]) -> list[float]:
    """Times of a sequence of (pause, bytes, down)."""
    times, now = [], 0.0
    for i, (pause, size, down) in enumerate(calls):
        now += pause
        times.append(network.down(now, NEAR, [(i, size)], i) if down else network.up(now, NEAR, size, i))
    return times


CALLS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 10**7), st.booleans()), max_size=20)


@pytest.mark.parametrize("name", EXAMPLES)
@given(CALLS)
@settings(max_examples=25)
def test_every_run_opens_its_own(name: str, calls: list[tuple[float, int, bool]]) -> None:
    assert trace(EXAMPLES[name].open(), calls) == trace(EXAMPLES[name].open(), calls)


@pytest.mark.parametrize("name", QUIET)
@given(CALLS)
@settings(max_examples=50)
def test_nothing_is_faster_than_link_and_server(name: str, calls: list[tuple[float, int, bool]]) -> None:
    part = EXAMPLES[name]
    limits = {True: part.egress, False: part.ingress} if isinstance(part, shared) else {True: inf, False: inf}
    ends, now, started = trace(part.open(), calls), 0.0, []
    for (pause, size, down), end in zip(calls, ends, strict=True):
        now += pause
        started.append((now, size, down, end))
        assert end >= now + size / (NEAR.down if down else NEAR.up) - 1e-9
    for way, limit in limits.items():
        mine = [call for call in started if call[2] == way]
        for first in range(len(mine)):
            volume = sum(size for _, size, _, _ in mine[first:])
            assert max(end for *_, end in mine[first:]) >= mine[first][0] + volume / limit - 1e-6


def test_noise_is_the_mean_of_twenty_draws() -> None:
    network = links(noise=0.3).open()
    speeds = [1 / network.down(0.0, NEAR, [("x", 1_000_000)], seed) for seed in range(2000)]
    assert mean(speeds) == pytest.approx(exp(0.3**2 / 2), rel=0.01)
    assert 0.06 < stdev(speeds) < 0.08
    down, up = speeds[0], 2 / network.up(0.0, NEAR, 1_000_000, 0)
    assert down != up


def test_noise_of_a_task_depends_on_its_seed_only() -> None:
    alone, after = shared(inf, inf, noise=0.3).open(), shared(inf, inf, noise=0.3, server_noise=0.1).open()
    for seed in range(5):
        after.down(0.0, NEAR, [(seed, 1000)], seed)
    assert alone.down(1.0, NEAR, [("x", 10**6)], seed=9) == after.down(1.0, NEAR, [("x", 10**6)], seed=9)
    quiet, loud = shared(1e5, 1e5).open(), shared(1e5, 1e5, server_noise=0.1).open()
    assert quiet.up(0.0, NEAR, 10**6, seed=9) != loud.up(0.0, NEAR, 10**6, seed=9)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: links(noise=-1), "noise must be at least 0, got -1"),
        (lambda: shared(0, 1), "egress must be above 0 bytes per second, got 0"),
        (lambda: shared(1, float("nan")), "ingress must be above 0 bytes per second, got nan"),
        (lambda: shared(1, 1, server_noise=inf), "server_noise must be at least 0, got inf"),
        (lambda: shared(1, 1, quantum=-1), "quantum must be at least 0 seconds, got -1"),
    ],
)
def test_wrong_options_are_named(make: Callable[[], Part], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
