"""Ctrl-C, held back while something is half done."""

from __future__ import annotations

import signal
from threading import current_thread, main_thread
from types import FrameType


class Gate:
    """Ctrl-C raises KeyboardInterrupt at once, or, while the gate is shut, when it opens. Shut twice, open twice.

    It listens within its `with` block, where Python would: in the main thread, and unless the signal is ignored.
    """

    def __init__(self) -> None:
        self._shut, self._waiting, self._listening = 0, False, False

    def __enter__(self) -> Gate:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and current_thread() is main_thread():
            self._listening = True
            signal.signal(signal.SIGINT, self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        if self._listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def shut(self) -> None:
        self._shut += 1

    def open(self) -> None:
        self._shut -= 1
        if self._waiting and not self._shut:
            self._waiting = False
            raise KeyboardInterrupt

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if not self._shut:
            raise KeyboardInterrupt
        self._waiting = True
