"""Densities that are tried out: one bandit a client, rewarded for what its updates are worth and for its timing.

Reward of an update (FedMP's; the thesis has delta value for FedMP's delta loss): v / |T - mean T|. v: what the
method's valuation says it was worth, 1 without a valuation, so that timing alone counts (ours). T: seconds from sending
to arrival. Ours, since neither source says: the mean is over the latest T of every client heard of, which is the
round's when all take part; the gap is no less than `clamp` of the mean, or whoever is on time would be rewarded without
end; a reward counts as a share of the 90th percentile of the client's last 20, so that losses that fall ever less do
not drown it, and no more than 1. A failed task is no pull. What weighs less than a thousandth is forgotten.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, log, sqrt

import numpy as np

from prfl.arrivals import ordered
from prfl.checks import least, positive, share
from prfl.types import Arrival, State

FORGOTTEN = 1e-3  # the weight of a pull that is not worth keeping
RECENT, QUANTILE = 20, 90  # a client's rewards that set the scale, and per cent of them that are told apart


@dataclass(frozen=True)
class Agent:
    """One client's bandit: ratio pruned and reward, from -1 to 1, of its pulls, oldest first; where ratios are split.

    recent: the last rewards as they were.
    """

    pulls: tuple[tuple[float, float], ...] = ()
    recent: tuple[float, ...] = ()
    splits: tuple[float, ...] = ()


@dataclass(frozen=True)
class Agents:
    """Memory of a bandit density: an agent and the latest round time, in seconds, of every client."""

    agents: Mapping[int, Agent] = field(default_factory=dict)
    seconds: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class e_ucb:
    """FedMP's E-UCB: the arms are intervals of the ratio pruned, split where they are tried.

    Share kept = 1 - alpha, alpha from [0, 1 - floor]. A pull s of k weighs lambda^(k - s), lambda = `discount`; N is
    the weight of an interval's pulls, R their mean reward, n the sum of all N. The interval of the largest
    R + explore sqrt(2 ln n / N) is chosen, an untried one first, alpha drawn uniformly in it; it is split at alpha if
    it is wider than `width`. Steps and formulas are recalled, but for the split and the reward; lambda, width, floor
    and explore are ours (as recalled explore is 1, which stays close to random choice for hundreds of rounds). A pull
    counts in the interval that it was run at, once its update has come: until then its interval is whole.
    """

    discount: float = 0.99
    width: float = 0.1
    floor: float = 0.2
    explore: float = 0.1
    clamp: float = 0.02

    def __post_init__(self) -> None:
        share("e_ucb", "floor", self.floor)
        positive("e_ucb", "width", self.width)
        _check("e_ucb", self.discount, self.explore, self.clamp)

    def init(self) -> Agents:
        return Agents()

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        memory: Agents = state.density
        agent = memory.agents.get(client, Agent())
        arms = [bisect_right(agent.splits, ratio) for ratio, _ in agent.pulls]
        rewards = [max(0.0, reward) for _, reward in agent.pulls]
        means, weights = discounted(arms, rewards, len(agent.splits) + 1, self.discount, newest=1)
        n = max(1.0, sum(weights))
        bounds = (0.0, *agent.splits, 1 - self.floor)
        padding = [self.explore * sqrt(2 * log(n) / w) if w else inf for w in weights]
        arm = _best([m + p for m, p in zip(means, padding, strict=True)], rng)
        return 1 - float(rng.uniform(bounds[arm], bounds[arm + 1]))

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Agents:
        memory = told(state.density, arrivals, self.discount, self.clamp)
        agents = dict(memory.agents)
        for a, _ in ordered(arrivals):
            agents[a.task.client] = self._split(agents[a.task.client], 1 - a.task.density)
        return Agents(agents, memory.seconds)

    def _split(self, agent: Agent, ratio: float) -> Agent:
        bounds = [0.0, *agent.splits, 1 - self.floor]
        arm = bisect_right(agent.splits, ratio)
        if bounds[arm + 1] - bounds[arm] <= self.width or not bounds[arm] < ratio < bounds[arm + 1]:
            return agent
        splits = list(agent.splits)
        insort(splits, ratio)
        return replace(agent, splits=tuple(splits))


@dataclass(frozen=True)
class d_ucb:
    """Discounted UCB (Garivier & Moulines 2011) over the shares `arms`: non-stationary rewards, the newest count most.

    A pull s of t weighs gamma^(t - s), gamma = `discount`; N is the weight of an arm's pulls, X their mean reward, n
    the sum of all N. The arm of the largest X + explore 2 B sqrt(xi ln n / N) is pulled, an untried one first. As
    published but for: B = 1, as rewards are shares from -1 to 1 brought into [0, 1], their sign kept as the half they
    lie in; `explore`, 1 as published; a task at another share, for want of memory, counts for the nearest arm.
    """

    arms: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    discount: float = 0.99
    xi: float = 1.0
    explore: float = 0.1
    clamp: float = 0.02

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("d_ucb: arms must name at least one share")
        for arm in self.arms:
            share("d_ucb", "arms", arm)
        positive("d_ucb", "xi", self.xi)
        _check("d_ucb", self.discount, self.explore, self.clamp)

    def init(self) -> Agents:
        return Agents()

    def ask(self, state: State, client: int, rng: np.random.Generator) -> float:
        memory: Agents = state.density
        agent = memory.agents.get(client, Agent())
        arms = [min(range(len(self.arms)), key=lambda i: abs(self.arms[i] - (1 - ratio))) for ratio, _ in agent.pulls]
        rewards = [(1 + reward) / 2 for _, reward in agent.pulls]
        means, weights = discounted(arms, rewards, len(self.arms), self.discount, newest=0)
        n = max(1.0, sum(weights))
        padding = [self.explore * 2 * sqrt(self.xi * log(n) / w) if w else inf for w in weights]
        return self.arms[_best([m + p for m, p in zip(means, padding, strict=True)], rng)]

    def tell(self, state: State, arrivals: Sequence[Arrival]) -> Agents:
        return told(state.density, arrivals, self.discount, self.clamp)


def told(memory: Agents, arrivals: Sequence[Arrival], discount: float, clamp: float) -> Agents:
    """The memory with a merge's pulls, rewarded as the module says."""
    came = ordered(arrivals)
    seconds = {**memory.seconds, **{a.task.client: a.at - a.sent for a, _ in came}}
    mean = sum(seconds[c] for c in sorted(seconds)) / max(1, len(seconds))
    kept = max(1, int(log(FORGOTTEN) / log(discount))) if discount < 1 else None
    agents = dict(memory.agents)
    for a, _ in came:
        gap = max(abs(a.at - a.sent - mean), clamp * mean, 1e-9)
        reward = (1.0 if a.value is None else a.value) / gap
        agent = agents.get(a.task.client, Agent())
        recent = (*agent.recent, reward)[-RECENT:]
        top = float(np.percentile(np.abs(recent), QUANTILE))
        pulls = (*agent.pulls, (1 - a.task.density, min(1.0, max(-1.0, reward / top)) if top else 0.0))
        agents[a.task.client] = Agent(pulls[-kept:] if kept else pulls, recent, agent.splits)
    return Agents(agents, seconds)


def discounted(
    arms: Sequence[int], rewards: Sequence[float], count: int, discount: float, newest: int
) -> tuple[list[float], list[float]]:
    """Mean reward (0 where untried) and weight of each of `count` arms; the newest pull weighs discount^newest."""
    total, weights = [0.0] * count, [0.0] * count
    for age, (arm, reward) in enumerate(zip(reversed(arms), reversed(rewards), strict=True), newest):
        total[arm] += discount**age * reward
        weights[arm] += discount**age
    return [t / w if w else 0.0 for t, w in zip(total, weights, strict=True)], weights


def _best(indices: Sequence[float], rng: np.random.Generator) -> int:
    """The place of the largest; of several, any."""
    largest = max(indices)
    return int(rng.choice([i for i, index in enumerate(indices) if index == largest]))


def _check(part: str, discount: float, explore: float, clamp: float) -> None:
    share(part, "discount", discount)
    least(part, "explore", explore, 0)
    positive(part, "clamp", clamp)
