"""The one server loop: send, wait, merge. It does not know whether time is virtual."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np

from prfl import overlap
from prfl.shelf import Shelf
from prfl.types import GIVEN_UP, Arrival, Selector, State, Transport
from strategies import limits
from strategies import selector as selectors
from strategies.method import Method
from strategies.pacing import Pacing

Log = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Scores:
    """A model's scores: `validation` may steer densities and stopping, `test` is only ever reported."""

    validation: Mapping[str, float] = field(default_factory=dict)
    test: Mapping[str, float] = field(default_factory=dict)


class Stalled(RuntimeError):
    """The run can not go on: nobody can be asked, or every task fails."""


FAILURES = 10  # tasks a place in flight that may fail in a row


def silent(event: Mapping[str, Any]) -> None:
    """The log that keeps nothing."""


def serve(
    method: Method,
    pacing: Pacing,
    transport: Transport,
    state: State,
    *,
    stop: Callable[[State, float], bool],
    selector: Selector | None = None,
    evaluate: Callable[[State], Scores | None] = lambda state: None,
    keep: Callable[[State], None] = lambda state: None,
    log: Log = silent,
) -> State:
    """Run until `stop(state, now)`; the last merged state.

    `evaluate` is called after every merge and answers None when no evaluation is due; `keep` gets every merged state.
    Of the parameters that tasks under way began with, all but the newest lie on disk (`prfl.shelf`).
    Every draw comes from `state.seed` and the number of tasks sent, so a resumed run draws as an unbroken one.
    """
    chosen, shelf = selector or selectors.random(), Shelf()
    shelf.add(state.params)
    if state.selector is None:
        state = replace(state, selector=chosen.init())
    for client in _without(state):
        transport.retire(client)
    state = _evaluated(state, evaluate, transport.now(), log)
    arrivals: list[Arrival] = []  # since the last merge; the failed and the too stale without their update
    opened, ready, failures = transport.now(), 0, 0
    while not stop(state, transport.now()):
        if pacing.in_flight - transport.busy() >= pacing.refill or not transport.busy():
            waiting = {a.task.client for a in arrivals if a.update is not None}
            state = _send(method, pacing, transport, state, chosen, waiting, log)
        arrival = transport.wait(opened + pacing.deadline)
        if arrival is not None and arrival.reason == GIVEN_UP:
            log(_arrived(arrival, state.version))
            continue
        if arrival is not None:
            if arrival.update is not None and state.version - arrival.task.version > pacing.max_staleness:
                arrival = replace(arrival, update=None, reason="too stale")
            known = state.limits
            state, arrival = limits.heeded(state, arrival)
            if state.limits.get(arrival.task.client) == 0:
                transport.retire(arrival.task.client)
            arrivals.append(arrival)
            ready += arrival.update is not None
            if arrival.update is not None:
                failures = 0
            elif state.limits is known:  # what teaches a limit is no failure: it ends by itself
                failures += 1
            log(_arrived(arrival, state.version))
        elif not ready and _deserted(transport, state, pacing):
            raise Stalled(f"nobody left to ask at {transport.now():.1f} s, version {state.version}")
        if arrival is not None and failures > FAILURES * pacing.in_flight:
            raise Stalled(f"the last {failures} tasks failed, version {state.version}; the last one: {arrival.reason}")
        over = arrival is None and transport.now() >= opened + pacing.deadline
        done = not transport.busy() and pacing.goal < inf
        if ready and (over or ready >= pacing.goal or done):
            state = replace(state, selector=chosen.tell(state, arrivals))
            held = [a.update.mask for a in arrivals if a.update is not None]
            cover = {"coverage": overlap.covered(held, state.params), "covering": overlap.covering(held, state.params)}
            state = method.step(state, arrivals)
            shelf.add(state.params)
            event = {"kind": "merge", "at": transport.now(), "version": state.version, "updates": ready}
            log(event | cover)
            arrivals, ready, opened = [], 0, transport.now()
            state = _evaluated(state, evaluate, opened, log)
            keep(state)
            if pacing.drop_late:
                transport.forget()
        elif over:
            opened = transport.now()
    return state


def _deserted(transport: Transport, state: State, pacing: Pacing) -> bool:
    """Whether nothing is under way and nobody can be asked, and waiting for the deadline would change nothing."""
    if transport.busy() or transport.idle():
        return False
    return pacing.deadline == inf or 0 < len(state.classes) <= len(_without(state))


def _without(state: State) -> set[int]:
    """The clients that have no memory for any part of the model."""
    return {client for client, limit in state.limits.items() if not limit}


def _send(
    method: Method, pacing: Pacing, transport: Transport, state: State, selector: Selector, waiting: set[int], log: Log
) -> State:
    free = pacing.in_flight - transport.busy()
    idle: Sequence[int] = [c for c in transport.idle() if not pacing.once or c not in waiting]
    if method.among:
        idle = method.among(state, [c for c in idle if c not in waiting], transport.busy() + len(waiting))
    if not idle or free < 1:
        return state
    rng = np.random.default_rng((state.seed, 1, state.sent))
    asked = selector.ask(state, idle, free, rng)
    if not asked and not transport.busy():  # who waits for nothing would wait for ever
        asked = selectors.random().ask(state, idle, 1, rng)
    for client in asked:
        task = method.assign(state, client, np.random.default_rng((state.seed, 0, state.sent)))
        state = replace(state, sent=state.sent + 1)
        log({"kind": "send", "at": transport.now(), "client": client, "version": task.version, "density": task.density})
        transport.send(task)
    return state


def _evaluated(state: State, evaluate: Callable[[State], Scores | None], now: float, log: Log) -> State:
    scores = evaluate(state)
    if scores is None:
        return state
    log(
        {"kind": "evaluation", "at": now, "version": state.version}
        | {f"validation_{k}": v for k, v in scores.validation.items()}
        | {f"test_{k}": v for k, v in scores.test.items()}
    )
    return replace(state, validation=scores.validation)


def _arrived(a: Arrival, version: int) -> dict[str, Any]:
    told = ("loss", "held_out") if a.task.work.holdout else ("loss",)  # what a task asks for is logged
    return {
        "kind": "arrival",
        "at": a.at,
        "client": a.task.client,
        "version": a.task.version,
        "staleness": version - a.task.version,
        "seconds": a.at - a.sent,
        "density": a.task.density,
        "bytes_down": a.bytes_down,
        "bytes_up": a.bytes_up,
        "used": a.update is not None,
        "reason": a.reason,
        **{name: value for name, value in (("busy", a.busy), ("radio", a.radio)) if value is not None},
    } | {name: a.update.metrics[name] for name in told if a.update and name in a.update.metrics}
