"""Actors in processes of this machine: each behind a pipe of its own; large arrays lie in files in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from shutil import rmtree
from socket import gethostname, socketpair
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

from sim.actor import Actor
from sim.actors import Died
from sim.files import Files, Stored, opened
from sim.workers import cores

MEMORY = Path("/dev/shm")
BOXES = 2  # each way: calls of an actor that are under way at a time


@dataclass(eq=False)
class _Actor:
    """`calls`: those that it has not answered yet. `boxes`: where large arrays of the next ones wait, in turn."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    calls: deque[_Call] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.boxes = boxes("call", self.process.pid)


@dataclass(eq=False)
class _Call:
    actor: _Actor
    answer: tuple[bool, Any] | None = None  # whether it came to a value, and that or the error


class Processes:
    """`sim.actors.Backend` on this machine. places: how many processes there are to be, 0 for one a core.

    They start at once, and import what training takes while nobody knows yet what they will train.
    A process ends when its pipe does, whatever becomes of this one. Ctrl-C is for this one to hear.
    """

    def __init__(self, places: int = 0):
        self.places = places or cores()
        roots = [str(MEMORY), None] if os.access(MEMORY, os.W_OK) else [None]
        self._folders = [TemporaryDirectory(prefix="prfl-", dir=root) for root in roots]
        self._files = Files([folder.name for folder in self._folders])
        self._fresh = [self._started() for _ in range(self.places)]

    def put(self, value: Any) -> Stored:
        return self._files.put(value)

    def hire(self, make: Stored) -> tuple[_Actor, _Call]:
        actor = self._fresh.pop() if self._fresh else self._started()
        return actor, self.call(actor, "", Stored.read, (make,), sys.path)

    def call(self, actor: _Actor, method: str, *args: Any) -> _Call:
        while len(actor.calls) >= BOXES:
            _receive(actor)
        call, letter = _Call(actor), self._files.letter((method, args), next(actor.boxes))
        actor.calls.append(call)
        with suppress(OSError):  # it is dead, as its answer will tell
            actor.pipe.send_bytes(letter)
        return call

    def wait(self, calls: Sequence[_Call], timeout: float | None) -> _Call | None:
        """One of the calls that is done, if time does not run out."""
        while not (done := next((call for call in calls if call.answer), None)):
            actors = {call.actor.pipe: call.actor for call in calls}
            ready = wait(list(actors), timeout)
            if not ready:
                return None
            for pipe in ready:
                _receive(actors[pipe])  # type: ignore[index]
        return done

    def get(self, call: _Call) -> Any:
        """What it came to. Raises Died, or what it raised."""
        while call.answer is None:
            _receive(call.actor)
        good, value = call.answer
        if not good:
            raise value
        return value

    def kill(self, actor: _Actor) -> None:
        actor.process.kill()
        actor.process.wait()
        actor.pipe.close()

    def room(self) -> str:
        return "its process does not start"

    def close(self) -> None:
        for actor in self._fresh:
            self.kill(actor)
        for folder in self._folders:
            folder.cleanup()

    def _started(self) -> _Actor:
        here, there = socketpair()
        code = "from sim.processes import work; work()"
        command = [sys.executable, "-c", code, str(there.fileno()), *(folder.name for folder in self._folders)]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        process = subprocess.Popen(
            command, process_group=0, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        there.close()
        return _Actor(process, Connection(here.detach()))


def boxes(kind: str, pid: int) -> Iterator[str]:
    """Names of files for large arrays on their way to or from a process, to be used in turn."""
    return cycle([f"{kind}-{pid}-{i}" for i in range(BOXES)])


def work() -> None:
    """The life of a process: it does what comes through its pipe, one call after another."""
    pipe, folders = Connection(int(sys.argv[1])), sys.argv[2:]
    files, letters, actor = Files(folders), SimpleQueue[bytes](), None
    box = boxes("answer", os.getpid())
    Thread(target=_listen, args=(pipe, letters, folders), daemon=True).start()  # or both might wait for a reader
    while True:
        try:
            method, args = opened(letters.get())
            if actor is None:
                actor, done = Actor(*args), gethostname()
            else:
                done = getattr(actor, method)(*args)
            answer: tuple[bool, Any] = True, done
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = False, error if actor else Died(line, final=True)
        pipe.send_bytes(files.letter(answer, next(box)))  # before the next call, which it may not survive


def _listen(pipe: Connection, letters: SimpleQueue[bytes], folders: Sequence[str]) -> None:
    try:
        while True:
            letters.put(pipe.recv_bytes())
    except (EOFError, OSError):  # nobody is left to clear up
        for folder in folders:
            rmtree(folder, ignore_errors=True)
        os._exit(0)


def _receive(actor: _Actor) -> None:
    """The answer to its first call; to all of them where it is dead."""
    try:
        answer = opened(actor.pipe.recv_bytes())
        actor.calls.popleft().answer = answer
    except (EOFError, OSError):
        actor.process.kill()
        for call in actor.calls:
            call.answer = False, Died(f"its process ended with code {actor.process.wait()}")
        actor.calls.clear()
