"""Old tensors lie on disk: the same tensors with the same values, a constant number of models in memory."""

from __future__ import annotations

import gc
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from world import WORK, World, method

from prfl import shelf
from prfl.codec import Codec
from prfl.masks import DENSE
from prfl.shelf import Shelf
from prfl.store import model_sha256
from prfl.types import State, Task, Tree
from strategies.pacing import buffered
from strategies.server import serve


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files lie."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def version(number: int, size: int = 50) -> Tree:
    return {
        "weight": torch.full((size, 3), float(number)),
        "turned": torch.arange(6.0).view(2, 3).T + number,
        "scalar": torch.tensor(float(number)),
        "none": torch.zeros(0, 4),
        "steps": torch.tensor([number, -number]),
        "held": torch.tensor([True, False, True]),
        "half": torch.tensor([1.5, number], dtype=torch.float16),
    }


def on_disk(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


def mapped(folder: Path) -> int:
    """Files of the folder, by name or not, that this process reads."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split(maxsplit=5)[5] for line in lines if str(folder) in line})


def test_what_is_older_than_the_newest_lies_on_disk_and_is_what_it_was(folder: Path) -> None:
    shelves, trees = Shelf(newest=2), [version(n) for n in range(5)]
    tensors = [dict(tree) for tree in trees]
    for tree in trees:
        shelves.add(tree)
    for n, tree in enumerate(trees):
        for k, want in version(n).items():
            assert tree[k] is tensors[n][k]
            assert torch.equal(tree[k], want)
            assert (tree[k].dtype, tree[k].shape) == (want.dtype, want.shape)
            assert on_disk(tree[k]) is (n < 3)
    assert mapped(folder) == 3
    assert not list(folder.iterdir())  # gone by name: nothing stays behind, however this process ends


def test_files_go_with_their_last_reader(folder: Path) -> None:
    shelves, trees = Shelf(newest=1), [version(n) for n in range(4)]
    for tree in trees:
        shelves.add(tree)
    kept = trees[0]["weight"]
    del trees, tree
    gc.collect()
    assert mapped(folder) == 1
    assert torch.equal(kept, version(0)["weight"])
    del kept
    gc.collect()
    assert mapped(folder) == 0


def test_what_nobody_holds_is_not_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    move = shelf._move
    monkeypatch.setattr(shelf, "_move", lambda tensors: (written.append(len(tensors)), move(tensors)))
    shelves = Shelf(newest=1)
    for n in range(4):
        shelves.add(version(n))
    assert written == [0, 0, 0]
    assert mapped(folder) == 0


def test_more_than_the_newest_stay_while_there_is_room() -> None:
    size = sum(v.nbytes for v in version(0).values())
    shelves, trees = Shelf(newest=1, room=3 * size), [version(n) for n in range(5)]
    for tree in trees:
        shelves.add(tree)
    assert [on_disk(tree["weight"]) for tree in trees] == [True, True, False, False, False]
    large = version(5, size=5000)
    shelves.add(large)
    assert [on_disk(tree["weight"]) for tree in trees] == [True] * 5
    assert not on_disk(large["weight"])


def test_a_tensor_of_two_versions_moves_once(folder: Path) -> None:
    shelves, still = Shelf(newest=1), torch.ones(100)
    trees = [{"still": still, "moved": torch.full((3,), float(n))} for n in range(4)]
    for tree in trees:
        shelves.add(tree)
    assert on_disk(still)
    assert torch.equal(still, torch.ones(100))
    place = still.untyped_storage().filename
    assert place == trees[0]["moved"].untyped_storage().filename != trees[1]["moved"].untyped_storage().filename


def test_without_a_folder_all_stays_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    shelves, trees = Shelf(newest=1), [version(n) for n in range(3)]
    for tree in trees:
        shelves.add(tree)
    assert not any(on_disk(v) for tree in trees for v in tree.values())
    assert all(torch.equal(tree["weight"], version(n)["weight"]) for n, tree in enumerate(trees))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a file system takes root")
def test_without_room_on_the_disk_all_stays_in_memory(folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    try:
        shelves, trees = Shelf(newest=1), [version(n, size=10**4) for n in range(3)]
        for tree in trees:
            shelves.add(tree)
        assert not any(on_disk(v) for tree in trees for v in tree.values())
        assert all(torch.equal(tree["weight"], torch.full((10**4, 3), float(n))) for n, tree in enumerate(trees))
        assert not list(folder.iterdir())
    finally:
        subprocess.run(["umount", folder], check=True)


def test_all_that_an_update_brings_waits_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.transport.ROOM", 0)
    world = World(clients=12)
    transport, work = world.transport(), replace(WORK, report="gradient2")
    for client in range(12):
        transport.send(Task(client, 0, world.params, DENSE, work, client))
    updates = []
    while arrival := transport.wait():
        assert arrival.update is not None
        assert arrival.update.signal is not None
        updates.append(arrival.update)
    for tree in (updates[0].delta, updates[0].signal or {}):
        assert tree
        assert all(map(on_disk, tree.values()))


@pytest.mark.parametrize("codec", [Codec(), Codec("int8")], ids=["float32", "int8"])
@pytest.mark.parametrize("name", ["fedbuff", "pr_fl", "fedmp"])
def test_a_run_is_the_same_whether_old_versions_lie_on_disk(
    name: str, codec: Codec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def played() -> tuple[str, list[object], list[State]]:
        world, events, states = World(clients=30), [], []
        m = method(name)
        last = serve(
            m,
            buffered(25, 2),
            world.transport(codec=codec),
            m.init(world.params, world.architecture, world.classes, 3),
            stop=lambda s, now: s.version >= 16,
            keep=states.append,
            log=events.append,
        )
        return model_sha256(last.params), events, states

    monkeypatch.setattr("sim.transport.ROOM", 0)
    here = played()
    assert mapped(folder) > 0
    assert [any(map(on_disk, s.params.values())) for s in here[2]] == [True] * 8 + [False] * 8
    monkeypatch.setattr(Shelf, "add", lambda self, tree: None)
    there = played()
    assert not any(on_disk(v) for s in there[2] for v in s.params.values())
    assert here[:2] == there[:2]
