"""The one server loop: send, wait, merge. It does not know whether time is virtual."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import numpy as np

from prfl.types import GIVEN_UP, Arrival, Selector, State, Transport
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
    Every draw comes from `state.seed` and the number of tasks sent, so a resumed run draws as an unbroken one.
    """
    chosen = selector or selectors.random()
    if state.selector is None:
        state = replace(state, selector=chosen.init())
    state = _evaluated(state, evaluate, transport.now(), log)
    arrivals: list[Arrival] = []  # since the last merge; the failed and the too stale without their update
    opened, ready, failures = transport.now(), 0, 0
    while not stop(state, transport.now()):
        free = pacing.in_flight - transport.busy()
        if free >= pacing.refill or not transport.busy():
            state = _send(method, transport, state, chosen, free, log)
        arrival = transport.wait(opened + pacing.deadline)
        if arrival is not None and arrival.reason == GIVEN_UP:
            log(_arrived(arrival, state.version))
            continue
        if arrival is not None:
            if arrival.update is not None and state.version - arrival.task.version > pacing.max_staleness:
                arrival = replace(arrival, update=None, reason="too stale")
            arrivals.append(arrival)
            ready += arrival.update is not None
            failures = failures + 1 if arrival.update is None else 0
            log(_arrived(arrival, state.version))
        elif not transport.busy() and not transport.idle() and not ready and pacing.deadline == inf:
            raise Stalled(f"nobody left to ask at {transport.now():.1f} s, version {state.version}")
        if arrival is not None and failures > FAILURES * pacing.in_flight:
            raise Stalled(f"the last {failures} tasks failed, version {state.version}; the last one: {arrival.reason}")
        if ready and (arrival is None or ready >= pacing.goal or not transport.busy()):
            state = replace(state, selector=chosen.tell(state, arrivals))
            state = method.step(state, arrivals)
            log({"kind": "merge", "at": transport.now(), "version": state.version, "updates": ready})
            arrivals, ready, opened = [], 0, transport.now()
            state = _evaluated(state, evaluate, opened, log)
            keep(state)
            if pacing.drop_late:
                transport.forget()
        elif arrival is None:
            opened = transport.now()
    return state


def _send(method: Method, transport: Transport, state: State, selector: Selector, free: int, log: Log) -> State:
    idle = transport.idle()
    if not idle or free < 1:
        return state
    for client in selector.ask(state, idle, free, np.random.default_rng((state.seed, 1, state.sent))):
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
    } | ({"loss": a.update.metrics["loss"]} if a.update and "loss" in a.update.metrics else {})
