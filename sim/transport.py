"""Virtual time: a heap of what will happen, so that a run depends on its seed and on nothing else."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from math import inf
from weakref import WeakKeyDictionary, WeakValueDictionary

from prfl import cost, residual
from prfl.codec import Codec, Layout, Refused
from prfl.cut import Ranking
from prfl.masks import Mask
from prfl.shelf import Shelf
from prfl.types import GIVEN_UP, Architecture, Arrival, Task, Tree, Update, Work
from sim.devices import Device, draw
from sim.network import Network
from sim.workers import Failed, Workers

ROOM = 2**28  # bytes in memory of the newest updates on their way

Parts = Callable[[Task, bool], Sequence[tuple[Hashable, int]]]
"""What goes down for a task: keys of contents and their bytes. True: the mask is the last one that the client got."""


@dataclass
class _Job:
    task: Task
    sent: float
    bytes_down: int
    failure: str = ""
    late: bool = False
    update: Update | None = None
    bytes_up: int = 0
    busy: float = 0.0
    radio: float = 0.0


class VirtualTransport:
    """A fleet of simulated devices behind `prfl.types.Transport`.

    A task is handed to the workers when it is sent and its result is asked for when its time has come, so workers run
    ahead freely and the order of events is theirs to delay but not to change. `samples[client]`: training samples.
    `residual`: versions go down as PR-FL's increments.

    Simpler than life (ours): a device that is there when a task is sent stays until it has answered; one that fails
    receives the task, answers nothing and forgets its mask; the answer of a task given up is as long as the task was.
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
        self._off_work = list(range(len(fleet)))  # the other clients, ascending
        self._retired: set[int] = set()  # nor are these
        self._come_and_go = any(device.availability for device in fleet)
        self._awaited = 0
        self._holds: WeakValueDictionary[int, Mask] = WeakValueDictionary()  # the mask each client received last
        self._shelf = Shelf(room=ROOM)  # of what was made for one task: rounded parameters, and updates on their way
        self._carry: dict[int, Tree] = {}  # error feedback of lossy codecs, as every client keeps it
        self._flops: WeakKeyDictionary[Mask, dict[tuple[bool, int, bool], dict[str, float]]] = WeakKeyDictionary()
        self._bytes: WeakKeyDictionary[Mask, dict[Work, float]] = WeakKeyDictionary()

    def now(self) -> float:
        return self._clock

    def idle(self) -> Sequence[int]:
        if self._come_and_go:
            return [c for c in self._off_work if self._fleet[c].available(self._clock) <= self._clock]
        return self._off_work.copy()

    def busy(self) -> int:
        return self._awaited

    def send(self, task: Task) -> None:
        device, job = self._fleet[task.client], next(self._ids)
        parts = self._parts(task, self._holds.get(task.client) is task.mask)
        luck = draw(device, task.seed)
        if luck.failed:
            self._holds.pop(task.client, None)
        else:
            self._holds[task.client] = task.mask
        received = self._network.down(self._clock, device, parts, task.seed)
        at = received + device.startup
        failure = "device failed" if luck.failed else self._refusal(task, device)
        if luck.failed or not failure:
            at += device.seconds(*self._work(task)) * luck.slowdown
        if not self._codec.lossless:
            task = self._rounded(task)
        size, radio = sum(size for _, size in parts), received - self._clock
        self._jobs[job] = _Job(task, self._clock, size, failure, busy=at - received, radio=radio)
        self._at_work[task.client] = job
        del self._off_work[bisect_left(self._off_work, task.client)]
        self._awaited += 1
        if not failure:
            self._workers.submit(job, task)
        self._push(at, "trained", job)

    def wait(self, until: float = inf) -> Arrival | None:
        while self._heap and self._heap[0][0] <= until:
            at, _, what, number = heapq.heappop(self._heap)
            self._clock = max(self._clock, at)
            job = self._jobs[number]
            if what == "trained" and not job.failure:
                self._train(number, job)
                continue
            self._free(number)
            self._awaited -= not job.late
            update, reason = (None, GIVEN_UP) if job.late else (job.update, job.failure)
            return Arrival(job.task, job.sent, at, job.bytes_down, job.bytes_up, update, reason, job.busy, job.radio)
        self._clock = max(self._clock, until if until != inf else self._back())
        return None

    def forget(self) -> None:
        for number in self._at_work.values():
            if not self._jobs[number].late:
                self._jobs[number].late = True
                self._workers.discard(number)
        self._awaited = 0

    def retire(self, client: int) -> None:
        self._retired.add(client)
        at = bisect_left(self._off_work, client)
        if self._off_work[at : at + 1] == [client]:
            del self._off_work[at]

    def _rounded(self, task: Task) -> Task:
        """The task with the kept parameters as a lossy codec delivers them."""
        got = self._codec.decode_task(self._codec.encode_task(task, self._layout), self._layout).params
        kept = {k: task.mask.scatter(k, task.mask.gather(k, got[k]), v) for k, v in task.params.items()}
        self._shelf.add(kept)
        return replace(task, params=kept)

    def _train(self, number: int, job: _Job) -> None:
        client = job.task.client
        if job.late:
            job.bytes_up = job.bytes_down
        elif job.update is None:
            try:
                update = self._workers.result(number)
                job.update, job.bytes_up, carry = self._codec.deliver(
                    update, job.task, self._layout, carry=self._carry.get(client)
                )
                for tree in filter(None, (job.update.delta, job.update.signal)):
                    self._shelf.add(tree)
                if carry is not None:
                    self._carry[client] = carry
                self._holds[client] = job.update.mask  # the task's, or what the client made of it
            except (Failed, Refused) as reason:
                job.failure, job.bytes_up = str(reason), 0
                self._push(self._clock, "arrived", number)
                return
            if more := self._longer(job.task, update):
                job.busy += more
                self._push(self._clock + more, "trained", number)
                return
        at = self._network.up(self._clock, self._fleet[client], job.bytes_up, job.task.seed)
        job.radio += at - self._clock
        self._push(at, "arrived", number)

    def _longer(self, task: Task, update: Update) -> float:
        """Seconds that a task with patience took beyond the least, which has passed: how long, only its end tells."""
        if not task.work.patience:
            return 0.0
        (flops, steps), device = self._work(task), self._fleet[task.client]
        ratio = update.metrics["steps"] / steps
        longer = device.seconds({kind: ratio * f for kind, f in flops.items()}, ratio * steps) - device.seconds(
            flops, steps
        )
        return max(0.0, longer) * draw(device, task.seed).slowdown

    def _free(self, number: int) -> None:
        client = self._jobs.pop(number).task.client
        del self._at_work[client]
        if client not in self._retired:
            insort(self._off_work, client)

    def _push(self, at: float, what: str, job: int) -> None:
        heapq.heappush(self._heap, (at, next(self._ids), what, job))

    def _back(self) -> float:
        """When the next absent device is there again, if none is there now."""
        if self._heap or self.idle():
            return self._clock
        away = [self._fleet[c] for c in self._off_work] if self._come_and_go else []
        return min((d.available(self._clock) for d in away), default=self._clock)

    def _refusal(self, task: Task, device: Device) -> str:
        """Why the device has no memory for the task, if so: the answer of the ClientApp, from the same formula."""
        known = self._bytes.setdefault(task.mask, {})
        if task.work not in known:
            known[task.work] = cost.footprint(
                task.params, task.mask, self._architecture, task.work, lossy=not self._codec.lossless
            )
        return cost.refusal(cost.FRAMEWORK + known[task.work], device.memory)

    def _work(self, task: Task) -> tuple[dict[str, float], int]:
        """FLOPs of a task by layer kind, of the model as masked on this device, and its mini-batches."""
        sparse, work, size = self._fleet[task.client].sparse, task.work, self._samples[task.client]
        known, key = self._flops.setdefault(task.mask, {}), (sparse, work.rungs, work.distil)
        if key not in known:
            forward = cost.step(task, self._architecture, sparse=sparse)
            known[key] = {kind: cost.TRAINING * flops for kind, flops in forward.items() if flops}
        epochs = min(work.epochs, work.patience + 1) if work.patience else work.epochs  # at least; see `_longer`
        seen = work.steps * min(work.batch, size) if work.steps else epochs * size
        steps = work.steps or epochs * -(-size // work.batch)
        return {kind: flops * seen for kind, flops in known[key].items()}, steps


class Downlink:
    """One message a task. Its length is that of any other with this mask and this work, whatever the values.

    A mask that the client had in its last task is named by 9 bytes. Nodes do not keep masks yet: what they download is
    larger by the mask every time, by 6 % at a density of a half and by 15 % at a twentieth.
    """

    def __init__(self, codec: Codec, layout: Layout):
        self._codec, self._layout = codec, layout
        self._sizes: WeakKeyDictionary[Mask, dict[tuple[Work, bool], int]] = WeakKeyDictionary()

    def __call__(self, task: Task, known: bool) -> Sequence[tuple[Hashable, int]]:
        sizes, kind = self._sizes.setdefault(task.mask, {}), (task.work, known)
        if kind not in sizes:
            sizes[kind] = len(self._codec.encode_task(task, self._layout, known=known))
        return [(_name(task), sizes[kind])]


class Increments:
    """PR-FL's residual split: a version goes out as increments between nested sub-models, each sent once for all.

    The levels are the densities that the clients had last; a client asks for the increments up to its own, and for a
    message of its own that names the mask. Until the next ranking a client knows the masks it has received, level by
    level; it gets the others' increments with the mask.
    """

    def __init__(self, codec: Codec, layout: Layout):
        self._codec, self._layout = codec, layout
        self._levels: dict[int, float] = {}  # client -> its latest density
        self._ranking: Ranking | None = None
        self._known: dict[int, set[float]] = {}  # client -> levels of this ranking
        self._sizes: dict[tuple[float, float, bool], int] = {}  # of increments, in any version of this ranking
        self._orders: dict[Work, int] = {}  # sizes of the clients' own messages

    def __call__(self, task: Task, known: bool) -> Sequence[tuple[Hashable, int]]:
        ranking = task.mask.ranking
        if ranking is None:
            raise ValueError("residual: the method's masks are not cut from one ranking")
        if ranking is not self._ranking:
            self._ranking, self._known, self._sizes, self._orders = ranking, {}, {}, {}
        self._levels[task.client] = task.density
        held = self._known.get(task.client, set()) if known else set()
        levels = sorted({level for level in self._levels.values() if level <= task.density})
        self._known[task.client] = held.union(levels)
        parts: list[tuple[Hashable, int]] = [(_name(task), self._order(task))]
        for low, high in pairwise([0.0, *levels]):
            parts.append(((task.version, low, high, high in held), self._size(task, ranking, low, high, high in held)))
        return parts

    def _order(self, task: Task) -> int:
        if task.work not in self._orders:
            self._orders[task.work] = len(self._codec.encode_task(task, self._layout, known=True, apart=True))
        return self._orders[task.work]

    def _size(self, task: Task, ranking: Ranking, low: float, high: float, known: bool) -> int:
        if (low, high, known) not in self._sizes:
            masks = [ranking.mask(level) for level in (low, high) if level]
            increment = residual.split(task.params, masks, task.version)[-1]
            encoded = residual.encode(increment, self._layout, self._codec.values, known=known)
            self._sizes[low, high, known] = len(encoded)
        return self._sizes[low, high, known]


def _name(task: Task) -> Hashable:
    """No two tasks share it."""
    return task.client, task.version, task.seed
