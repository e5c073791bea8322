"""What processes take, seen from outside: memory, CPU, and bytes on the wire."""

from __future__ import annotations

import os
import socket
import threading
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

LOOK = 0.1  # seconds between two looks at the memory


def belonging(name: str, value: str) -> list[int]:
    """Processes with this in their environment."""
    wanted, found = f"{name}={value}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def cpu(name: str, value: str) -> float:
    """Seconds that these processes and their ended children have used."""
    ticks = 0
    for pid in belonging(name, value):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Memory:
    """Proportional set size of all processes with this in their environment, looked at all the time."""

    name: str
    value: str
    every: int  # looks until new processes are looked for
    looks: list[tuple[float, int]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @staticmethod
    @contextmanager
    def watched(name: str, value: str, every: int = 10) -> Iterator[Memory]:
        memory = Memory(name, value, every)
        thread = threading.Thread(target=memory._watch)
        thread.start()
        try:
            yield memory
        finally:
            memory.over.set()
            thread.join()

    @property
    def latest(self) -> int:
        return self.looks[-1][1]

    def peak(self, spans: Sequence[tuple[float, float]]) -> int:
        return max(pss for at, pss in self.looks if any(a <= at <= b + LOOK for a, b in spans))

    def _watch(self) -> None:
        pids: list[int] = []
        while not self.over.wait(LOOK):
            if len(self.looks) % self.every == 0:
                pids = belonging(self.name, self.value)
            total = 0
            for pid in pids:
                with suppress(OSError):
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                    total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            self.looks.append((time.time(), total))


class Relay:
    """Passes TCP connections on to a port of this machine and counts: bytes to the node, and from it."""

    def __init__(self, to: int):
        self._to, self._lock = to, threading.Lock()
        self._times: tuple[list[float], list[float]] = ([], [])
        self._sums: tuple[list[int], list[int]] = ([0], [0])
        self._ear = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._ear.getsockname()[1])

    @staticmethod
    @contextmanager
    def to(port: int) -> Iterator[Relay]:
        relay = Relay(port)
        threading.Thread(target=relay._listen, daemon=True).start()
        try:
            yield relay
        finally:
            relay._ear.close()

    def total(self) -> int:
        return self._sums[0][-1] + self._sums[1][-1]

    def within(self, way: int, start: float, end: float) -> int:
        times, sums = self._times[way], self._sums[way]
        return sums[bisect(times, end)] - sums[bisect(times, start)]

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._ear.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass, args=(far, near, 0), daemon=True).start()
                threading.Thread(target=self._pass, args=(near, far, 1), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, way: int) -> None:
        with suppress(OSError):
            while part := source.recv(1 << 18):
                with self._lock:
                    self._times[way].append(time.time())
                    self._sums[way].append(self._sums[way][-1] + len(part))
                sink.sendall(part)
        for end in (sink, source):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
