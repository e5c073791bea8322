"""Workers on a pool of actors: processes of this machine, or on Ray."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from itertools import count
from math import ceil, inf
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from prfl.masks import Mask
from prfl.types import Task, Tree, Update
from sim.actor import Order, Result, Small, mask_in, mask_out, tree_in, tree_out
from sim.workers import TRIES, Failed, Run
from strategies.server import Stalled

PATIENCE = 120.0  # seconds without any worker, after which a run ends
SPAN, MOST = 0.1, 64  # seconds that a batch of tasks should take, and tasks of one
SMALL = 2**16  # bytes of tensors that are cheaper sent with every batch than stored: storing takes a millisecond


class Died(RuntimeError):
    """An actor's death is all that became of a call. final: it could not start, and no other could."""

    def __init__(self, reason: str, final: bool = False):
        super().__init__(reason, final)
        self.reason, self.final = reason, final


class Backend(Protocol):
    """Where `sim.actor.Actor`s live. `places`: how many of them there should be."""

    places: int

    def put(self, value: Any) -> Any:
        """A reference that actors read."""

    def hire(self, make: Any) -> tuple[Any, Any]:
        """A new actor for the training behind this reference, and the call that ends when it is up: with its node."""

    def call(self, actor: Any, method: str, *args: Any) -> Any: ...

    def wait(self, calls: Sequence[Any], timeout: float | None) -> Any | None:
        """One of the calls that has ended; None if time runs out before."""

    def get(self, call: Any) -> Any:
        """What the call came to. Raises Died."""

    def kill(self, actor: Any) -> None: ...

    def room(self) -> str:
        """Why no actor comes up."""

    def close(self) -> None: ...


class Actors:
    """A pool of actors of one thread each.

    Tasks go out when a result is asked for, in batches of `SPAN` seconds: small ones do not pay a call each, and may be
    trained at once. A dead actor is replaced and its tasks run again elsewhere, with the same result; one that finds no
    place, as after the death of a node, gets no task until there is one. `nodes[actor]`: the node of each that is at
    work. `make` goes to the actors with all that it holds; every one calls it once, for its training.
    """

    def __init__(self, backend: Backend, make: Callable[[], Run]):
        self._backend, self._numbers = backend, count()
        self._make = backend.put(make)
        self._actors: dict[int, Any] = {}
        self._coming: dict[Any, tuple[int, Any]] = {}  # call -> actor that has not come up yet
        self._stillborn = 0  # actors in a row that died before they came up
        self._pace = inf  # seconds that a task takes, lately
        self.nodes: dict[int, str] = {}
        self._queue: deque[Order] = deque()
        self._out: dict[Any, tuple[int, list[Order]]] = {}  # call -> actor, orders
        self._tasks: dict[int, Task] = {}
        self._done: dict[int, Result] = {}
        self._deaths: dict[int, int] = {}
        self._params: OrderedDict[int, tuple[Tree, Any]] = OrderedDict()
        self._masks: WeakKeyDictionary[Mask, Any] = WeakKeyDictionary()
        for _ in range(backend.places):
            self._hire()

    def turn(self, make: Callable[[], Run]) -> None:
        """Go over to another training, with the same actors; what is under way is forgotten."""
        self.forget()
        self._make = self._backend.put(make)
        turned = {n: self._backend.call(actor, "turn", (self._make,)) for n, actor in self._actors.items()}
        for n, call in turned.items():
            try:
                self._backend.get(call)
            except Died:
                self._replace(n)
        waiting, self._coming = self._coming, {}
        for _, actor in waiting.values():
            self._backend.kill(actor)
            self._hire()

    def forget(self) -> None:
        """Nobody will ask for any job so far: its number may be used again."""
        for known in (self._queue, self._out, self._tasks, self._done, self._deaths, self._params):
            known.clear()

    def submit(self, job: int, task: Task) -> None:
        order = Order(
            job, task.client, task.version, self._params_ref(task.params), self._mask_ref(task.mask), task.work,
            task.seed, task.density,
        )  # fmt: skip
        self._tasks[job] = task
        self._queue.append(order)  # it goes out with the others that are sent now

    def result(self, job: int) -> Update:
        self._dispatch()
        while job not in self._done:
            self._collect()
        done, task = self._done.pop(job), self._tasks.pop(job)
        if done.update is None:
            raise Failed(done.reason)
        weight, metrics, delta, signal = done.update
        mask = task.mask if done.mask is None else mask_in(done.mask)
        told = None if signal is None else tree_in(signal)
        return Update(task.client, task.version, tree_in(delta), mask, weight, metrics, told)

    def discard(self, job: int) -> None:
        self._tasks.pop(job, None)
        self._done.pop(job, None)
        self._queue = deque(o for o in self._queue if o.job != job)

    def close(self) -> None:
        for actor in [*self._actors.values(), *(actor for _, actor in self._coming.values())]:
            self._backend.kill(actor)
        self._backend.close()

    def _dispatch(self) -> None:
        while self._queue and self._actors:
            load = dict.fromkeys(self._actors, 0)
            for actor, _ in self._out.values():
                load[actor] += 1
            idlest = min(load, key=lambda n: load[n])
            if load[idlest] >= 2:  # one batch at work, one waiting: the actor never idles and the queue stays ours
                return
            room = 2 * len([*self._actors, *self._coming]) - len(self._out)
            size = max(1, min(ceil(len(self._queue) / room), int(SPAN / self._pace), MOST))
            orders = [self._queue.popleft()]
            while len(orders) < size and not any(o.job in self._deaths for o in (orders[0], self._queue[0])):
                orders.append(self._queue.popleft())  # one whose actor died goes by itself, not to take others with it
            self._out[self._backend.call(self._actors[idlest], "train", orders)] = (idlest, orders)

    def _collect(self) -> None:
        self._dispatch()
        call = self._backend.wait([*self._out, *self._coming], None if self._actors else PATIENCE)
        if call is None:
            raise Stalled(f"no worker found a place in {PATIENCE:.0f} s; {self._backend.room()}")
        if call in self._coming:
            self._arrived(call)
        else:
            self._returned(call)
        self._dispatch()

    def _returned(self, call: Any) -> None:
        """A batch has come back, or its actor has died."""
        actor, _ = self._out[call]
        try:
            results, seconds = self._backend.get(call)
        except Died:
            self._replace(actor)
            return
        del self._out[call]
        self._pace = seconds / len(results) if self._pace == inf else (self._pace + seconds / len(results)) / 2
        self._done.update({result.job: result for result in results if result.job in self._tasks})

    def _hire(self) -> None:
        actor, up = self._backend.hire(self._make)
        self._coming[up] = next(self._numbers), actor

    def _arrived(self, call: Any) -> None:
        """An actor has come up, or has died before."""
        number, actor = self._coming.pop(call)
        try:
            self.nodes[number] = self._backend.get(call)
        except Died as death:
            self._stillborn += 1
            if death.final or self._stillborn >= TRIES:
                raise Stalled(f"a worker could not start: {death.reason}") from death
            self._backend.kill(actor)
            self._hire()
        else:
            self._actors[number], self._stillborn = actor, 0

    def _replace(self, actor: int) -> None:
        if actor in self._actors:
            del self.nodes[actor]
            self._backend.kill(self._actors.pop(actor))  # it may be only out of reach
            self._hire()
        calls = [call for call, (n, _) in self._out.items() if n == actor]
        lost = [self._out.pop(call)[1] for call in calls]
        for waiting in lost[1:]:
            self._queue.extendleft(reversed(waiting))
        for order in lost[0] if lost else ():  # the first sent was at work, whichever is told first
            self._deaths[order.job] = self._deaths.get(order.job, 0) + 1
            if self._deaths[order.job] >= TRIES and order.job in self._tasks:
                self._done[order.job] = Result(order.job, None, None, f"{TRIES} workers died of this task")
            elif order.job in self._tasks:
                self._queue.appendleft(order)

    def _params_ref(self, params: Tree) -> Any:
        if id(params) not in self._params:
            self._params[id(params)] = (params, self._stored(tree_out(params), params))
            if len(self._params) > 8:
                self._params.popitem(last=False)
        return self._params[id(params)][1]

    def _mask_ref(self, mask: Mask) -> Any:
        if mask not in self._masks:
            self._masks[mask] = self._stored(mask_out(mask), mask.bits)
        return self._masks[mask]

    def _stored(self, value: Any, bulk: Tree) -> Any:
        small = sum(v.nbytes for v in bulk.values()) <= SMALL
        return Small(next(self._numbers), value) if small else self._backend.put(value)
