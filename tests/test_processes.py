"""A server as processes: ready, killed, back again, stopped; what it knows survives, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import homes
import httpx
import pytest

from deploy import admission, credentials, processes, status, supervisor
from deploy.home import Home

SERVER_APP = """
import time
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

app = ServerApp()
nobody = ClientApp()

@app.main()
def main(grid: Grid, context: Context) -> None:
    for second in range(int(context.run_config["seconds"])):
        grid.get_node_ids()
        time.sleep(1)
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "waits"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "prfl"
[tool.flwr.app.components]
serverapp = "waits:app"
clientapp = "waits:nobody"
[tool.flwr.app.config]
seconds = 6
"""


def run(home: Home, number: str) -> str:
    (found,) = processes.flwr(home, "ls", "--run-id", number)["runs"]
    return str(found["status"])


def app(folder: Path) -> str:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "waits.py").write_text(SERVER_APP)
    return str(folder)


@pytest.mark.slow
def test_a_server_gets_over_everything_but_its_end(tmp_path: Path) -> None:
    home, port = homes.home(tmp_path / "home", "early"), homes.port()
    late = credentials.make_key(Home.of(tmp_path / "device"), "late")
    with homes.server(home, port) as process:
        # it knows who is admitted, and admits others while it runs
        assert [(n.name, n.status, n.seen) for n in status.nodes(home)] == [("early", "registered", None)]
        assert admission.admit(home, [late]) == ["late is admitted"]
        known = {n.name: n.id for n in status.nodes(home)}
        assert set(known) == {"early", "late"}
        assert len(processes.flwr(home, "supernode", "list")["nodes"]) == 2
        with pytest.raises(RuntimeError, match=r"^flwr ls: \[code: 16\] Run ID not found\.$"):
            processes.flwr(home, "ls", "--run-id", "5")
        # a second one is refused
        call = [*homes.COMMAND, "deploy", "server", "--home", str(home.folder), "--port", str(port)]
        second = subprocess.run(call, capture_output=True, text=True, timeout=homes.PATIENCE, check=False)
        assert (second.returncode, second.stderr.count("\n")) == (2, 1)
        assert f"a server runs on {home.folder} already (pid {process.pid})" in second.stderr
        # a SuperLink that is killed comes back, and a ServerApp gets over it
        number = processes.flwr(home, "run", app(tmp_path / "waits"))["run-id"]
        homes.until(lambda: run(home, number) == "running")
        pids = home.read()["pids"]
        os.kill(pids["superlink"], signal.SIGKILL)
        homes.until(lambda: home.read()["pids"].get("superlink", pids["superlink"]) != pids["superlink"])
        homes.until(lambda: healthy(home, port))
        assert {n.name: n.id for n in status.nodes(home)} == known
        assert "superlink ended with signal 9; it is started again in 1 s" in (home.folder / "server.out").read_text()
        # whoever is expelled stays out
        assert admission.expel(home, "late") == ["late is expelled"]
        with pytest.raises(ValueError, match="the key of late was expelled"):
            admission.admit(home, [late])
        assert [n.name for n in status.nodes(home)] == ["early"]
        homes.until(lambda: run(home, number).startswith("finished"))
        assert run(home, number) == "finished:completed"
        # the end, with a ServerApp at work
        number = processes.flwr(home, "run", str(tmp_path / "waits"), "--run-config", "seconds=1000")["run-id"]
        homes.until(lambda: run(home, number) == "running")
        assert len(processes.belonging(home)) == 4
        process.send_signal(signal.SIGINT)
        assert process.wait(homes.PATIENCE) == 0
    assert processes.belonging(home) == []
    assert not home.served()
    assert set(home.read()) == {"gate"}


def healthy(home: Home, port: int) -> bool:
    return supervisor.well(supervisor.Server(home, "127.0.0.1", port, port + 1, insecure=False))


@pytest.mark.slow
def test_what_a_killed_server_left_is_stopped_and_who_was_expelled_meanwhile_is_out(tmp_path: Path) -> None:
    home, port = homes.home(tmp_path / "home", "stays", "goes"), homes.port()
    with homes.server(home, port) as process:
        before = {n.name: n.id for n in status.nodes(home)}
        process.kill()
        process.wait()
        left = processes.belonging(home)
        assert len(left) == 3
        assert admission.expel(home, "goes")[0].startswith("goes is expelled; no server runs")
        with homes.server(home, port):
            said = (home.folder / "server.out").read_text()
            assert [f"process {pid} was left by a server that died" in said for pid in left] == [True] * 3
            assert {n.name: n.id for n in status.nodes(home)} == {"stays": before["stays"]}
            assert not set(left) & set(processes.belonging(home))


@pytest.mark.slow
def test_without_tls_everything_says_so_and_the_gate_stays(tmp_path: Path) -> None:
    home, port = Home.of(tmp_path / "home"), homes.port()
    with homes.server(home, port, "--insecure"):
        said = (home.folder / "server.out").read_text()
        assert said.startswith("prfl: INSECURE: no encryption and no node authentication")
        assert f"ready on 127.0.0.1:{port} (INSECURE)" in said
        assert f"prfl deploy node --server 127.0.0.1:{port} --insecure" in said
        base = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{base}/health", trust_env=False).status_code == 200
        assert httpx.post(f"{base}/v1/control/list-nodes", trust_env=False).status_code == 404
        assert status.nodes(home) == []


@pytest.mark.slow
def test_what_cannot_start_is_said_in_one_line(tmp_path: Path) -> None:
    home, port = homes.home(tmp_path / "home"), homes.port()
    call = [*homes.COMMAND, "deploy", "server", "--home", str(home.folder), "--host", "127.0.0.1", "--port", str(port)]
    home.database.write_text("this is no database")
    done = subprocess.run(call, capture_output=True, text=True, timeout=homes.PATIENCE, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "superlink ended with code" in done.stderr
    assert processes.belonging(home) == []
    home.certificate_key.unlink()
    done = subprocess.run(call, capture_output=True, text=True, timeout=homes.PATIENCE, check=False)
    assert done.stderr == f"prfl: no {home.certificate_key}; make it with `prfl deploy certs NAME_OR_ADDRESS...`\n"


def test_a_long_log_is_turned_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LOG", 10)
    log = tmp_path / "a.log"
    with log.open("ab", buffering=0) as writer:
        for content, kept in ((b"0123456789", None), (b"abc", b"0123456789abc"), (b"d", b"0123456789abc")):
            writer.write(content)
            supervisor.turn_over(log)
            old = tmp_path / "a.log.1"
            assert (old.read_bytes() if old.exists() else None) == kept
        assert log.read_bytes() == b"d"


def test_server_json_is_changed_by_several_at_once_and_keeps_the_rest(tmp_path: Path) -> None:
    home = Home.of(tmp_path)
    home.note({"runs": ["a"], "pid": 5})
    home.note({"pid": None, "superlink": "127.0.0.1:1"})
    assert home.read() == {"runs": ["a"], "superlink": "127.0.0.1:1"}
    home.server.write_text("[")
    with pytest.raises(ValueError, match=r"server.json is not JSON"):
        home.read()


def test_a_home_has_one_server(tmp_path: Path) -> None:
    home = Home.of(tmp_path)
    assert not home.served()
    with home.alone():
        assert home.served()
        with pytest.raises(ValueError, match="a server runs on"), home.alone():
            pass
    assert not home.served()


def test_what_clients_did_is_read_from_the_events(tmp_path: Path) -> None:
    send = '{"kind":"send","at":1.0,"client":%d,"version":0,"density":0.5}\n'
    arrival = (
        '{"kind":"arrival","at":3.0,"client":%d,"seconds":%s,"density":0.5,"bytes_down":10,"bytes_up":5,"used":%s,'
        '"reason":%s}\n'
    )
    (tmp_path / "events.jsonl").write_text(
        '{"kind":"join","at":0.5,"client":1,"class":"pi4"}\n'
        + send % 1
        + arrival % (1, 2.0, "true", "null")
        + '{"kind":"merge","at":3.0,"version":1,"updates":1}\n'
        + arrival % (1, 4.0, "true", "null")
        + send % 0
        + arrival % (0, 1.0, "false", '"out of memory"')
        + send[:20]
    )
    found = status.clients(tmp_path)
    assert {number: client.device for number, client in found.items()} == {0: "", 1: "pi4"}
    assert (found[1].density, found[1].seconds, found[1].down, found[1].up, found[1].used) == (
        0.5,
        [2.0, 4.0],
        20,
        10,
        2,
    )
    assert (found[0].used, found[0].failed, found[0].reason) == (0, 1, "out of memory")


def test_the_command_of_a_stock_node_carries_its_config(tmp_path: Path) -> None:
    from flwr.common.config import parse_config_args

    config: dict[str, str | int] = {"partition-id": 3, "profile": "pi4", "data": "/a folder/it's here", "memory": 7}
    call = processes.supernode("h:1", config, tmp_path / "ca.crt", tmp_path / "pi")
    assert parse_config_args([call[-1]]) == config
    with pytest.raises(ValueError, match="cannot carry"):
        processes.supernode("h:1", {"data": 'a"b'}, None, None)
