"""What is installed on machines fits the code: systemd units, container files, pinned wheels, commands on the pages."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest
import typer
import yaml

from deploy.cli import PORT
from deploy.gate import PASSED
from prfl.cli import app

ROOT = Path(__file__).parent.parent
UNITS = sorted((ROOT / "deploy/units").glob("*.service"))
CONTAINERS = ROOT / "deploy/containers"
DOCKERFILES = sorted(CONTAINERS.glob("*.Dockerfile"))
PAGES = sorted((ROOT / "docs").glob("*.md"))
EXPOSURE = 15  # tenths, of what `systemd-analyze security` says

systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")


def parsed(words: Sequence[str]) -> list[str]:
    """The names of a `prfl` command line's commands. Raises click's errors for what that command does not know."""
    command: click.Command = typer.main.get_command(app)
    names, left = [], list(words)
    while isinstance(command, click.Group) and left and left[0] in command.commands:
        names.append(left[0])
        command, left = command.commands[left[0]], left[1:]
    if "--help" not in left:
        command.make_context(names[-1] if names else "prfl", left)
    return names


def settings(unit: Path) -> list[tuple[str, str]]:
    lines = [line.partition("=") for line in unit.read_text().splitlines() if line and line[0] not in "#["]
    return [(key, value) for key, _, value in lines]


def instructions(file: Path) -> list[list[str]]:
    """A Dockerfile's instructions as words."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.M).replace("\\\n", "")
    return [line.split() for line in text.splitlines() if line.strip()]


def verified(unit: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What `systemd-analyze verify` says of a unit whose program exists."""
    copy = folder / unit.name
    copy.write_text(unit.read_text().replace("/opt/prfl/bin/prfl", sys.executable))
    call = ["systemd-analyze", "verify", str(copy)]
    return subprocess.run(call, capture_output=True, text=True, timeout=60)


@systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.name)
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    done = verified(unit, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@systemd
def test_systemd_would_say_what_is_wrong_with_a_unit(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong" / UNITS[0].name
    wrong.parent.mkdir()
    wrong.write_text(UNITS[0].read_text().replace("ProtectSystem=strict", "ProtectSystems=strict"))
    assert "ProtectSystems" in verified(wrong, tmp_path).stderr


@systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.name)
def test_the_units_expose_little(unit: Path) -> None:
    call = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", str(unit)]
    done = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-200:]


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: u.name)
def test_the_units_start_a_command_that_exists(unit: Path) -> None:
    (line,) = [value for key, value in settings(unit) if key == "ExecStart"]
    given = {"${SERVER}": "server.example:9443", "${CLIENT}": "3", "%i": "pi3", "$OPTIONS": "--host 192.0.2.1"}
    if "node" in unit.name:
        given["$OPTIONS"] = "--profile pi4 --data /"
    for name, value in given.items():
        line = line.replace(name, value)
    assert parsed(shlex.split(line)[1:]) == ["deploy", "node" if "node" in unit.name else "server"]


def test_every_unit_comes_back_and_writes_in_its_home_alone() -> None:
    assert len(UNITS) == 2
    for unit in UNITS:
        found = dict(settings(unit))
        assert found["Restart"] == "always"
        assert found["StartLimitIntervalSec"] == "0"
        assert found["StateDirectory"] == "prfl"
        assert found["StateDirectoryMode"] == "0700"
        assert "time-sync.target" in found["After"]
        assert "PRFL_HOME=/var/lib/prfl" in found["Environment"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.name)
def test_the_images_hold_what_the_wheel_holds_and_end_in_a_command(file: Path) -> None:
    steps = instructions(file)
    copied = [word for step in steps if step[0] == "COPY" and "--from" not in step[1] for word in step[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {*wheel, "pyproject.toml", "constraints-device.txt", "README.md", "LICENSE"} == set(copied)
    last = {step[0]: " ".join(step[1:]) for step in steps}
    assert last["USER"] == "prfl"
    assert yaml.safe_load(last["ENTRYPOINT"]) == ["prfl"]
    parsed(yaml.safe_load(last["CMD"]))
    if "HEALTHCHECK" in last:
        probe = yaml.safe_load(last["HEALTHCHECK"].partition("CMD")[2])
        compile(probe[-1], file.name, "exec")
        assert f"localhost:{PORT}/health" in probe[-1]
        assert ("GET", "/health") in PASSED
        assert last["EXPOSE"] == str(PORT)


def test_compose_publishes_the_gate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    services = yaml.safe_load((CONTAINERS / "compose.yaml").read_text())["services"]
    assert {name: service.get("ports") for name, service in services.items()} == {
        "server": [f"{PORT}:{PORT}"],
        "node": None,
    }
    for service in services.values():
        assert (CONTAINERS / service["build"]["context"]).resolve() == ROOT
        assert ROOT / service["build"]["dockerfile"] in DOCKERFILES
    words = [re.sub(r"\$\{.*\}", "1", word) for word in services["node"]["command"]]
    assert parsed(words) == ["deploy", "node"]


def test_a_device_needs_no_extra() -> None:
    """What a node and `prfl devices measure` import, without Ray, torch-pruning and flwr-datasets."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['ray', 'torch_pruning', 'flwr_datasets', 'datasets'])); "
    code = blocked + "import clients.app, deploy.cli, deploy.internals, deploy.link, deploy.measure, deploy.node"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=300)


def test_device_pins_differ_in_torch_alone() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        return {package: version for package, _, version in (line.partition("==") for line in lines if "==" in line)}

    device, tested = pins("constraints-device.txt"), pins("constraints.txt")
    differ = {name for name, version in device.items() if tested.get(name, version) != version}
    assert differ == {"torch", "torchvision"}
    assert int(device["torch"].split(".")[1]) < 10, "2.10 dies on a Raspberry Pi 4, later ones bring CUDA packages"
    assert int(device["torchvision"].split(".")[1]) == int(device["torch"].split(".")[1]) + 15
    assert not any(name.startswith(("nvidia", "cuda", "triton", "ray")) for name in device)


def shown() -> Iterator[tuple[str, str]]:
    """Every `prfl` command line on the pages: page and words."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.match(r"\s*(?:\S*/)?prfl (.*)", line.partition(" #")[0]):
                    yield page.name, found[1].replace("$NAME", "pi1")


@pytest.mark.parametrize(("page", "words"), sorted(set(shown())), ids=lambda v: v[:40])
def test_the_pages_show_commands_that_exist(page: str, words: str) -> None:
    assert parsed(shlex.split(words)), f"{page}: prfl {words}"


def test_the_pages_name_files_that_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:deploy|docs|sim|tests|bench)/[\w@./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
