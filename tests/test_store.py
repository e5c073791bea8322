"""The run folder: whole files, whole lines, and a hash that does not see the wall clock."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prfl import config, store
from prfl.config import ConfigError, Experiment
from sim import experiments
from strategies import parts


def test_a_folder_holds_what_was_asked_and_what_it_ran_on(tmp_path: Path) -> None:
    experiment = Experiment(seed=5)
    store.Run(tmp_path / "a" / "b", experiment).close()
    path = tmp_path / "a" / "b" / "config.yaml"
    assert config.load(path) == experiment
    assert yaml.safe_load(path.read_text())["stop"]["seconds"] == inf
    assert json.loads((path.parent / "env.json").read_text())["packages"]["torch"] == torch.__version__.split("+")[0]


def test_events_are_json_lines_and_their_hash_leaves_the_wall_clock_out(tmp_path: Path) -> None:
    events = [{"kind": "send", "at": 0.5, "client": 3}, {"kind": "evaluation", "at": 1.0, "loss": nan, "best": inf}]
    hashes = []
    for name in ("a", "b"):
        run = store.Run(tmp_path / name, Experiment())
        for event in events:
            time.sleep(0.002)
            run.log(event)
        run.close()
        hashes.append(run.events_sha256)
    lines = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    assert all(line.pop("wall") > 0 for line in lines)
    assert lines == [events[0], {**events[1], "loss": None, "best": None}]
    plain = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    assert hashes == [hashlib.sha256(plain.encode()).hexdigest()] * 2


def test_a_merge_is_on_disk_when_it_is_logged(tmp_path: Path) -> None:
    run = store.Run(tmp_path, Experiment())
    run.log({"kind": "send", "at": 0.0})
    run.log({"kind": "merge", "at": 1.0, "version": 1})
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 2
    run.close()


def test_json_is_one_key_a_line(tmp_path: Path) -> None:
    run = store.Run(tmp_path, Experiment())
    value = {"sizes": list(range(100)), "loss": nan, "inner": {"a": 1}}
    run.write("x.json", value)
    run.close()
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {**value, "loss": None}
    assert text.count("\n") == len(value) + 2


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    run = store.Run(tmp_path, Experiment())
    run.write("x.json", {"a": 1})
    with pytest.raises(TypeError):
        run.write("x.json", {"a": object()})
    run.save_model({"w": torch.arange(6.0).view(2, 3).t()})
    run.close()
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["w"], torch.arange(6.0).view(2, 3).t())
    assert not list(tmp_path.glob("*.part"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.Run(tmp_path, Experiment())
    run.write("x.json", {"a": 1})

    def half(path: Path, content: bytes) -> None:
        path.open("wb").write(content[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        run.write("x.json", {"a": 2})
    run.close()
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
    assert not list(tmp_path.glob("*.part"))


def test_folders_are_fresh(tmp_path: Path) -> None:
    assert store.free(None, "a", tmp_path) == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert store.free(None, "a", tmp_path) == tmp_path / "a-3"
    assert store.free(tmp_path / "a", "b") == tmp_path / "a"
    (tmp_path / "a" / "events.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run already"):
        store.free(tmp_path / "a", "b")


def test_the_model_s_hash_sees_names_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    assert store.model_sha256(base) == store.model_sha256({"b": torch.ones(2), "a": torch.zeros(2, 3)})
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0000001])},
        {"a": torch.zeros(2, 3)},
    ]
    assert len({store.model_sha256(tree) for tree in (base, *others)}) == 5


# A folder that goes on

EVENTS = [{"kind": "merge" if i % 3 == 2 else "send", "at": i / 4, "text": 'a "wall":1}' if i == 1 else ""}
          for i in range(7)]  # fmt: skip


def without_wall(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in e.items() if k != "wall"} for e in events]


def logged(folder: Path, events: Iterable[Mapping[str, Any]]) -> str:
    """A run that logs these and is closed; its hash."""
    run = store.Run(folder, Experiment())
    for event in events:
        run.log(event)
    run.close()
    return run.events_sha256


def test_a_run_goes_on_where_it_was_and_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole = logged(tmp_path / "whole", EVENTS)
    run = store.Run(tmp_path / "a", Experiment(seed=3))
    for event in EVENTS[:4]:
        run.log(event)
    offset, path = run.offset(), tmp_path / "a" / "events.jsonl"
    assert offset == path.stat().st_size
    for event in EVENTS[2:6]:  # the run gets this far, then its process dies
        run.log(event)
    run.close()
    with path.open("ab") as log:
        log.write(b'{"kind":"merge","at":1')
    config_before = (tmp_path / "a" / "config.yaml").read_bytes()
    again, lost = store.Run.again(tmp_path / "a", offset)
    assert path.stat().st_size == offset == again.offset()
    assert without_wall(lost) == EVENTS[2:6]
    assert [json.loads(line) for line in (tmp_path / "a" / "lost.jsonl").read_text().splitlines()] == lost
    for event in EVENTS[4:]:
        again.log(event)
    again.close()
    assert without_wall(store.events(tmp_path / "a")) == EVENTS
    assert again.events_sha256 == whole
    assert (tmp_path / "a" / "config.yaml").read_bytes() == config_before


def test_what_was_lost_twice_is_kept_twice(tmp_path: Path) -> None:
    logged(tmp_path, EVENTS)
    for _ in range(2):
        run, lost = store.Run.again(tmp_path, 0)
        assert run.events_sha256 == hashlib.sha256().hexdigest()
        for event in EVENTS[:2]:
            run.log(event)
        run.close()
    assert without_wall(lost) == EVENTS[:2]
    assert (tmp_path / "lost.jsonl").read_text().count("\n") == len(EVENTS) + 2


def test_nothing_lost_leaves_no_file(tmp_path: Path) -> None:
    want = logged(tmp_path, EVENTS)
    run, lost = store.Run.again(tmp_path, (tmp_path / "events.jsonl").stat().st_size)
    run.close()
    assert (lost, run.events_sha256) == ([], want)
    assert not (tmp_path / "lost.jsonl").exists()


def test_wall_time_goes_on(tmp_path: Path) -> None:
    logged(tmp_path, EVENTS[:1])
    path = tmp_path / "events.jsonl"
    path.write_text(path.read_text().rpartition(":")[0] + ":5000.250}\n")
    run, _ = store.Run.again(tmp_path, path.stat().st_size)
    assert 5000.25 <= run.seconds() < 5060
    run.log(EVENTS[1])
    run.close()
    assert [e["wall"] for e in store.events(tmp_path)][1] >= 5000.25


@pytest.mark.parametrize("tail", [b'{"kind":"se', b'{"kind":"send","at":1.0}', b"\0\0\0\0\n", b"\0" * 9, b"\xff{}\n"])
def test_a_tail_that_is_not_whole_is_left_out(tail: bytes, tmp_path: Path) -> None:
    want = logged(tmp_path, EVENTS)
    path = tmp_path / "events.jsonl"
    offset = path.stat().st_size
    with path.open("ab") as log:
        log.write(tail)
    assert without_wall(store.events(tmp_path)) == EVENTS
    run, lost = store.Run.again(tmp_path, offset)
    run.close()
    assert (lost, run.events_sha256, path.stat().st_size) == ([], want, offset)


def test_a_log_that_does_not_fit_is_one_line_and_stays(tmp_path: Path) -> None:
    logged(tmp_path, EVENTS)
    path = tmp_path / "events.jsonl"
    before = path.read_bytes()
    for offset in (-1, 7, len(before) - 1, len(before) + 1):
        with pytest.raises(ConfigError, match=rf"events.jsonl has {len(before)} bytes and no event that ends at byte"):
            store.Run.again(tmp_path, offset)
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="nowhere holds no run"):
        store.Run.again(tmp_path / "nowhere", 0)
    with pytest.raises(ConfigError, match="nowhere holds no run"):
        list(store.events(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", experiments.names())
@pytest.mark.parametrize("changes", [[], ["devices=real"], ["devices={name: real, nodes: 3, timeout: 600}", "seed=9"]])
def test_the_config_of_a_folder_is_the_experiment(name: str, changes: list[str], tmp_path: Path) -> None:
    experiment = parts.spelled(config.load(experiments.path(name), changes))
    store.Run(tmp_path, experiment).close()
    again = config.load(tmp_path / "config.yaml")
    assert config.plain(again.model_dump()) == config.plain(experiment.model_dump())
    assert again.devices == experiment.devices
    assert parts.spelled(again) == again
