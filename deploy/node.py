"""The warm node: Flower's SuperNode in one process, with the ClientApp in it, from one task to the next."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, RecordDict

from deploy.line import AGAIN, Leave, Line
from prfl import records

if TYPE_CHECKING:
    from deploy.internals import Notice

IDLE = 1.0  # seconds between two looks at most
EASE = 0.1  # share of the time without a task that the next one may lie there unseen
REFUSED, KNOCK = 120.0, 5.0  # seconds to go on while refused, and between two tries
GUESSES = (
    ": it is not admitted there, or the node before us is not yet forgotten, which takes a minute",
    ": it is not admitted there, or another node uses it",
)  # why a key is refused: at first, at last
PULSE = 10.0  # seconds between two heartbeats
GOODBYE = 3.0  # seconds to say it in
RUNS = 4  # whose state is kept

log = logging.getLogger("prfl")


def serve(
    address: str,
    config: Mapping[str, str | int],
    *,
    root_certificates: Path | None,
    key: Path | None,
    poll: float = 0.05,
) -> None:
    """Be a node until SIGTERM or SIGINT; to be called from the main thread, as the work of a process.

    `address`: host:port of the SuperLink or its gate. `config`: Flower's node config. Without root certificates nothing
    is encrypted, and there can be no key. `poll`: seconds between two looks for a task while tasks come; without any
    they grow to 1 s. Raises ValueError when this can not be, or the SuperLink refuses us for two minutes.
    """
    if (root_certificates is None) != (key is None):
        raise ValueError("root certificates and a key go together, or neither: an insecure node has no key")
    try:
        from deploy import internals
    except (ImportError, AttributeError) as error:
        raise ValueError(f"this Flower is not 1.41 ({error}); the node runs with --stock") from None
    logging.basicConfig(format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    root = None if root_certificates is None else root_certificates.read_bytes()
    private = None if key is None else internals.load_key(key)
    with internals.fleet(address, root, private) as fleet:
        line = Line(address, fleet)
        with _told_to_leave(line.leaving), suppress(Leave):
            from clients.app import app  # torch comes with it

            contexts: OrderedDict[int, Context] = OrderedDict()
            while True:
                with _connected(line, key) as node:
                    _work(line, node, {**config}, contexts, app, poll)


@contextmanager
def _connected(line: Line, key: Path | None) -> Iterator[int]:
    """Our number, with heartbeats while it lasts; what the SuperLink forgets about us ends it without an error."""
    node, over = _activated(line, key), threading.Event()
    log.info("connected to %s as node %d", line.address, node)
    beats = threading.Thread(target=_beat, args=(line, node, over), daemon=True)
    beats.start()
    try:
        yield node
    except PermissionError as error:
        log.warning("%s refuses this node: %s; connecting anew", line.address, error)
        line.leaving.wait(AGAIN)
    finally:
        over.set()
        bye = threading.Thread(target=_say_goodbye, args=(line, node), daemon=True)
        bye.start()
        bye.join(GOODBYE)


def _activated(line: Line, key: Path | None) -> int:
    """Our number. Raises ValueError when the SuperLink refuses us for two minutes."""
    from deploy.internals import Misplaced

    name, began, said = f"the key {key}" if key else "this node", time.monotonic(), None
    while True:
        try:
            return line.insist(line.fleet.activate)
        except Misplaced as error:
            why, guesses = str(error), ("", "")
        except PermissionError as error:
            why, guesses = f"it refuses {name} ({error})", GUESSES
        if time.monotonic() - began > REFUSED:
            raise ValueError(f"{line.address}: {why} since {REFUSED:.0f} s{guesses[1]}")
        if said != guesses:
            log.warning("%s: %s%s; trying again for %.0f s", line.address, why, guesses[0], REFUSED)
            said = guesses
        line.leaving.wait(KNOCK)


def _beat(line: Line, node: int, over: threading.Event) -> None:
    """Heartbeats: a device whose beats stay out is gone for the server, and its task lost."""
    pause = PULSE
    while not over.wait(pause):
        pause = PULSE
        try:
            line.fleet.heartbeat(node)
        except ConnectionError:
            pause = 1.0  # back on the list as soon as it can be
        except (PermissionError, ValueError) as error:
            log.debug("heartbeat: %s", error)  # the next look for a task says so too


def _say_goodbye(line: Line, node: int) -> None:
    with suppress(ConnectionError, PermissionError, ValueError):
        line.fleet.deactivate(node)


def _work(
    line: Line,
    node: int,
    config: dict[str, bool | float | int | str],
    contexts: OrderedDict[int, Context],
    app: Callable[[Message, Context], Message],
    poll: float,
) -> None:
    """Tasks, one after the other, until the SuperLink does not know us any more: PermissionError."""
    latest = time.monotonic()
    while True:
        try:
            notice = line.insist(lambda: line.fleet.look(node))
        except ValueError as error:
            log.warning("a message was lost: %s", error)
            line.leaving.wait(KNOCK)
            continue
        if notice is None:
            line.leaving.wait(min(max(poll, EASE * (time.monotonic() - latest)), max(poll, IDLE)))
            continue
        run = notice.run
        context = contexts.setdefault(run, Context(run, node, config, RecordDict(), {}))
        contexts.move_to_end(run)
        while len(contexts) > RUNS:
            contexts.popitem(last=False)
        _task(line, node, notice, context, app)
        latest = time.monotonic()


def _task(line: Line, node: int, notice: Notice, context: Context, app: Callable[[Message, Context], Message]) -> None:
    """One message, from its objects to its reply."""
    from deploy import internals

    meta = notice.message.metadata
    what = records.line(f"{meta.message_type} of version {meta.group_id}" if meta.group_id else meta.message_type)
    try:
        began = time.monotonic()
        contents = line.fetch(node, notice)
        down = sum(map(len, contents.values()))
        confirmed = line.pool.apply_async(line.insist, (lambda: line.fleet.confirm(node, notice),))
        came = time.monotonic()
        log.info("%s: %d bytes came in %.2f s", what, down, came - began)
        internals.act_as(node, notice.run)
        reply = _reply(app, notice, contents, context)
        done = time.monotonic()
        confirmed.get()
        up = line.deliver(node, internals.Parcel.of(reply), done - came)
        how = f"failed: {reply.error.reason}" if reply.has_error() else "done"
        if not up:
            how += ", but the answer is not wanted any more"
        log.info("%s: %s; %.2f s of work, %d bytes went in %.2f s", what, how, done - came, up, time.monotonic() - done)
    except internals.Over:
        log.info("%s: dropped, its run has ended", what)
    except LookupError as error:
        log.warning("%s: dropped, %s", what, error)
    except ValueError as error:
        log.warning("%s: dropped: %s", what, error)


def _reply(
    app: Callable[[Message, Context], Message], notice: Notice, contents: dict[str, bytes], context: Context
) -> Message:
    """What the ClientApp answers, or why it can not."""
    try:
        message = notice.whole(contents)
    except ValueError as error:
        return Message(Error(records.RAISED, str(error)), reply_to=notice.message)
    try:
        return app(message, context)
    except Exception as error:
        log.error("the ClientApp failed", exc_info=error)
        return Message(Error(records.RAISED, f"{type(error).__name__} on the device"), reply_to=message)


@contextmanager
def _told_to_leave(leaving: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT raise Leave in whatever goes on: a task under way is given up."""

    def go(number: int, frame: FrameType | None) -> None:
        if not leaving.is_set():
            leaving.set()
            log.info("leaving")
            raise Leave

    before = {number: signal.signal(number, go) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
