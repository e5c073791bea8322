"""A Ray cluster of two real nodes: actors on both, one node dies in the middle, the result is that of this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import create_server
from threading import Thread

import pytest
from test_compare import command
from test_workers import make
from world import PACINGS, World, method

import prfl
from prfl.config import ConfigError
from prfl.store import model_sha256
from sim.actors import Actors
from sim.cluster import Cluster, check
from sim.workers import Serial, Workers
from strategies.server import serve


@pytest.fixture
def web() -> Iterator[str]:
    """The address of a server that speaks another protocol."""
    with create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(64)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.slow
def test_a_node_dies_in_the_middle_and_the_result_is_the_same() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    try:
        import cluster
    finally:
        sys.path.pop(0)

    def played(workers: Workers, heard: Callable[[int], object] = lambda version: None) -> str:
        world, m = World(), method("pr_fl")
        state = serve(
            m,
            PACINGS["one_arrival"],
            world.transport(workers),
            m.init(world.params, world.architecture, world.classes, 3),
            stop=lambda s, now: s.version >= 60,
            log=lambda e: heard(e["version"]) if e["kind"] == "merge" else None,
        )
        return model_sha256(state.params)

    want = played(Serial(make()))
    with cluster.cluster() as (address, other):
        pool = Actors(Cluster(address=address), make)
        try:
            while len(pool.nodes) < 2:
                pool._collect()
            both = set(pool.nodes.values())
            assert len(both) == 2
            assert played(pool, lambda version: cluster.kill(other) if version == 20 else None) == want
            assert len(set(pool.nodes.values()) & both) == 1
        finally:
            pool.close()


def test_an_address_without_a_cluster_is_one_line(web: str) -> None:
    for address, said in (
        ("nonsense", "HOST:PORT, as `ray start --head` says it, or auto; got 'nonsense'"),
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1"),
        ("ray://127.0.0.1:1", "no Ray cluster at ray://127.0.0.1:1"),
        (web, "what listens there is something else"),
    ):
        with pytest.raises(ConfigError, match=said) as line:
            check(address)
        assert "\n" not in str(line.value)


@pytest.mark.parametrize("verb", [["run"], ["compare", "--methods", "fedavg", "--seeds", "1"]])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ray-address", "here"], "HOST:PORT"),
        (["--device", "cuda:1000"], "device: no cuda:1000 here; have cpu"),
        (["--device", "tpu"], "device: no 'tpu'; have cpu, cuda, cuda:N"),
        (["--device", "cuda", "--gpus-per-worker", "2"], "a share of one GPU"),
        (["--ray-address", "auto", "--workers", "serial"], "serial workers"),
        (["--ray-address", "auto", "--workers", "processes"], "processes of this machine"),
    ],
)
def test_the_command_says_what_is_wrong_with_it(
    verb: list[str], options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *verb, *options) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_from_python_too() -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        prfl.run("default", {"data.clients": 4}, ray_address="here")
    for workers in ("many", 0, -1, True, 1.5):
        with pytest.raises(ConfigError, match='"processes", "ray", "serial" or a number'):
            prfl.run("default", workers=workers)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="serial"):
        prfl.run("default", workers="serial", ray_address="auto")
