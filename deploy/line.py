"""A node's way to its SuperLink: whole messages in, whole replies out, outages sat out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from random import uniform
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from deploy.internals import Fleet, Notice, Parcel

T = TypeVar("T")
AGAIN, LONGEST = 0.5, 10.0  # seconds between two tries while the SuperLink is away: at first, at most
THERE = 0.05  # seconds until an object may have come that was still on its way, the first time
AT_ONCE = 4  # requests for the objects of a message

log = logging.getLogger("prfl")


class Leave(BaseException):
    """We were told to go."""


@dataclass
class Line:
    """The way to the SuperLink: when it is away, calls wait until it is back, and one line says so."""

    address: str
    fleet: Fleet
    leaving: threading.Event = field(default_factory=threading.Event)
    pool: ThreadPool = field(default_factory=lambda: ThreadPool(AT_ONCE))
    _since: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def insist(self, call: Callable[[], T]) -> T:
        """The call's result. Whatever it raises but ConnectionError is raised here, and Leave when we are to go."""
        tries = 0
        while not self.leaving.is_set():
            try:
                found = call()
            except ConnectionError as error:
                tries += 1
                if tries > 1:  # once is nothing: the SuperLink closes connections that were silent
                    self._away(error)
                    self.leaving.wait(uniform(0.5, 1.0) * min(LONGEST, AGAIN * 2 ** (tries - 1)))
            else:
                self._back()
                return found
        raise Leave

    def fetch(self, node: int, notice: Notice) -> dict[str, bytes]:
        """All objects of a message. Raises LookupError when one never comes."""
        patience = threading.Lock()  # who waits for an object waits alone: the SuperLink has more to do

        def one(name: str) -> bytes:
            pause = THERE
            while (found := self.insist(lambda: self.fleet.fetch(node, notice.run, name))) is None:
                with patience:
                    self.leaving.wait(pause)
                pause = min(1.5 * pause, 10 * THERE)
            return found

        first, *others = notice.objects  # none of the others is asked for before there is any of it
        return {first: one(first)} | dict(zip(others, self.pool.map(one, others, chunksize=1), strict=True))

    def deliver(self, node: int, parcel: Parcel, seconds: float) -> int:
        """Bytes of the reply. It counts once, however often it must be tried; 0: it is not wanted any more."""
        run, again = parcel.message.metadata.run_id, False
        while True:
            session, wanted = self.insist(lambda: self.fleet.announce(node, parcel, seconds))
            if not wanted and not again:
                return 0

            def one(name: str, session: str = session) -> int:
                content = parcel.contents[name]()
                self.insist(lambda: self.fleet.store(node, run, session, name, content))
                return len(content)

            with suppress(LookupError):
                return sum(self.pool.map(one, wanted, chunksize=1))
            again = True
            self.leaving.wait(THERE)

    def _away(self, error: ConnectionError) -> None:
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()
                log.warning("%s does not answer (%s); trying again until it does", self.address, error)

    def _back(self) -> None:
        with self._lock:
            if self._since is not None:
                log.info("%s answers again after %.0f s", self.address, time.monotonic() - self._since)
                self._since = None
