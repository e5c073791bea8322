"""Workers on a pool of Ray actors, on this machine or a cluster."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from math import ceil, inf
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from clients import memory
from prfl.config import ConfigError
from prfl.masks import Mask
from prfl.types import Task, Tree, Update, Work
from sim.workers import TRIES, Failed, Run, settled
from strategies.server import Stalled

PATIENCE = 120.0  # seconds without any worker, after which a run ends
SPAN, MOST = 0.1, 64  # seconds that a batch of tasks should take, and tasks of one
SMALL = 2**16  # bytes of tensors that are cheaper sent with every batch than stored: storing takes a millisecond
SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # the empty frame that opens HTTP/2, both ways


@dataclass(frozen=True)
class _Small:
    """A value in place of a reference to it."""

    key: int
    value: Any = field(compare=False)


@dataclass(frozen=True)
class _Order:
    """A task as it goes to an actor: tensors by reference into the object store, unless they are small."""

    job: int
    client: int
    version: int
    params: Any
    mask: Any
    work: Work
    seed: int
    density: float


@dataclass(frozen=True)
class _Result:
    job: int
    update: tuple[float, dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray] | None] | None
    mask: tuple[dict[str, np.ndarray], list[tuple[Any, np.ndarray]]] | None  # only where it is not the task's
    reason: str = ""


class _Actor:
    """Holds model and data; params and masks are read from the object store once per version and ranking."""

    def __init__(self, make: tuple[Any], path: list[str]):
        """`path`: where the driver finds modules. `make` comes in a tuple, or Ray would read it before that is set."""
        sys.path += [place for place in path if place not in sys.path]
        torch.set_num_threads(1)
        memory.hold()
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self.turn(make)
        self._params = lru_cache(maxsize=8)(lambda ref: _tree_in(_fetched(ref)))
        self._mask = lru_cache(maxsize=64)(lambda ref: _mask_in(_fetched(ref)))

    def turn(self, make: tuple[Any]) -> None:
        """To another training."""
        self._run = _fetched(*make)()

    def where(self) -> str:
        """The node that it runs on, once it runs."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def train(self, orders: list[_Order]) -> tuple[list[_Result], float]:
        """The results, and the seconds it took."""
        began = perf_counter()
        tasks = [
            Task(o.client, o.version, self._params(o.params), self._mask(o.mask), o.work, o.seed, o.density)
            for o in orders
        ]
        done = [_result(o.job, task, u) for o, task, u in zip(orders, tasks, self._run(tasks), strict=True)]
        return done, perf_counter() - began


def _result(job: int, task: Task, ended: Update | Exception) -> _Result:
    try:
        u = settled(ended)
    except Failed as reason:
        return _Result(job, None, None, str(reason))
    signal = None if u.signal is None else _tree_out(u.signal)
    own = None if u.mask is task.mask else _mask_out(u.mask)
    return _Result(job, (u.weight, dict(u.metrics), _tree_out(u.delta), signal), own)


def _fetched(ref: Any) -> Any:
    import ray

    return ref.value if isinstance(ref, _Small) else ray.get(ref)


class Ray:
    """A pool of Ray actors of one thread each, spread over the nodes.

    Tasks go out when a result is asked for, in batches of `SPAN` seconds: small ones do not pay a call each, and may be
    trained at once. A dead actor is replaced and its tasks run again elsewhere, with the same result; one that finds no
    place, as after the death of a node, gets no task until there is one. `nodes[actor]`: the Ray node of each that is
    at work. `make` goes into the object store, with all that it holds; every actor calls it once, for its training.
    workers: 0 for one a CPU. address: of a Ray cluster, None for one of our own. gpus: the share of a GPU that each
    takes. Raises ConfigError.
    """

    def __init__(self, make: Callable[[], Run], workers: int = 0, address: str | None = None, gpus: float = 0.0):
        self._ray, self._own = _started(workers, address)
        self._make = self._ray.put(make)
        options = self._ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")
        self._class, self._numbers = options(_Actor), count()
        self._actors: dict[int, Any] = {}
        self._coming: dict[Any, tuple[int, Any]] = {}  # call -> actor that has not come up yet
        self._stillborn = 0  # actors in a row that died before they came up
        self._pace = inf  # seconds that a task takes, lately
        self.nodes: dict[int, str] = {}
        self._queue: deque[_Order] = deque()
        self._out: dict[Any, tuple[int, list[_Order]]] = {}  # call -> actor, orders
        self._tasks: dict[int, Task] = {}
        self._done: dict[int, _Result] = {}
        self._deaths: dict[int, int] = {}
        self._params: OrderedDict[int, tuple[Tree, Any]] = OrderedDict()
        self._masks: WeakKeyDictionary[Mask, Any] = WeakKeyDictionary()
        for _ in range(workers or _places(self._ray, gpus)):
            self._hire()

    def turn(self, make: Callable[[], Run]) -> None:
        """Go over to another training, with the same actors; what is under way is forgotten."""
        self.forget()
        self._make = self._ray.put(make)
        turned = {n: actor.turn.remote((self._make,)) for n, actor in self._actors.items()}
        for n, call in turned.items():
            try:
                self._ray.get(call)
            except self._ray.exceptions.RayActorError:
                self._replace(n, [])
        waiting, self._coming = self._coming, {}
        for _, actor in waiting.values():
            self._ray.kill(actor)
            self._hire()

    def forget(self) -> None:
        """Nobody will ask for any job so far: its number may be used again."""
        for known in (self._queue, self._out, self._tasks, self._done, self._deaths, self._params):
            known.clear()

    def submit(self, job: int, task: Task) -> None:
        order = _Order(
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
        mask = task.mask if done.mask is None else _mask_in(done.mask)
        told = None if signal is None else _tree_in(signal)
        return Update(task.client, task.version, _tree_in(delta), mask, weight, metrics, told)

    def discard(self, job: int) -> None:
        self._tasks.pop(job, None)
        self._done.pop(job, None)
        self._queue = deque(o for o in self._queue if o.job != job)

    def close(self) -> None:
        for actor in [*self._actors.values(), *(actor for _, actor in self._coming.values())]:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()

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
            orders = [self._queue.popleft() for _ in range(size)]
            self._out[self._actors[idlest].train.remote(orders)] = (idlest, orders)

    def _collect(self) -> None:
        self._dispatch()
        some = bool(self._actors)
        ready, _ = self._ray.wait([*self._out, *self._coming], num_returns=1, timeout=None if some else PATIENCE)
        if not ready:
            free, all = (
                found.get("CPU", 0) for found in (self._ray.available_resources(), self._ray.cluster_resources())
            )
            raise Stalled(
                f"no worker found a place in {PATIENCE:.0f} s; of the Ray cluster's {all:g} CPUs {free:g} are free"
            )
        for call in ready:
            if call in self._coming:
                self._arrived(call)
                continue
            actor, orders = self._out.pop(call)
            try:
                results, seconds = self._ray.get(call)
                self._pace = seconds / len(results) if self._pace == inf else (self._pace + seconds / len(results)) / 2
                self._done.update({result.job: result for result in results if result.job in self._tasks})
            except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError):
                self._replace(actor, orders)
        self._dispatch()

    def _hire(self) -> None:
        actor = self._class.remote((self._make,), sys.path)
        self._coming[actor.where.remote()] = next(self._numbers), actor

    def _arrived(self, call: Any) -> None:
        """An actor has come up, or has died before."""
        number, actor = self._coming.pop(call)
        try:
            self.nodes[number] = self._ray.get(call)
        except self._ray.exceptions.RayActorError as death:
            self._stillborn += 1
            if death.actor_init_failed or self._stillborn >= TRIES:  # the next one would fare no better
                raise Stalled(f"a worker could not start: {str(death).strip().splitlines()[-1]}") from death
            self._hire()
        else:
            self._actors[number], self._stillborn = actor, 0

    def _replace(self, actor: int, orders: list[_Order]) -> None:
        if actor in self._actors:
            del self.nodes[actor]
            self._ray.kill(self._actors.pop(actor))  # it may be only out of reach
            self._hire()
        lost = [(call, o) for call, (n, o) in self._out.items() if n == actor]
        for call, more in lost:
            del self._out[call]
            self._queue.extendleft(reversed(more))
        for order in orders:  # the call that was at work
            self._deaths[order.job] = self._deaths.get(order.job, 0) + 1
            if self._deaths[order.job] >= TRIES and order.job in self._tasks:
                self._done[order.job] = _Result(order.job, None, None, f"{TRIES} workers died of this task")
            elif order.job in self._tasks:
                self._queue.appendleft(order)

    def _params_ref(self, params: Tree) -> Any:
        if id(params) not in self._params:
            self._params[id(params)] = (params, self._stored(_tree_out(params), params))
            if len(self._params) > 8:
                self._params.popitem(last=False)
        return self._params[id(params)][1]

    def _mask_ref(self, mask: Mask) -> Any:
        if mask not in self._masks:
            self._masks[mask] = self._stored(_mask_out(mask), mask.bits)
        return self._masks[mask]

    def _stored(self, value: Any, bulk: Tree) -> Any:
        small = sum(v.nbytes for v in bulk.values()) <= SMALL
        return _Small(next(self._numbers), value) if small else self._ray.put(value)


def _started(workers: int, address: str | None) -> tuple[Any, bool]:
    """Ray, and whether it was started, or the cluster at the address was joined, here. Raises ConfigError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    import ray

    if own := not ray.is_initialized():
        said: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            check(address)
            try:
                ray.init(address, **said)
            except (OSError, RuntimeError, ValueError, TimeoutError) as error:
                raise ConfigError(
                    f"no Ray cluster could be joined at {address}: {str(error).splitlines()[0]}"
                ) from error
        else:
            ray.init(
                "local",
                num_cpus=workers or os.cpu_count() or 1,
                num_gpus=torch.cuda.device_count(),
                include_dashboard=False,
                **said,
            )
    return ray, own


def check(address: str) -> None:
    """Raises ConfigError where no gRPC server answers at once; Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"a Ray cluster's address is HOST:PORT, as `ray start --head` says it, or auto; got {address!r}"
        )
    try:
        with socket.create_connection((host, int(port)), timeout=10) as link:
            if os.environ.get("RAY_USE_TLS") != "1":
                link.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS)
                if link.recv(9)[3:4] != SETTINGS[3:4]:
                    raise ConnectionError("what listens there is something else")
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray cluster at {address} ({error}); `ray start --head` starts one") from error


def _places(ray: Any, gpus: float) -> int:
    """For actors, in the whole cluster. Raises ConfigError where there is none."""
    found = ray.cluster_resources()
    if not (places := int(found.get("CPU", 0))):
        raise ConfigError("the Ray cluster has no CPUs for workers")
    if gpus and not found.get("GPU", 0):
        raise ConfigError("the Ray cluster has no GPUs; have cpu")
    return min(places, int(found["GPU"] / gpus)) if gpus else places


def _tree_out(tree: Tree) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in tree.items()}


def _tree_in(tree: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {k: torch.from_numpy(v) for k, v in tree.items()}


def _mask_out(mask: Mask) -> tuple[dict[str, np.ndarray], list[tuple[Any, np.ndarray]]]:
    return _tree_out(mask.bits), [(group, kept.numpy()) for group, kept in mask.channels.items()]


def _mask_in(stored: tuple[dict[str, np.ndarray], list[tuple[Any, np.ndarray]]]) -> Mask:
    bits, channels = stored
    return Mask(_tree_in(bits), {group: torch.from_numpy(kept) for group, kept in channels})
