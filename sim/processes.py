"""Actors in processes of this machine: each behind a pipe of its own; what many tasks read lies in files in memory."""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from shutil import rmtree
from socket import gethostname, socketpair
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any
from weakref import finalize

import cloudpickle
import numpy as np
import torch

from sim.actor import Actor
from sim.actors import Died
from sim.workers import cores

MEMORY = Path("/dev/shm")
ALIGNED = 64  # bytes: where arrays begin in a file
Buffers = Sequence[memoryview]


@dataclass(frozen=True)
class Stored:
    """A value in a file that every process can map."""

    path: str

    def read(self) -> Any:
        """Its arrays are the file's bytes in memory, shared with all who read it until one writes there."""
        with open(self.path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        size = int.from_bytes(data[:8], "little")
        value, sizes = pickle.loads(data[8 : 8 + size])
        starts = _starts(size, sizes)
        return pickle.loads(value, buffers=[data[at : at + n] for at, n in zip(starts, sizes, strict=True)])


@dataclass(eq=False)
class _Actor:
    """`calls`: those that it has not answered yet."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    calls: deque[_Call] = field(default_factory=deque)


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
        self._names = count()
        self._fresh = [self._started() for _ in range(self.places)]

    def put(self, value: Any) -> Stored:
        """Kept as long as somebody here holds what is returned; on disk where memory for files is full."""
        head, buffers = _packed(value)
        *first, last = (Path(folder.name) / str(next(self._names)) for folder in self._folders)
        for path in first:  # in a container there may be very little
            try:
                return _kept(path, head, buffers)
            except OSError:
                path.unlink(missing_ok=True)
        return _kept(last, head, buffers)

    def hire(self, make: Stored) -> tuple[_Actor, _Call]:
        actor = self._fresh.pop() if self._fresh else self._started()
        return actor, self.call(actor, "", Stored.read, (make,), sys.path)

    def call(self, actor: _Actor, method: str, *args: Any) -> _Call:
        call = _Call(actor)
        actor.calls.append(call)
        with suppress(OSError):  # it is dead, as its answer will tell
            _send(actor.pipe, *_packed((method, args)))
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


def work() -> None:
    """The life of a process: it does what comes through its pipe, one call after another."""
    pipe = Connection(int(sys.argv[1]))
    calls: SimpleQueue[tuple[bytes, Buffers]] = SimpleQueue()
    Thread(target=_listen, args=(pipe, calls), daemon=True).start()  # or each side might wait for the other to read
    actor = None
    while True:
        value, buffers = calls.get()
        try:
            method, args = pickle.loads(value, buffers=buffers)
            if actor is None:
                actor, done = Actor(*args), gethostname()
            else:
                done = getattr(actor, method)(*args)
            answer: tuple[bool, Any] = True, done
        except Exception as error:
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            answer = False, error if actor else Died(line, final=True)
        _send(pipe, *_packed(answer))  # before the next call, which it may not survive


def _listen(pipe: Connection, calls: SimpleQueue[tuple[bytes, Buffers]]) -> None:
    try:
        while True:
            calls.put(_taken(pipe))
    except (EOFError, OSError):  # nobody is left to clear up
        for folder in sys.argv[2:]:
            rmtree(folder, ignore_errors=True)
        os._exit(0)


def _receive(actor: _Actor) -> None:
    """The answer to its first call; to all of them where it is dead."""
    try:
        value, buffers = _taken(actor.pipe)
        actor.calls.popleft().answer = pickle.loads(value, buffers=buffers)
    except (EOFError, OSError):
        actor.process.kill()
        for call in actor.calls:
            call.answer = False, Died(f"its process ended with code {actor.process.wait()}")
        actor.calls.clear()


def _packed(value: Any) -> tuple[bytes, list[memoryview]]:
    """A head with the lengths of what follows it: the arrays as they lie in memory."""
    found: list[pickle.PickleBuffer] = []
    data = BytesIO()
    _Pickler(data, protocol=5, buffer_callback=found.append).dump(value)
    buffers = [buffer.raw() for buffer in found]
    return pickle.dumps((data.getvalue(), [len(b) for b in buffers])), buffers


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Tensors go as arrays do; by themselves they would drag along all that they are views of."""

    def reducer_override(self, obj: Any) -> Any:
        plain = type(obj) is torch.Tensor and obj.layout is torch.strided and not obj.requires_grad
        if plain and obj.device.type == "cpu" and obj.dtype is not torch.bfloat16:  # of which numpy knows nothing
            return torch.from_numpy, (obj.numpy(),)
        return super().reducer_override(obj)


def _kept(path: Path, head: bytes, buffers: Buffers) -> Stored:
    """A file of this, which goes when the reference does."""
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for at, buffer in zip(_starts(len(head), [len(b) for b in buffers]), buffers, strict=True):
            file.seek(at)
            file.write(buffer)
    stored = Stored(str(path))
    finalize(stored, path.unlink, missing_ok=True)
    return stored


def _starts(head: int, sizes: Sequence[int]) -> list[int]:
    """Where a file's arrays begin."""
    starts, at = [], 8 + head
    for size in sizes:
        at += -at % ALIGNED
        starts.append(at)
        at += size
    return starts


def _send(pipe: Connection, head: bytes, buffers: Buffers) -> None:
    pipe.send_bytes(head)
    for buffer in buffers:
        while buffer:
            buffer = buffer[os.write(pipe.fileno(), buffer) :]


def _taken(pipe: Connection) -> tuple[bytes, list[memoryview]]:
    value, sizes = pickle.loads(pipe.recv_bytes())
    buffers = [np.empty(size, np.uint8).data for size in sizes]
    for buffer in buffers:
        while buffer:
            if not (size := os.readv(pipe.fileno(), [buffer])):
                raise EOFError
            buffer = buffer[size:]
    return value, buffers
