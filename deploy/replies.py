"""A Grid that hands replies out as they are whole: who uploads slowly, or dies while uploading, holds nobody up."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from multiprocessing.pool import ThreadPool
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from deploy import internals

OBJECTS = 16  # of a reply, besides the pieces of its array
AT_ONCE = 4  # requests for the objects of a reply

log = logging.getLogger("prfl")


@dataclass
class Coming:
    """A reply that was announced, and the objects of it that have come."""

    notice: internals.Notice
    contents: dict[str, bytes] = field(default_factory=dict)


class Prompt(Grid):
    """Flower's own Grid waits for the rest of an announced reply, up to three minutes, and lets all others wait.

    Give it the Grid of a ServerApp; a Grid that is none of a SuperLink's stays as it is. A reply of more than `largest`
    bytes is not taken in.
    """

    def __init__(self, grid: Grid, largest: float = inf):
        self._grid, self._desk, self._largest = grid, internals.desk(grid), largest
        self._coming: dict[str, Coming] = {}  # by the message that is answered
        self._pool = ThreadPool(AT_ONCE)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The whole replies to these messages, each once; one that can not be had is an error with the reason."""
        if self._desk is None:
            return self._grid.pull_messages(message_ids)
        asked = set(message_ids)
        unheard = asked - self._coming.keys()
        for notice in self._desk.announced(unheard) if unheard else ():
            self._coming[notice.message.metadata.reply_to_message_id] = Coming(notice)
        replies = []
        for name in sorted(asked & self._coming.keys()):
            try:
                reply = self._whole(self._desk, self._coming[name])
            except (LookupError, ValueError) as error:
                reply = internals.unread(self._coming[name].notice, str(error))
            if reply is not None:
                del self._coming[name]
                replies.append(reply)
        return replies

    def _whole(self, desk: internals.Desk, coming: Coming) -> Message | None:
        """None: some of it is still on its way."""
        if len(coming.notice.objects) > OBJECTS + self._largest / 2**20:
            raise ValueError(f"the reply is in {len(coming.notice.objects)} pieces")
        while missing := [name for name in coming.notice.objects if name not in coming.contents]:
            missing = missing[: AT_ONCE if coming.contents else 1]  # the first tells whether there is any of it
            found = self._pool.map(partial(desk.fetch, coming.notice), missing, chunksize=1)
            coming.contents |= {k: v for k, v in zip(missing, found, strict=True) if v is not None}
            if sum(map(len, coming.contents.values())) > self._largest:
                raise ValueError(f"the reply has more than {self._largest:.0f} bytes")
            if None in found:
                return None
        self._pool.apply_async(desk.confirm, (coming.notice,), error_callback=_unconfirmed)
        return coming.notice.whole(coming.contents)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *arguments: Any, **more: Any) -> Message:
        return self._grid.create_message(*arguments, **more)


def _unconfirmed(error: BaseException) -> None:
    log.warning("the SuperLink keeps a reply that is here: %s", type(error).__name__)
