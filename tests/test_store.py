"""The run folder: whole files, whole lines, and a hash that does not see the wall clock."""

from __future__ import annotations

import hashlib
import json
import time
from math import inf, nan
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from prfl import config, store
from prfl.config import ConfigError, Experiment


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
