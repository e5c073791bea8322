"""Bandit densities: arms by hand, the textbook's loop beside ours, and devices that come to finish alike."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, log, sqrt

import numpy as np
import pytest
import torch

from prfl.bandits import RECENT, Agent, Agents, d_ucb, discounted, e_ucb, told
from prfl.cut import Cut
from prfl.density import constant
from prfl.masks import DENSE
from prfl.types import Architecture, Arrival, Density, State, Task, Update, Work

PARAMS = {"w": torch.zeros(2, 2)}
RANK = Cut().rank(PARAMS, PARAMS)


def state(memory: object) -> State:
    return State(0, PARAMS, RANK, Architecture(), density=memory)


def arrival(
    client: int, seconds: float, held: float = 1.0, value: float | None = None, version: int = 0, failed: bool = False
) -> Arrival:
    task = Task(client, version, PARAMS, DENSE, Work(), seed=version, density=held)
    update = None if failed else Update(client, version, {}, DENSE, 1.0)
    return Arrival(task, 2.0, 2.0 + seconds, 1, 1, update, value=value)


def known(*pulls: tuple[float, float], splits: tuple[float, ...] = ()) -> Agents:
    return Agents({0: Agent(pulls, splits=splits)})


def asked(part: Density, memory: Agents, seeds: int = 40) -> list[float]:
    return [part.ask(state(memory), 0, np.random.default_rng(seed)) for seed in range(seeds)]


def test_rewards_are_value_over_distance_from_the_mean_time() -> None:
    came = [arrival(0, 1.0, value=6.0), arrival(1, 2.0, value=6.0), arrival(2, 6.0, 0.4, value=-6.0)]  # mean 3
    memory = told(Agents(), came, 0.99, 0.02)
    assert {c: a.recent for c, a in memory.agents.items()} == {0: (3.0,), 1: (6.0,), 2: (-2.0,)}
    assert {c: a.pulls for c, a in memory.agents.items()} == {0: ((0.0, 1.0),), 1: ((0.0, 1.0),), 2: ((0.6, -1.0),)}
    assert memory.seconds == {0: 1.0, 1: 2.0, 2: 6.0}


def test_the_gap_is_clamped_and_without_a_value_time_alone_counts() -> None:
    memory = told(Agents(), [arrival(0, 5.0), arrival(1, 5.0)], 0.99, 0.02)
    assert memory.agents[0].recent == (1 / (0.02 * 5),)
    assert told(Agents(), [arrival(0, 0.0)], 0.99, 0.02).agents[0].recent == pytest.approx((1e9,))


def test_who_comes_alone_is_compared_with_all_that_came_before() -> None:
    memory = told(Agents(), [arrival(0, 1.0)], 0.99, 0.02)
    memory = told(memory, [arrival(1, 3.0)], 0.99, 0.02)  # mean of 1 and 3
    assert memory.agents[1].recent == (1.0,)


def test_a_failed_task_is_no_pull() -> None:
    for part in (e_ucb(), d_ucb()):
        memory = part.tell(state(part.init()), [arrival(0, 1.0, failed=True)])
        assert memory == part.init()


def test_rewards_are_scaled_by_the_90th_percentile_of_the_last_ones_and_cut() -> None:
    memory = Agents(seconds={1: 3.0})  # a client that took 3 seconds: the mean of 1 and 3 is 1 away
    for value in (1.0, 2.0, -4.0, 3.0):
        memory = told(memory, [arrival(0, 1.0, value=value)], 0.99, 0.02)
    top = 3.0 + 0.7 * (4.0 - 3.0)  # of the sizes 1, 2, 3, 4 at place 0.9 * 3 = 2.7
    assert [r for _, r in memory.agents[0].pulls] == pytest.approx([1.0, 1.0, -1.0, 3.0 / top])
    for _ in range(RECENT):
        memory = told(memory, [arrival(0, 1.0, value=0.001)], 0.99, 0.02)
    assert memory.agents[0].recent == (0.001,) * RECENT
    assert memory.agents[0].pulls[-1][1] == 1.0  # what is small now is not measured by what was large then
    assert told(Agents(), [arrival(0, 1.0, value=0.0)], 0.99, 0.02).agents[0].pulls == ((0.0, 0.0),)


def test_discounted_sums_by_hand() -> None:
    means, weights = discounted([0, 1, 0], [1.0, 0.5, 0.0], 3, 0.5, newest=0)
    assert weights == [1.25, 0.5, 0.0]
    assert means == pytest.approx([0.25 / 1.25, 0.5, 0.0])
    assert discounted([0, 1, 0], [1.0, 0.5, 0.0], 3, 0.5, newest=1)[1] == [0.625, 0.25, 0.0]


def test_old_pulls_are_forgotten_only_when_they_count_for_nothing() -> None:
    memory, kept = Agents(), Agents()
    for i in range(20):
        memory, kept = (told(m, [arrival(0, 1.0 + i)], d, 0.02) for m, d in ((memory, 0.5), (kept, 1.0)))
    assert len(memory.agents[0].pulls) == 9  # 0.5 ** 9 is the last above a thousandth
    assert memory.agents[0].pulls == kept.agents[0].pulls[-9:]
    assert len(kept.agents[0].pulls) == 20


def test_e_ucb_starts_anywhere_and_keeps_to_the_floor() -> None:
    shares = asked(e_ucb(floor=0.3), Agents(), 200)
    assert min(shares) >= 0.3
    assert min(shares) < 0.35
    assert max(shares) > 0.95
    assert asked(e_ucb(floor=1.0), Agents(), 3) == [1.0] * 3


def test_e_ucb_splits_where_it_has_tried_until_intervals_are_narrow() -> None:
    part = e_ucb(width=0.3, floor=0.2)
    memory = part.init()
    for i, (held, splits) in enumerate(
        [(0.6, (0.4,)), (0.5, (0.4, 0.5)), (0.55, (0.4, 0.5)), (0.95, (0.05, 0.4, 0.5))]
    ):
        memory = part.tell(state(memory), [arrival(0, 1.0, held, version=i)])
        assert memory.agents[0].splits == pytest.approx(splits)  # 0.45 lies in an interval of 0.1
    assert len(memory.agents[0].pulls) == 4


def test_e_ucb_tries_the_untried_first() -> None:
    memory = known((0.5, 1.0), splits=(0.5,))  # the pull lies in [0.5, 0.8)
    assert all(1 - share < 0.5 for share in asked(e_ucb(floor=0.2), memory))


def test_e_ucb_golden() -> None:
    """Pulls at 0.1, 0.5, 0.1, split at 0.4. By lambda 0.5 they weigh 1/8, 1/4, 1/2, in all less than 1: no padding."""
    memory = known((0.1, 0.8), (0.5, 0.7), (0.1, 0.6), splits=(0.4,))  # 0.4 / 0.625 = 0.64 against 0.7
    for explore in (0.0, 9.0):
        assert all(1 - share >= 0.4 for share in asked(e_ucb(0.5, explore=explore), memory))
    gap = sqrt(2 * log(3) / 1) - sqrt(2 * log(3) / 2)  # what the rare one has ahead where none is discounted
    losing = known((0.1, 1.0), (0.5, -0.4), (0.1, 0.8), splits=(0.4,))  # 0.9 against 0: no reward is below it
    for explore in (0.88, 0.92):
        chosen = {1 - share >= 0.4 for share in asked(e_ucb(1.0, explore=explore / gap), losing)}
        assert chosen == {explore > 0.9}


def test_d_ucb_golden() -> None:
    """Arms 1 and 0.5 pulled twice and once; rewards 1 and 0.1 become 1 and 0.55; the paddings differ by `gap`."""
    memory = known((0.0, 1.0), (0.5, 0.1), (0.0, 1.0))
    gap = 2 * (sqrt(log(3) / 1) - sqrt(log(3) / 2))
    for explore, share in ((0.44, 1.0), (0.46, 0.5)):
        assert set(asked(d_ucb((1.0, 0.5), discount=1.0, explore=explore / gap), memory)) == {share}
    assert set(asked(d_ucb((1.0, 0.5), discount=1.0, xi=4.0, explore=0.46 / gap / 2), memory)) == {0.5}


def test_d_ucb_tries_every_arm_and_takes_the_sign_to_heart() -> None:
    arms = (0.2, 0.6, 1.0)
    assert set(asked(d_ucb(arms), Agents())) == set(arms)
    assert set(asked(d_ucb(arms), known((0.0, 1.0), (0.8, 1.0)))) == {0.6}
    worse = known((0.0, -1.0), (0.4, 0.0), (0.8, -1.0))
    assert set(asked(d_ucb(arms, explore=0.0), worse)) == {0.6}


def test_a_task_cut_for_want_of_memory_counts_for_the_nearest_arm() -> None:
    memory = known((0.55, 1.0), (0.0, 0.1))  # 0.45 was run where 0.4 or more had been asked
    assert set(asked(d_ucb((0.4, 1.0), explore=0.0), memory)) == {0.4}


class Textbook:
    """E-UCB as it is told: a partition of the ratios, all pulls, discounted sums over them, a split at every draw."""

    def __init__(self, discount: float, width: float, explore: float, highest: float):
        self.discount, self.width, self.explore = discount, width, explore
        self.leaves = [(0.0, highest)]
        self.pulls: list[tuple[float, float]] = []
        self.raw: list[float] = []

    def paid(self, ratio: float, reward: float) -> None:
        self.raw.append(abs(reward))
        self.pulls.append((ratio, min(1.0, reward / float(np.percentile(self.raw[-20:], 90)))))

    def draw(self, rng: np.random.Generator) -> float:
        k, scores = len(self.pulls), []
        n = sum(self.discount ** (k - s) for s in range(k))
        for low, high in self.leaves:
            held = [(s, r) for s, (ratio, r) in enumerate(self.pulls) if low <= ratio < high]
            if not held:
                scores.append(inf)
                continue
            weight = sum(self.discount ** (k - s) for s, _ in held)
            mean = sum(self.discount ** (k - s) * r for s, r in held) / weight
            scores.append(mean + self.explore * sqrt(2 * max(0.0, log(n)) / weight))
        best = [i for i, score in enumerate(scores) if score == max(scores)]
        low, high = self.leaves[int(rng.choice(best))]
        ratio = float(rng.uniform(low, high))
        if high - low > self.width:
            at = self.leaves.index((low, high))
            self.leaves[at : at + 1] = [(low, ratio), (ratio, high)]
        return ratio


def test_e_ucb_is_the_textbooks_pull_by_pull() -> None:
    part, book = e_ucb(0.99, 0.1, 0.2, explore=0.3), Textbook(0.99, 0.1, 0.3, 0.8)
    memory, ours, theirs, world = part.init(), *(np.random.default_rng(5) for _ in range(3))
    for i in range(150):
        share, ratio = part.ask(state(memory), 0, ours), book.draw(theirs)
        assert 1 - share == pytest.approx(ratio, abs=1e-12)
        gap = abs(ratio - 0.55) + 0.05 + 0.1 * float(world.random())
        memory = part.tell(state(memory), [arrival(0, 2 * gap, share, version=i), arrival(1, 0.0, version=i)])
        book.paid(ratio, 1 / gap)  # the mean of 2 gap and 0 is gap away
    assert len(memory.agents[0].splits) >= 5


SPEEDS = np.array([1.0, 1.5, 2.0, 2.5, 3.0, 4.0])  # seconds of a dense round


def gaps(part: Density, rounds: int = 200, seed: int = 0) -> float:
    """Mean |T - mean T| of the last rounds, with noise, and a worth of updates that falls as training goes on."""
    now, rng, found = state(part.init()), np.random.default_rng(seed), list[float]()
    for r in range(rounds):
        shares = [part.ask(now, c, rng) for c in range(len(SPEEDS))]
        times: Sequence[float] = SPEEDS * (0.2 + 0.8 * np.array(shares)) * rng.lognormal(0, 0.05, len(SPEEDS))
        came = [
            arrival(c, float(t), s, 1 / (1 + r / 50), r) for c, (t, s) in enumerate(zip(times, shares, strict=True))
        ]
        now = replace(now, version=r + 1, density=part.tell(now, came))
        found.append(float(np.mean(np.abs(times - np.mean(times)))))
    return float(np.mean(found[-50:]))


@pytest.mark.parametrize("part", [e_ucb(), d_ucb()])
def test_devices_of_many_speeds_come_to_finish_alike(part: Density) -> None:
    aimless = replace(part, explore=100.0)  # type: ignore[type-var]
    assert gaps(part) < 0.55 * gaps(constant())
    assert gaps(part) < 0.75 * gaps(aimless)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: e_ucb(floor=0.0), r"e_ucb: floor must be in \(0, 1\], got 0"),
        (lambda: e_ucb(width=0.0), "e_ucb: width must be above 0, got 0"),
        (lambda: e_ucb(discount=1.1), r"e_ucb: discount must be in \(0, 1\], got 1.1"),
        (lambda: d_ucb(arms=()), "d_ucb: arms must name at least one share"),
        (lambda: d_ucb(arms=(0.5, 1.5)), r"d_ucb: arms must be in \(0, 1\], got 1.5"),
        (lambda: d_ucb(explore=-1.0), "d_ucb: explore must be 0 or more, got -1"),
        (lambda: d_ucb(clamp=0.0), "d_ucb: clamp must be above 0, got 0"),
    ],
)
def test_refuses(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()  # type: ignore[operator]
