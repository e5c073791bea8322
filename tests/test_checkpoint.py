"""A checkpoint is the state: continuing from the file is continuing from memory, whatever parts a method has."""

from __future__ import annotations

import gc
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from world import CLIENTS, PACINGS, WORK, World, method

from prfl import checkpoint, config, density, merge, nodes
from prfl.cache import Cached
from prfl.config import Experiment
from prfl.cut import Cut, Ranking
from prfl.masks import Mask
from prfl.overlap import nested
from prfl.recovery import Plateau
from prfl.store import model_sha256
from prfl.types import Arrival, Group, Member, State
from strategies import selector, table
from strategies.method import Method, rerank
from strategies.server import Scores, serve

SHARES = (0.05, 0.3, 0.31, 0.77, 1.0)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit and of one type, all the way down; rankings by what they give out."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and checkpoint.buffer(a) == checkpoint.buffer(b)
    if isinstance(a, np.ndarray | np.generic):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    if isinstance(a, float):
        return a.hex() == b.hex()
    if isinstance(a, Mapping):
        return same(list(a.items()), list(b.items()))  # in the same order
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Ranking):
        return same(a.cut, b.cut) and same(dict(a.places), dict(b.places))
    if isinstance(a, ref):
        return same(a(), b())
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


def round_trip(value: Any, folder: Path, trusted: tuple[str, ...] = ()) -> Any:
    """What a value is once it was saved and loaded."""
    checkpoint.save(folder, state(), {"value": value}, trusted)
    return checkpoint.load(folder, trusted).beside["value"]


def state(version: int = 0, **more: Any) -> State:
    params = {"w": torch.arange(12.0).view(3, 4), "b": torch.zeros(3)}
    return replace(Method().init(params, classes={0: "a", 1: "b"}), version=version, **more)


def begun(m: Method, world: World, chosen: Any = None, pacing: str = "buffered", versions: int = 3) -> State:
    """The state after a few versions in virtual time."""
    return serve(
        m,
        PACINGS[pacing],
        world.transport(),
        m.init(world.params, world.architecture, world.classes, 3),
        stop=lambda s, now: s.version >= versions,
        selector=chosen,
        evaluate=lambda s: Scores({"accuracy": 0.1 * min(s.version, 2)}),
    )


def continued(m: Method, world: World, now: State, chosen: Any, versions: int = 4) -> State:
    """Versions in which everybody that is asked answers, at its own pace."""
    for _ in range(versions):
        arrivals = []
        for client in chosen.ask(now, range(CLIENTS), 4, np.random.default_rng((now.seed, 1, now.sent))):
            task = m.assign(now, client, np.random.default_rng((now.seed, 0, now.sent)))
            now, at = replace(now, sent=now.sent + 1), float(now.version)
            arrivals.append(Arrival(task, at, at + 1 + client, 10, 10, world.run(task)))
        now = m.step(replace(now, selector=chosen.tell(now, arrivals)), arrivals)
    return now


def resumes(m: Method, folder: Path, chosen: Any = None, pacing: str = "buffered") -> State:
    """The law: from the file as from memory, in every bit of the state."""
    world, chosen = World(), chosen or selector.random()
    saved = begun(m, world, chosen, pacing)
    checkpoint.save(folder, saved, {})
    loaded = checkpoint.load(folder).state
    assert same(loaded, saved)
    on, back = (continued(m, world, s, chosen) for s in (saved, loaded))
    assert on.version == saved.version + 4
    assert model_sha256(on.params) == model_sha256(back.params) != model_sha256(saved.params)
    assert same(on, back)
    return loaded


@pytest.mark.parametrize("pacing", ["sync", "buffered", "window"])
@pytest.mark.parametrize("name", sorted(table.METHODS))
def test_every_method_continues_as_if_nothing_had_happened(name: str, pacing: str, tmp_path: Path) -> None:
    resumes(method(name), tmp_path, pacing=pacing)


@pytest.mark.parametrize("name", ["pr_fl", "fedgmr"])
def test_channels_too(name: str, tmp_path: Path) -> None:
    resumes(method(name, unit="channels"), tmp_path)


@pytest.mark.parametrize("name", sorted(merge.TABLE))
def test_every_merge_continues(name: str, tmp_path: Path) -> None:
    options = (
        {"inner": merge.TABLE["buff_mask_fed_avg"]()} if name in ("momentum", "adam", "by_value", "by_quality") else {}
    )
    part = merge.TABLE[name](**options)
    resumes(Method(merge=part, density=density.tiers((0.3, 0.6)), work=WORK, remask=rerank(2)), tmp_path)


@pytest.mark.parametrize("name", sorted(density.TABLE))
def test_every_density_continues(name: str, tmp_path: Path) -> None:
    options = {"recover": {"first": density.by_time(every=2, floor=0.3), "every": 1, "patience": 1, "rest": 1},
               "by_time": {"every": 2, "floor": 0.3}}.get(name, {})  # fmt: skip
    resumes(Method(density=density.TABLE[name](**options), work=WORK), tmp_path)


@pytest.mark.parametrize("name", sorted(selector.TABLE))
def test_every_selector_continues(name: str, tmp_path: Path) -> None:
    options = {"every": 1} if name == "checkin" else {}
    resumes(method("pr_fl"), tmp_path, selector.TABLE[name](**options))


# Rankings


@pytest.mark.parametrize("spread", ["layer", "erk", "model"])
@pytest.mark.parametrize("unit", ["weights", "channels"])
def test_a_ranking_gives_the_same_masks_and_they_know_it(unit: Any, spread: Any, tmp_path: Path) -> None:
    world = World()
    cut = Cut(unit, "layer" if unit == "channels" else spread, floor=0.1, core="magnitude")
    before = Method(cut=cut, work=WORK).init(world.params, world.architecture)
    checkpoint.save(tmp_path, before, {})
    after = checkpoint.load(tmp_path).state
    masks = [(before.rank.mask(s), after.rank.mask(s)) for s in SHARES]
    assert all(same(dict(a.bits), dict(b.bits)) and same(dict(a.channels), dict(b.channels)) for a, b in masks)
    assert masks[0][1].bits or masks[0][1].channels
    assert all(b.ranking is after.rank and after.rank.mask(s) is b for s, (_, b) in zip(SHARES, masks, strict=True))
    assert all(nested(a, b, world.params) for (_, a), (_, b) in pairwise(masks))


def test_a_mask_in_a_memory_knows_its_ranking_again(tmp_path: Path) -> None:
    s = state()
    s = replace(s, density={"mask": s.rank.mask(0.5), "lost": Mask({"w": torch.ones(3, 4) > 0}, origin=ref(Cut()))})
    gc.collect()
    checkpoint.save(tmp_path, s, {})
    loaded = checkpoint.load(tmp_path).state
    assert loaded.density["mask"].ranking is loaded.rank
    assert loaded.density["lost"].ranking is None
    assert loaded.density["mask"].bits["w"].equal(s.density["mask"].bits["w"])


# Values


class Pair(NamedTuple):
    a: float
    b: Any


@dataclass(frozen=True)
class Memory:
    kept: Mapping[Any, Any]
    deep: tuple[Any, ...] = ()
    late: int = field(default=0, init=False)


class Stubborn:
    pass


GROUP = Group(3, (Member("w", 0), Member("b", 0, 1, 2)))
VALUES = {
    "numbers": (0, -(2**70), True, None, 1e-320, 0.1 + 0.2, -0.0, "ä\u2028\n", b"\x00\xff", ()),
    "not finite": (inf, -inf, nan, {"best": -inf}),
    "numpy": (np.float64(0.1), np.float32(nan), np.int64(-3), np.bool_(True), np.ones((2, 3)), np.array(2.5)),
    "keys": {1: "a", "1": "b", GROUP: "c", (1, "x"): "d", None: "e", 2.5: "f"},
    "series": [[1, (2, [3])], {4}, frozenset({5, 6})],
    "tensors": [torch.tensor(nan), torch.zeros(0, 3), torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.int16),
                torch.ones(2, 2, dtype=torch.bfloat16), torch.arange(6.0, dtype=torch.float64).view(2, 3).t()[1:],
                torch.tensor([-0.0, inf]), torch.tensor(7), torch.ones(5, dtype=torch.uint8)],
    "parts": {3: Cached(None, torch.ones(2), 3.0, 1, 0.5), 4: Plateau()},
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    assert same(round_trip(VALUES[name], tmp_path), VALUES[name])


def test_what_is_one_object_stays_one_and_is_stored_once(tmp_path: Path) -> None:
    big, inner = torch.rand(10_000), {"x": 1}
    got = round_trip({"a": big, "b": [big, big], "view": big[:5000], "c": inner, "d": (inner,)}, tmp_path)
    assert got["a"] is got["b"][0] is got["b"][1]
    assert got["c"] is got["d"][0]
    assert got["view"].equal(big[:5000])
    (path,) = (tmp_path / "state").iterdir()
    assert path.stat().st_size < 4 * 15_000 + 5000


def test_read_only_mappings_come_back_as_dicts(tmp_path: Path) -> None:
    assert same(round_trip(MappingProxyType({"a": 1}), tmp_path), {"a": 1})


def test_own_classes_come_back_where_their_package_is_trusted(tmp_path: Path) -> None:
    own = Memory({Pair(1.0, "x"): torch.ones(2)}, (Pair(nan, None),))
    object.__setattr__(own, "late", 7)
    got = round_trip(own, tmp_path, (__name__,))
    assert same(got, own)
    assert got.late == 7


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Memory({}), f"state: {__name__}:Memory is of no known package; have prfl, strategies, clients, sim, deploy"),
        (Pair(1, 2), f"state: {__name__}:Pair is of no known package"),
        (Stubborn(), f"state: {__name__}:Stubborn is of no known package"),
        (OrderedDict(a=1), "state: collections:OrderedDict is of no known package"),
        (lambda: 1, "state: builtins:function is of no known package"),
        (config.load(None), "state: prfl.config:Experiment is neither a dataclass nor a named tuple"),
        (torch.zeros(2, dtype=torch.complex64), "checkpoint: a tensor of torch.complex64, torch.strided can not be"),
        (torch.ones(2).to_sparse(), "checkpoint: a tensor of torch.float32, torch.sparse_coo can not be saved"),
    ],
)
def test_what_could_not_come_back_is_refused_at_once_and_leaves_nothing(
    value: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, state(1), {"value": value})
    assert not list((tmp_path / "state").iterdir())


@pytest.mark.parametrize(
    "value",
    [("object", "subprocess:Popen", []), ("named", "os:stat_result", []), ("object", "prfl.checkpoint:Path", []),
     ("object", "prfl.store:json.JSONDecoder", []), ("object", "prfl.types:nothing", []), ("object", "prflx.a:B", []),
     ("object", "prfl.checkpoint:os.system", [])],
)  # fmt: skip
def test_a_file_can_not_name_classes_that_nobody_trusts(value: tuple[str, str, list[Any]]) -> None:
    kind, name, rest = value
    with pytest.raises(ValueError, match=r"^state: \S+ (is of no known package|is neither|can not be found)") as error:
        nodes.restored({"root": [0], "nodes": [[kind, name, *rest]]}, [], ())
    assert "\n" not in str(error.value)


def test_a_foreign_class_in_a_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), {})
    checkpoint.save(tmp_path, state(2), {"own": Memory({})}, (__name__,))
    with pytest.raises(ValueError, match="is of no known package"):
        checkpoint.load(tmp_path)


def test_other_fields_than_before_are_one_line() -> None:
    table = {"root": [0], "nodes": [["object", "prfl.recovery:Plateau", ["best", 1.0], ["old", 2]]]}
    with pytest.raises(ValueError, match=r"^state: prfl.recovery:Plateau has other fields than .*: best, old$"):
        nodes.restored(table, [], ())


def test_the_packages_of_own_parts_are_found() -> None:
    e = Experiment(method={"density": {"name": "recover", "first": "mine.deep:part"}, "merge": "yours:merge"})
    assert checkpoint.own(e) == ("mine", "yours")
    assert checkpoint.own(Experiment(selector={"name": "theirs.a:b"})) == ("theirs",)
    assert checkpoint.own(Experiment()) == ()


# Files


def test_two_are_kept_and_what_was_taken_back_goes(tmp_path: Path) -> None:
    def held() -> list[str]:
        return sorted(p.name for p in (tmp_path / "state").iterdir())

    for version in (1, 2, 5):
        path = checkpoint.save(tmp_path, state(version), {"n": version})
    assert path == tmp_path / "state" / "00000005.safetensors"
    assert held() == ["00000002.safetensors", "00000005.safetensors"]
    checkpoint.save(tmp_path, state(3), {})  # the run went back to 2
    assert held() == ["00000002.safetensors", "00000003.safetensors"]
    assert checkpoint.load(tmp_path).state.version == 3


def test_a_file_is_about_as_large_as_its_tensors(tmp_path: Path) -> None:
    s = state(signal=torch.rand(250_000), merge={c: Cached(None, torch.rand(1000), 1.0, 0, 1.0) for c in range(100)})
    size = checkpoint.save(tmp_path, s, {}).stat().st_size
    assert 1_400_000 < size < 1_450_000


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(4), {"best": -inf})
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()["structure"], parse_constant=pytest.fail)
        assert any(file.get_tensor(k).shape == (3, 4) for k in file.keys())  # noqa: SIM118
    assert structure.keys() == {"root", "nodes"}


@pytest.mark.parametrize("what", ["half", "empty", "zeros", "bit in the header", "bit in a tensor", "bit in the sum"])
def test_a_damaged_newest_one_is_passed_over(what: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), {"n": 1})
    path = checkpoint.save(tmp_path, state(2), {"n": 2})
    content = bytearray(path.read_bytes())
    at = {"bit in the header": 40, "bit in a tensor": -20, "bit in the sum": -1}.get(what)
    if at is not None:
        content[at] ^= 1
    size = {"half": len(content) // 2, "empty": 0, "zeros": 4}.get(what, len(content))
    path.write_bytes(bytes(4) if what == "zeros" else content[:size])
    loaded, beside, damaged = checkpoint.load(tmp_path)
    assert (loaded.version, beside, damaged) == (1, {"n": 1}, ("00000002.safetensors",))
    (tmp_path / "state" / "00000001.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"^checkpoint: none in \S+ is whole: {path.name}$"):
        checkpoint.load(tmp_path)


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint: none in \S+$"):
        checkpoint.load(tmp_path)


def test_another_format_is_said_to_be_one(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(), {})
    other = path.read_bytes()[:-4].replace(b"prfl state 1", b"prfl state 9")
    path.write_bytes(other + checkpoint.crc32(other).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=r"is prfl state 9, this reads prfl state 1$"):
        checkpoint.load(tmp_path)


def test_killed_before_the_rename_the_last_one_counts_and_the_rest_goes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), {})
    (tmp_path / "state" / "00000002.safetensors.part").write_bytes(b"half of it")
    loaded, _, damaged = checkpoint.load(tmp_path)
    assert (loaded.version, damaged) == (1, ())
    checkpoint.save(tmp_path, state(3), {})
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["00000001.safetensors", "00000003.safetensors"]


def test_a_write_that_fails_leaves_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, state(1), {})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, state(2), {})
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["00000001.safetensors"]


def test_a_loaded_state_does_not_hang_on_its_file(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), {})
    loaded = checkpoint.load(tmp_path).state
    path.write_bytes(b"")
    assert loaded.params["w"].equal(torch.arange(12.0).view(3, 4))


def test_clients_that_share_places_share_them_after_loading(tmp_path: Path):
    """So that a resumed run groups, and therefore rounds, as one that was not stopped."""
    world, m = World(), method("pr_fl")
    now = m.init(world.params, world.architecture, world.classes, 3)
    tasks = [m.assign(now, client, np.random.default_rng(client)) for client in range(CLIENTS)]
    arrivals = [Arrival(task, 0.0, 1.0, 10, 10, world.run(task)) for task in tasks]
    now = m.step(now, arrivals)
    half = now.rank.mask(0.5)
    tasks = [replace(m.assign(now, client, np.random.default_rng(client)), mask=half) for client in (0, 3, 4)]
    now = m.step(now, [Arrival(task, 1.0, 2.0, 10, 10, world.run(task)) for task in tasks])
    checkpoint.save(tmp_path, now, {})
    loaded = checkpoint.load(tmp_path).state
    for memory in (now.merge, loaded.merge):
        assert memory[0].at is memory[3].at is memory[4].at is not None
        assert memory[0].at is not memory[1].at
    again = [Arrival(task, 2.0, 3.0, 10, 10, world.run(task)) for task in tasks[:1]]
    assert same(m.step(now, again), m.step(loaded, again))
