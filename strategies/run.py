"""A run around the loop: what happens is logged and added up, scored when it is due, and ended as asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prfl import config, fairness, masks, store
from prfl.codec import Layout
from prfl.config import Experiment
from prfl.interrupt import Gate
from prfl.tally import Tally
from prfl.types import State, Task, Transport, Work
from strategies.judge import Judge, judged
from strategies.parts import Parts
from strategies.server import Scores, Stalled, serve

Event = Mapping[str, Any]
Watch = Callable[[Event, Tally], None]


def learn(
    experiment: Experiment,
    parts: Parts,
    transport: Transport,
    state: State,
    run: store.Run,
    judge: Judge,
    tally: Tally,
    watch: Watch = lambda event, tally: None,
    keep: Callable[[State], None] = lambda state: None,
) -> tuple[State, str | None]:
    """Run to the experiment's end: the last merged state, and why the run stopped before.

    `keep` gets every merged state once its events are logged; Ctrl-C waits until it has it.
    """
    kept, gate = [state], Gate()

    def log(event: Event) -> None:
        gate.shut()
        run.log(event)
        tally(event)
        watch(event, tally)
        if event["kind"] != "merge":  # a merge is done when its state is kept
            gate.open()

    def held(state: State) -> None:
        kept[0] = state
        keep(state)
        gate.open()

    def stop(state: State, now: float) -> bool:
        s, accuracy = experiment.stop, state.validation.get("accuracy", 0.0)
        return state.version >= s.versions or now >= s.seconds or tally.updates >= s.updates or accuracy >= s.accuracy

    def scored(state: State) -> Scores | None:
        late = tally.at - tally.scored >= experiment.evaluate_after
        due = state.version % experiment.evaluate_every == 0 and late
        return judge(state, test=experiment.test == "always") if due else None

    with gate:
        try:
            serve(
                judged(parts.method, judge), parts.pacing, transport, state, stop=stop, selector=parts.selector,
                evaluate=scored, keep=held, log=log,
            )  # fmt: skip
        except KeyboardInterrupt:
            return kept[0], "interrupted"
        except (Stalled, ValueError) as reason:
            return kept[0], " ".join(str(reason).split())
    return kept[0], None


def finish(
    experiment: Experiment,
    parts: Parts,
    layout: Layout,
    state: State,
    run: store.Run,
    judge: Judge,
    tally: Tally,
    stopped: str | None,
    more: Mapping[str, Any] | None = None,
    local: Mapping[int, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The last files of a run folder: model, clients, summary. The summary, with what the caller has `more` to say.

    local: the model's scores on every client's own data, where they are here.
    """
    run.save_model(state.params)
    dense = len(parts.codec.encode_task(Task(0, 0, state.params, masks.DENSE, Work(), 0), layout))
    scores = judge(state, macro="macro" in experiment.metrics)
    clients = _clients(tally, local or {})
    run.write("clients.json", {str(client): row for client, row in clients.items()})
    summary = {
        "experiment": experiment.name,
        "method": config.name(experiment.method),
        "pacing": config.name(experiment.pacing),
        "data": config.name(experiment.data.set),
        "seed": experiment.seed,
        "versions": state.version,
        "virtual_seconds": tally.at,
        "wall_seconds": run.seconds(),
        "client_updates": tally.updates,
        "failed_updates": tally.failed,
        "test_accuracy": scores.test["accuracy"],
        "test_loss": scores.test["loss"],
        **{f"test_{name}": scores.test[name] for name in ("precision", "recall", "f1") if name in scores.test},
        "validation_accuracy": scores.validation["accuracy"],
        "validation_loss": scores.validation["loss"],
        "best_validation_accuracy": max(tally.best, scores.validation["accuracy"]),
        "bytes_up": tally.bytes_up,
        "bytes_down": tally.bytes_down,
        "dense_message_bytes": dense,
        "bytes_against_dense": (tally.bytes_up + tally.bytes_down) / max(1, 2 * dense * (tally.updates + tally.failed)),
        "mean_density": tally.mean_density,
        "final_density": tally.final_density,
        "least_covering_index": int(tally.covering_least) if tally.merges else 0,
        "mean_covering_index": tally.mean_covering,
        "updates_by_class": dict(sorted(tally.trained.items())),
        "jain_updates": fairness.jain([row["updates"] for row in clients.values()]),
        **({"local": fairness.local(clients, scores.test["accuracy"])} if local else {}),
        **({"personal": fairness.personal(list(tally.personal.values()))} if tally.personal else {}),
        "stopped": stopped,
        "interrupted": stopped == "interrupted",
        "model_sha256": store.model_sha256(state.params),
        "events_sha256": run.events_sha256,
        **(more or {}),
    }
    run.write("summary.json", summary)
    return summary


def _clients(tally: Tally, local: Mapping[int, Mapping[str, float]]) -> dict[int, dict[str, Any]]:
    """Class, updates used, seconds busy and on the radio, and scores of every client."""
    return {
        client: {"class": name, "updates": tally.used.get(client, 0)}
        | {key: getattr(tally, key)[client] for key in ("busy", "radio", "personal") if client in getattr(tally, key)}
        | dict(local.get(client, {}))
        for client, name in sorted(tally.classes.items())
    }
