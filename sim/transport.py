"""Virtual time: a heap of what will happen, so that a run depends on its seed and on nothing else."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from math import inf

from prfl import cost, residual
from prfl.codec import Codec, Layout, Refused
from prfl.masks import Mask
from prfl.types import Architecture, Arrival, Task, Tree, Update
from sim.devices import Device, draw
from sim.network import Network
from sim.workers import Failed, Workers

Parts = Callable[[Task, bool], Sequence[tuple[Hashable, int]]]
"""What goes down for a task (its content's key, bytes each), and whether the client already holds the mask."""


@dataclass
class _Job:
    task: Task
    sent: float
    bytes_down: int
    failure: str = ""
    late: bool = False
    update: Update | None = None
    bytes_up: int = 0


class VirtualTransport:
    """A fleet of simulated devices behind `prfl.types.Transport`.

    A task is handed to the workers when it is sent and its result is asked for when its time has come, so workers run
    ahead freely and the order of events is theirs to delay but not to change. `samples[client]`: training samples.
    `residual`: versions go down as PR-FL's increments.
    """

    def __init__(
        self,
        fleet: Sequence[Device],
        samples: Sequence[int],
        workers: Workers,
        network: Network,
        codec: Codec,
        layout: Layout,
        architecture: Architecture,
        residual: bool = False,
    ):
        self._fleet, self._samples, self._workers, self._network = fleet, samples, workers, network
        self._codec, self._layout, self._architecture = codec, layout, architecture
        self._parts: Parts = Increments(codec, layout) if residual else Downlink(codec, layout)
        self._clock, self._ids = 0.0, count()
        self._heap: list[tuple[float, int, str, int]] = []  # time, tie-breaker, what, job
        self._jobs: dict[int, _Job] = {}
        self._at_work: dict[int, int] = {}  # client -> job
        self._awaited = 0
        self._holds: dict[int, Mask] = {}  # the mask each client has received last
        self._carry: dict[int, Tree] = {}  # error feedback of lossy codecs, as every client keeps it
        self._flops: dict[tuple[int, int], tuple[Mask, dict[str, float]]] = {}

    def now(self) -> float:
        return self._clock

    def idle(self) -> Sequence[int]:
        return [
            c
            for c, device in enumerate(self._fleet)
            if c not in self._at_work and (not device.availability or device.available(self._clock) <= self._clock)
        ]

    def busy(self) -> int:
        return self._awaited

    def send(self, task: Task) -> None:
        device, job = self._fleet[task.client], next(self._ids)
        parts = self._parts(task, self._holds.get(task.client) is task.mask)
        self._holds[task.client] = task.mask
        luck = draw(device, task.seed)
        received = self._network.down(self._clock, device, parts, task.seed)
        at = received + device.startup + device.seconds(self._work(task)) * luck.slowdown
        failure = "device failed" if luck.failed else ""
        if not self._codec.lossless:
            task = self._rounded(task)
        self._jobs[job] = _Job(task, self._clock, sum(size for _, size in parts), failure)
        self._at_work[task.client] = job
        self._awaited += 1
        if not failure:
            self._workers.submit(job, task)
        self._push(at, "trained", job)

    def wait(self, until: float = inf) -> Arrival | None:
        while self._heap and self._heap[0][0] <= until:
            at, _, what, number = heapq.heappop(self._heap)
            self._clock = max(self._clock, at)
            job = self._jobs[number]
            if job.late:
                self._free(number)
            elif what == "trained" and not job.failure:
                self._train(number, job)
            else:
                self._free(number)
                self._awaited -= 1
                return Arrival(job.task, job.sent, at, job.bytes_down, job.bytes_up, job.update, job.failure)
        self._clock = max(self._clock, until if until != inf else self._back())
        return None

    def forget(self) -> None:
        for number in self._at_work.values():
            if not self._jobs[number].late:
                self._jobs[number].late = True
                self._workers.discard(number)
        self._awaited = 0

    def _rounded(self, task: Task) -> Task:
        """The task with the kept parameters as a lossy codec delivers them."""
        got = self._codec.decode_task(self._codec.encode_task(task, self._layout), self._layout).params
        kept = {k: task.mask.scatter(k, task.mask.gather(k, got[k]), v) for k, v in task.params.items()}
        return replace(task, params=kept)

    def _train(self, number: int, job: _Job) -> None:
        try:
            update, client = self._workers.result(number), job.task.client
            data, carry = self._codec.encode_update(update, job.task, self._layout, carry=self._carry.get(client))
            if carry is not None:
                self._carry[client] = carry
            job.bytes_up = len(data)
            job.update = self._codec.decode_update(data, job.task, self._layout)
        except (Failed, Refused) as reason:
            job.failure = str(reason)
            self._push(self._clock, "arrived", number)
            return
        device = self._fleet[job.task.client]
        self._push(self._network.up(self._clock, device, job.bytes_up, job.task.seed), "arrived", number)

    def _free(self, number: int) -> None:
        del self._at_work[self._jobs.pop(number).task.client]

    def _push(self, at: float, what: str, job: int) -> None:
        heapq.heappush(self._heap, (at, next(self._ids), what, job))

    def _back(self) -> float:
        """When the next absent device is there again, if none is there now."""
        if self._heap or self.idle():
            return self._clock
        return min((d.available(self._clock) for d in self._fleet if d.availability), default=self._clock)

    def _work(self, task: Task) -> dict[str, float]:
        """FLOPs of a task by layer kind: training steps of the model as masked on this device."""
        sparse, work = self._fleet[task.client].sparse, task.work
        key = (id(task.mask), int(sparse))
        if key not in self._flops or self._flops[key][0] is not task.mask:
            forward = cost.flops_by_kind(task.params, task.mask, self._architecture, sparse=sparse)
            self._flops[key] = (task.mask, {kind: cost.TRAINING * flops for kind, flops in forward.items() if flops})
        size = self._samples[task.client]
        seen = work.steps * min(work.batch, size) if work.steps else work.epochs * size
        return {kind: flops * seen for kind, flops in self._flops[key][1].items()}


class Downlink:
    """One message a task; its length is the same for all clients with this mask in this version."""

    def __init__(self, codec: Codec, layout: Layout):
        self._codec, self._layout, self._version = codec, layout, -1
        self._bytes: dict[tuple[int, bool], tuple[Mask, int]] = {}

    def __call__(self, task: Task, known: bool) -> Sequence[tuple[Hashable, int]]:
        if task.version != self._version:
            self._version, self._bytes = task.version, {}
        key = (id(task.mask), known)
        if key not in self._bytes:
            self._bytes[key] = (task.mask, len(self._codec.encode_task(task, self._layout, known=known)))
        return [((task.version, task.client), self._bytes[key][1])]


class Increments:
    """PR-FL's residual split: a version goes out as increments between nested sub-models, each sent once for all.

    The levels are the densities that the clients had last; a client asks for the increments up to its own.
    """

    def __init__(self, codec: Codec, layout: Layout):
        self._codec, self._layout = codec, layout
        self._levels: dict[int, float] = {}  # client -> its latest density
        self._version = -1
        self._sizes: dict[tuple[float, float], int] = {}

    def __call__(self, task: Task, known: bool) -> Sequence[tuple[Hashable, int]]:
        ranking = task.mask.ranking
        if ranking is None:
            raise ValueError("residual: the method's masks are not cut from one ranking")
        if task.version != self._version:
            self._version, self._sizes = task.version, {}
        self._levels[task.client] = task.density
        levels = [0.0, *sorted({level for level in self._levels.values() if level <= task.density})]
        parts: list[tuple[Hashable, int]] = []
        for low, high in pairwise(levels):
            if (low, high) not in self._sizes:
                masks = [ranking.mask(level) for level in (low, high) if level]
                increment = residual.split(task.params, masks, task.version)[-1]
                self._sizes[low, high] = len(residual.encode(increment, self._layout, self._codec.values))
            parts.append(((task.version, low, high), self._sizes[low, high]))
        return parts
