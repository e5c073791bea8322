"""A small network of devices on this machine: a namespace each, links of given speeds, shares of a core. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SERVER = "10.77.0.1"
WEIGHT = 10  # times that of the other processes of this machine, so that they disturb little
PERIOD = 20_000  # microseconds of the CPU quota: short, so that a throttled process still runs smoothly
BURST = 16 * 1024  # bytes
QUEUE = 2000  # milliseconds


@dataclass(frozen=True)
class Kind:
    """A class of devices: share of a core, bytes per second from and to the server, seconds one way."""

    name: str
    cpu: float
    down: float
    up: float
    delay: float = 0.0


def missing() -> str | None:
    """Why there can be no lab here."""
    if os.geteuid():
        return "it takes root"
    for program in ("ip", "tc", "nsenter"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    if _cgroups() is None:
        return "there is no cpu control group to write to"
    name = f"prfl{os.getpid()}t"
    try:
        _do("ip", "netns", "add", name)
        try:
            _do("ip", "-n", name, "link", "add", "name", "hub", "type", "bridge")
            _do("tc", "-n", name, "qdisc", "add", "dev", "hub", "root", "tbf", "rate", "8mbit", "burst", "16kb",
                "latency", "1s")  # fmt: skip
        finally:
            _do("ip", "netns", "del", name)
    except RuntimeError as error:
        return str(error)
    return None


class Lab:
    """Device i is of kind `kinds[i]`, has the address 10.77.0.(10 + i), and a full core until it is limited."""

    def __init__(self, kinds: Sequence[Kind]):
        self.kinds = kinds
        self.delays = True  # whether the kernel can delay packets
        self._prefix = f"prfl{os.getpid()}"
        self._server = f"{self._prefix}s"
        found = _cgroups()
        if found is None:
            raise RuntimeError("there is no cpu control group to write to")
        self._groups, self._version = found
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Lab:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left behind, however often it is pressed
        for process in reversed(self._processes):
            self.stop(process)
        for name in self._spaces():
            for pid in _told("ip", "netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _told("ip", "netns", "del", name)
        time.sleep(0.2)
        for name in self._spaces():
            with suppress(OSError):
                self._group(name).rmdir()
        signal.signal(signal.SIGINT, before)

    def start(
        self, command: Sequence[str], log: Path, device: int | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command on a device (None: on the server), in a session of its own."""
        space = self._server if device is None else self._space(device)
        call = ["nsenter", f"--net=/run/netns/{space}", *command]
        call = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._group(space) / "cgroup.procs"), *call]
        with log.open("ab") as out:
            process = subprocess.Popen(
                call, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **(env or {})},
            )  # fmt: skip
        self._processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes], grace: float = 15.0) -> None:
        """End a process with its session; first it is asked to."""
        if process.poll() is None:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def limit(self, device: int, on: bool = True) -> None:
        """Hold a device to its kind's share of a core, or let it have all."""
        group = self._group(self._space(device))
        quota = round(self.kinds[device].cpu * PERIOD) if on else None
        if self._version == 1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota or -1))
        else:
            (group / "cpu.max").write_text(f"{quota or 'max'} {PERIOD}")

    def busy(self) -> float:
        """Seconds of CPU that the processes of the lab have taken, and the children that they have waited for."""
        total = 0
        for space in self._spaces():
            for pid in (self._group(space) / "cgroup.procs").read_text().split():
                with suppress(OSError):
                    total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
        return total / os.sysconf("SC_CLK_TCK")

    def _build(self) -> None:
        _do("ip", "netns", "add", self._server)
        self._grouped(self._server)
        hub = "link add name hub type bridge", "link set hub up", f"addr add {SERVER}/24 dev hub"
        for call in ("link set lo up", *hub):
            _do("ip", "-n", self._server, *call.split())
        for i, kind in enumerate(self.kinds):
            space = self._space(i)
            _do("ip", "netns", "add", space)
            _do("ip", "-n", self._server, "link", "add", f"v{i}", "type", "veth", "peer", "name", "eth", "netns", space)
            _do("ip", "-n", self._server, *f"link set v{i} master hub up".split())
            for call in ("link set lo up", "link set eth up", f"addr add 10.77.0.{10 + i}/24 dev eth"):
                _do("ip", "-n", space, *call.split())
            self._shape(self._server, f"v{i}", kind.down, kind.delay)
            self._shape(space, "eth", kind.up, kind.delay)
            self._grouped(space)

    def _shape(self, space: str, interface: str, rate: float, delay: float) -> None:
        tbf = f"root handle 1: tbf rate {int(8 * rate)}bit burst {BURST} latency {QUEUE}ms"
        _do("tc", "-n", space, "qdisc", "add", "dev", interface, *tbf.split())
        if delay and self.delays:
            netem = f"parent 1:1 handle 2: netem delay {delay * 1000:g}ms limit 10000"
            try:
                _do("tc", "-n", space, "qdisc", "add", "dev", interface, *netem.split())
            except RuntimeError:
                self.delays = False

    def _spaces(self) -> list[str]:
        return [self._server, *map(self._space, range(len(self.kinds)))]

    def _space(self, device: int) -> str:
        return f"{self._prefix}d{device}"

    def _group(self, space: str) -> Path:
        return self._groups / space

    def _grouped(self, space: str) -> None:
        self._group(space).mkdir()
        if self._version == 1:
            (self._group(space) / "cpu.shares").write_text(str(1024 * WEIGHT))
        else:
            (self._group(space) / "cpu.weight").write_text(str(100 * WEIGHT))


def _cgroups() -> tuple[Path, int] | None:
    """Where groups with a CPU limit can be made, and which version they are of."""
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    if (v1 / "cpu.cfs_quota_us").exists() or (v1 / "cgroup.procs").exists():
        return (v1, 1) if os.access(v1, os.W_OK) else None
    control = v2 / "cgroup.subtree_control"
    if control.exists():
        with suppress(OSError):
            control.write_text("+cpu")
            return v2, 2
    return None


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {' '.join(done.stderr.split())}")


def _told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout
