"""Measuring a device: rates from times, the link test and who may disturb it, and the profile in a simulation."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import e
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from torch import nn

from deploy import link, measure, speed
from deploy.credentials import certify
from deploy.home import Home
from deploy.line import AT_ONCE
from deploy.speed import Timed, fit
from prfl import config, models
from prfl.config import Experiment
from prfl.samples import Samples
from prfl.types import Work
from sim import devices

CONV, LINEAR, STEP = 2e9, 5e8, 0.003
TINY = Experiment(
    data=config.Data(set={"name": "synthetic", "shape": [1, 8, 8], "samples": 60, "test": 20}, clients=3),
    model={"name": "conv2", "hidden": 16, "channels": [4, 8]},
    method="fedavg",
)


def seconds(flops: Mapping[str, float], step: float = STEP) -> Timed:
    """What a device of these rates would show."""
    return Timed(flops, step + flops["conv"] / CONV + flops["linear"] / LINEAR, 0.02, (1.0, 1.0))


WHOLE, SMALL = {"conv": 3e8, "linear": 5e7}, {"conv": 8e6, "linear": 1e6}


def test_rates_and_overheads_are_recovered_from_times() -> None:
    parts = [Timed({"conv": 0.0, "linear": f["linear"]}, 0.0004 + f["linear"] / LINEAR) for f in (WHOLE, SMALL)]
    found = fit(seconds(WHOLE), seconds(SMALL), *parts)
    assert found.flops == pytest.approx({"conv": CONV, "linear": LINEAR})
    assert (found.step, found.task, found.jitter) == (pytest.approx(STEP), 0.02, 0.0)


def test_one_kind_of_layer_has_one_rate() -> None:
    found = fit(seconds({"conv": 0.0, "linear": 5e7}), seconds({"conv": 0.0, "linear": 1e6}))
    assert found.flops == pytest.approx({"linear": LINEAR})
    assert found.step == pytest.approx(STEP)


@pytest.mark.parametrize(
    "others",
    [
        (),
        (Timed(SMALL, 1.0),),  # the narrow model takes longer
        (seconds(SMALL, 0.0), Timed(WHOLE, 9.0), Timed(SMALL, 1.0)),  # the linear layers save more than the model
        (seconds(SMALL, 0.0), Timed(WHOLE, 1.0), Timed(SMALL, 1.0)),  # they save nothing
        (Timed(SMALL, 0.0001),),  # no time is left for a step's overhead
    ],
)
def test_times_that_contradict_each_other_still_predict_the_model(others: tuple[Timed, ...]) -> None:
    whole = seconds(WHOLE)
    found = fit(whole, *others)
    assert sum(amount / found.flops[kind] for kind, amount in WHOLE.items()) + found.step == pytest.approx(whole.step)
    assert min(*found.flops.values(), found.step + 1e-12) > 0
    assert found.flops["conv"] == pytest.approx(found.flops["linear"])


def test_jitter_is_the_sigma_of_the_log() -> None:
    assert fit(replace(seconds(WHOLE), runs=(1.0, e, e * e))).jitter == pytest.approx(1.0)


def test_a_narrow_model_is_the_same_at_an_eighth() -> None:
    assert speed.narrow({"name": "conv2", "hidden": 256}) == {
        "name": "conv2", "hidden": 32, "channels": [4, 8], "start": "torch",
    }  # fmt: skip
    assert speed.narrow("mlp") == {"name": "mlp", "hidden": [25, 25]}
    for name in models.TABLE:
        spec = speed.narrow(name)
        assert spec is not None
        options = {k: v for k, v in spec.items() if k != "name"}
        small, whole = (models.build(name, (3, 32, 32), 4, 0, o) for o in (options, None))
        assert [type(m) for m in small.modules()] == [type(m) for m in whole.modules()]
        assert sum(v.numel() for v in small.parameters()) < sum(v.numel() for v in whole.parameters()) / 7
    assert speed.narrow("test_measure:plain") is None


def plain() -> models.Model:
    """A model without a width."""
    return lambda shape, classes: nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def test_linear_layers_are_timed_with_their_sizes() -> None:
    model = models.build("conv2", (1, 8, 8), 10, 0, {"hidden": 16, "channels": (4, 8)})
    part = speed._Linears(model)
    assert [tuple(p.shape) for k, p in part.named_parameters() if p.dim() > 1] == [(16, 32), (10, 16)]
    samples = part.samples(Samples(torch.zeros(6, 1, 8, 8), torch.arange(6)))
    assert part(samples.batch(torch.arange(4))[0]).shape == (4, 10)


@pytest.mark.parametrize("model", [TINY.model, "test_measure:plain"])
def test_a_device_trains_what_it_is_measured_with(model: config.Spec) -> None:
    found = speed.training(TINY.model_copy(update={"model": model}), seconds=0.02)
    assert set(found.flops) == ({"conv", "linear"} if model == TINY.model else {"linear"})
    assert all(1e5 < rate < 1e14 for rate in found.flops.values())
    assert 0 <= found.step < 0.5
    assert 0 <= found.task < 0.5


def test_work_is_the_methods() -> None:
    assert speed.work_of(TINY.model_copy(update={"work": {"batch": 7}})) == Work(batch=7)
    assert speed.work_of(TINY.model_copy(update={"method": "heterofl"})).scaler


def test_a_board_says_its_name(tmp_path: Path) -> None:
    assert measure.board(tmp_path)
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("processor: 0\nmodel name\t: Some CPU\n")
    assert measure.board(tmp_path) == "Some CPU"
    (tmp_path / "proc/device-tree/model").write_text("Raspberry Pi 4 Model B Rev 1.4\0")
    assert measure.board(tmp_path) == "Raspberry Pi 4 Model B Rev 1.4"


def test_profiles_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    measure.write(file, "a", {"memory": 1})
    measure.write(file, "b", {"memory": 2})
    measure.write(file, "a", {"memory": 3})
    assert yaml.safe_load(file.read_text()) == {"a": {"memory": 3}, "b": {"memory": 2}}
    for text in ("[1]", "{", "\x00"):
        file.write_text(text)
        with pytest.raises(ValueError, match="something else than device profiles"):
            measure.write(file, "a", {})
        assert file.read_text() == text


# The link test


@pytest.fixture
def tester() -> Iterator[int]:
    """The port of a link test that runs."""
    code = "from deploy import link; link.serve('127.0.0.1', 0, 1)"
    with subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().split(":")[1].split()[0])
        finally:
            process.kill()


def test_a_link_is_measured_both_ways(tester: int) -> None:
    found = link.measure("127.0.0.1", tester, 0.05, 1)
    assert min(found.down, found.up) > 1e6
    assert 0 < found.latency < 0.1


@pytest.mark.slow
def test_a_limited_link_is_measured_as_it_is(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    try:
        import lab
    finally:
        sys.path.pop(0)
    if why := lab.missing():
        pytest.skip(why)
    command = [sys.executable, "-uc", "from deploy import link; link.serve('0.0.0.0', 8090, 1)"]
    code = f"from deploy import link; print(*vars(link.measure('{lab.SERVER}', 8090, 1.5, 1)).values())"
    asking = [sys.executable, "-uc", code]
    env, log = {"PYTHONPATH": str(Path(__file__).parent.parent)}, tmp_path / "link"
    with lab.Lab([lab.Kind("board", 0.3, down=4e5, up=2e5)]) as there:
        there.start(command, tmp_path / "server", env=env)
        while not (tmp_path / "server").read_text():
            time.sleep(0.05)
        there.limit(0)
        assert there.start(asking, log, 0, env).wait(60) == 0, log.read_text()
    down, up, latency = map(float, log.read_text().split())
    assert 0.9 < down / 4e5 < 1  # frames and headers are 4 %
    assert 0.9 < up / 2e5 < 1
    assert 0 < latency < 0.2


def asked(port: int, what: bytes, size: int, magic: bytes = link.MAGIC, more: bytes = b"") -> bytes:
    """All that the link test answers to one request."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as peer:
        got = b""
        with suppress(OSError):
            peer.sendall(link.REQUEST.pack(magic, what, size) + more)
            peer.shutdown(socket.SHUT_WR)
            while data := peer.recv(1 << 16):
                got += data
        return got


def test_the_link_test_does_what_it_says_and_no_more(tester: int) -> None:
    assert len(asked(tester, b"d", 40_000)) == 40_000
    assert asked(tester, b"e", 3, more=b"abc") == b"abc"
    assert asked(tester, b"u", 3 * link.BLOCK + 5, more=bytes(3 * link.BLOCK + 5)) == b"xxx"
    for wrong in (
        asked(tester, b"d", link.LARGEST + 1),
        asked(tester, b"e", link.ECHOES + 1, more=b"abc"),
        asked(tester, b"d", 0),
        asked(tester, b"x", 10),
        asked(tester, b"d", 10, magic=b"GET"),
    ):
        assert wrong == b""
    assert len(asked(tester, b"d", 10)) == 10


def test_idlers_are_few(tester: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", tester)) for _ in range(link.CONNECTIONS)]
    try:
        time.sleep(0.2)
        assert asked(tester, b"d", 10) == b""
        idle.pop().close()
        time.sleep(0.2)
        assert len(asked(tester, b"d", 10)) == 10
    finally:
        for peer in idle:
            peer.close()


def test_time_is_up_for_connections_and_for_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "LONGEST", 0.3)
    said: list[str] = []
    service = threading.Thread(target=link.serve, args=("127.0.0.1", 0, 2 / 60, said.append))
    start = time.monotonic()
    service.start()
    while not said:
        time.sleep(0.01)
    port = int(said[0].split(":")[1].split()[0])
    with closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as peer:
        peer.sendall(link.REQUEST.pack(link.MAGIC, b"u", 100) + b"x")
        with suppress(ConnectionError):
            assert peer.recv(1) == b""
    assert 0.2 < time.monotonic() - start < 1.9
    service.join(10)
    assert not service.is_alive()


@pytest.mark.parametrize("answer", [b"", b"x" * 50], ids=["silence", "too little"])
def test_a_wrong_server_is_one_line(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def once() -> None:
            peer, _ = server.accept()
            with peer:
                peer.sendall(answer)

        threading.Thread(target=once, daemon=True).start()
        with pytest.raises(ValueError, match=f"link test with 127.0.0.1:{port}: .*`prfl devices link`"):
            link.measure("127.0.0.1", port)
    with pytest.raises(ValueError, match="no connection"):
        link.measure("127.0.0.1", port)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pi:80", ("pi", 80)), ("10.0.0.1", ("10.0.0.1", link.PORT)),
        ("[::1]:9", ("::1", 9)), ("fe80::1", ("fe80::1", link.PORT)),
        ("", None), (":80", None), ("pi:", None), ("pi:http", None), ("pi:70000", None), ("pi:0", None),
    ],
)  # fmt: skip
def test_addresses(text: str, found: tuple[str, int] | None) -> None:
    if found:
        assert link.address(text) == found
    else:
        with pytest.raises(ValueError, match="an address is HOST:PORT"):
            link.address(text)


# Requests, and the whole


class _Health(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ports: ClassVar[set[int]] = set()

    def do_GET(self) -> None:
        self.ports.add(self.client_address[1])
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_requests_are_timed_on_connections_that_are_kept_and_checked(tmp_path: Path) -> None:
    home, other = Home.of(tmp_path / "home"), Home.of(tmp_path / "other")
    for each in (home, other):
        certify(each, ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home.certificate, home.certificate_key)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Health) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            port = server.server_address[1]
            assert 0 < measure.exchange("127.0.0.1", port, home.ca) < 5
            assert len(_Health.ports) <= AT_ONCE
            with pytest.raises(ValueError, match=f"server 127.0.0.1:{port}: .*CERTIFICATE_VERIFY_FAILED"):
                measure.exchange("127.0.0.1", port, other.ca)
            with pytest.raises(ValueError, match=r"certificate .*--home names the folder"):
                measure.exchange("127.0.0.1", port, tmp_path / "none")
        finally:
            server.shutdown()
    with pytest.raises(ValueError, match=f"server 127.0.0.1:{port}: "):
        measure.exchange("127.0.0.1", port, home.ca)


BARE = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {"ray", "torch_pruning", "flwr_datasets", "datasets", "sim"}:
            raise ImportError(name + " is not on a device")
sys.meta_path.insert(0, Absent())
from deploy import measure
from prfl.records import experiment_in
import json
print(json.dumps(measure.measured(experiment_in(sys.argv[1]), seconds=0.01, stock=True)))
"""


@pytest.mark.slow
def test_measuring_takes_nothing_that_a_device_lacks() -> None:
    from prfl.records import experiment_out

    call = [sys.executable, "-c", BARE, experiment_out(TINY)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["startup"] > measure.STOCK + 0.1
    assert "stock node" in found["source"]
    assert not {"down", "up", "latency"} & found.keys()


@pytest.mark.slow
def test_a_measured_device_can_be_simulated(tmp_path: Path, tester: int) -> None:
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(config.plain(TINY.model_dump(include={"data", "model", "method"})))
    )
    file, run = tmp_path / "own.yaml", tmp_path / "run"

    def prfl(*arguments: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-c", "from prfl.cli import main; main()", *arguments]
        return subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    measuring = ["--name", "box", "--seconds", "0.02", "--link", f"127.0.0.1:{tester}", "--out", str(file)]
    told = prfl("devices", "measure", "tiny.yaml", *measuring)
    assert told.returncode == 0, told.stderr
    assert "box" in told.stdout
    assert "measured" in told.stdout
    box = devices.load(file)["box"]
    assert box.measured
    assert set(box.flops) == {"conv", "linear"}
    assert "conv2, batches of 20" in box.source
    assert min(box.memory, box.down, box.up, box.latency, box.startup, box.jitter) > 0
    who = f"devices={{mix: {{box: 1.0}}, profiles: {file}}}"
    short = ["pacing={name: sync, clients: 3}", "stop={versions: 2}", "--workers", "serial", "--out", str(run)]
    told = prfl("run", "tiny.yaml", who, *short)
    assert told.returncode == 0, told.stderr
    arrivals = [e for line in (run / "events.jsonl").open() if (e := json.loads(line))["kind"] == "arrival"]
    assert len(arrivals) == 6
    assert all(a["seconds"] > box.startup + 2 * box.latency for a in arrivals)
    wrong = prfl("devices", "measure", "--link", "127.0.0.1:1")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
