"""Actors on Ray: one of our own on this machine, or a cluster that runs already."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from prfl.config import ConfigError
from sim.actor import Actor
from sim.actors import Died
from sim.workers import cores

INLINE = 2**22  # bytes of a result that comes with its call: a way through the object store takes milliseconds more
SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # the empty frame that opens HTTP/2, both ways


class Cluster:
    """`sim.actors.Backend` on Ray, its actors spread over the nodes; references lead into Ray's object store.

    workers: 0 for one a CPU. address: of a Ray cluster, None for one of our own. gpus: the share of a GPU that each
    takes. Raises ConfigError.
    """

    def __init__(self, workers: int = 0, address: str | None = None, gpus: float = 0.0):
        self._ray, self._own = started(workers, address)
        self.places = workers or places(self._ray, gpus)
        options = self._ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")
        self._class = options(Actor)

    def put(self, value: Any) -> Any:
        return self._ray.put(value)

    def hire(self, make: Any) -> tuple[Any, Any]:
        actor = self._class.remote(fetched, (make,), sys.path)
        return actor, actor.__ray_call__.remote(node)

    def call(self, actor: Any, method: str, *args: Any) -> Any:
        return getattr(actor, method).remote(*args)

    def wait(self, calls: Sequence[Any], timeout: float | None) -> Any | None:
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=timeout)
        return ready[0] if ready else None

    def get(self, call: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except (errors.RayActorError, errors.ObjectLostError) as death:
            final = isinstance(death, errors.RayActorError) and death.actor_init_failed
            raise Died(str(death).strip().splitlines()[-1], final) from death

    def kill(self, actor: Any) -> None:
        self._ray.kill(actor)

    def room(self) -> str:
        free, every = self._ray.available_resources(), self._ray.cluster_resources()
        return f"of the Ray cluster's {every.get('CPU', 0):g} CPUs {free.get('CPU', 0):g} are free"

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()


def fetched(ref: Any) -> Any:
    """What a reference leads to."""
    import ray

    return ray.get(ref)


def node(actor: Any) -> str:
    """The Ray node that this actor runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def started(workers: int, address: str | None) -> tuple[Any, bool]:
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
                num_cpus=workers or cores(),
                num_gpus=torch.cuda.device_count(),
                include_dashboard=False,
                _system_config={"max_direct_call_object_size": INLINE},
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


def places(ray: Any, gpus: float) -> int:
    """For actors, in the whole cluster. Raises ConfigError where there is none."""
    found = ray.cluster_resources()
    if not (places := int(found.get("CPU", 0))):
        raise ConfigError("the Ray cluster has no CPUs for workers")
    if gpus and not found.get("GPU", 0):
        raise ConfigError("the Ray cluster has no GPUs; have cpu")
    return min(places, int(found["GPU"] / gpus)) if gpus else places
