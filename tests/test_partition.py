"""Splits over clients: every sample has one owner, the seed decides, and the skew is the one asked for."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prfl import config, partition
from prfl.samples import Samples

LABELS = torch.arange(600) % 10
WRITERS = torch.arange(600) // 7 * 3 + 5  # 86 ids with gaps, 7 samples each but the last


def hashed(parts: list[Tensor]) -> str:
    return "|".join(",".join(map(str, part.tolist())) for part in parts)


def owned_once(parts: list[Tensor], samples: int) -> bool:
    return torch.equal(torch.cat(parts).sort().values, torch.arange(samples))


@pytest.mark.parametrize("name", partition.TABLE)
@pytest.mark.parametrize("clients", [1, 10, 23])
def test_every_sample_has_one_owner_and_no_client_is_empty(name: str, clients: int) -> None:
    if name == "pathological" and clients == 1:
        make = partition.pathological(classes_per_client=10)
    else:
        make = partition.TABLE[name]()
    parts = make(LABELS, WRITERS, clients, 3)
    assert len(parts) == clients
    assert min(map(len, parts)) > 0
    assert owned_once(parts, 600)
    assert all(part.dtype == torch.int64 for part in parts)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([partition.iid(), partition.shards(1), partition.shards(3), partition.quantity(2.0)]),
    st.integers(3, 120),
    st.integers(1, 40),
    st.integers(0, 1000),
)
def test_every_sample_has_one_owner_at_any_size(
    make: partition.Partition, samples: int, clients: int, seed: int
) -> None:
    labels = torch.arange(samples) % 3
    try:
        parts = make(labels, None, clients, seed)
    except ValueError:
        assert clients * getattr(make, "shards_per_client", 1) > samples
        return
    assert min(map(len, parts)) > 0
    assert owned_once(parts, samples)


@pytest.mark.parametrize("name", partition.TABLE)
def test_the_seed_decides(name: str) -> None:
    make = partition.TABLE[name]()
    assert hashed(make(LABELS, WRITERS, 10, 3)) == hashed(make(LABELS, WRITERS, 10, 3))
    assert hashed(make(LABELS, WRITERS, 10, 3)) != hashed(make(LABELS, WRITERS, 10, 4))


def test_no_shared_generator_is_used_or_moved() -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.random.get_rng_state().numpy().tobytes()

    partition.iid()(LABELS, None, 1, 0)  # what it imports may draw
    random.seed(1)
    before = states()
    first = [hashed(make()(LABELS, WRITERS, 10, 0)) for make in partition.TABLE.values()]
    assert states() == before
    random.seed(2)
    np.random.seed(2)
    assert first == [hashed(make()(LABELS, WRITERS, 10, 0)) for make in partition.TABLE.values()]


@pytest.mark.slow
def test_another_process_makes_the_same_split_silently_and_without_a_network() -> None:
    script = """
import socket
def refuse(*given): raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import hashlib, torch
from prfl import partition
labels, writers = torch.arange(600) % 10, torch.arange(600) // 7 * 3 + 5
for make in partition.TABLE.values():
    parts = make()(labels, writers, 10, 3)
    print("|".join(",".join(map(str, part.tolist())) for part in parts))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [hashed(make()(LABELS, WRITERS, 10, 3)) for make in partition.TABLE.values()]
    assert done.stderr == ""


def test_iid_sizes_differ_by_one_and_classes_are_mixed() -> None:
    parts = partition.iid()(LABELS, None, 7, 0)
    assert {len(part) for part in parts} == {85, 86}
    assert all(len(LABELS[part].unique()) == 10 for part in parts)


def test_dirichlet_is_more_skewed_for_smaller_alpha_and_keeps_min_size() -> None:
    def skew(alpha: float) -> float:
        counts = partition.report(partition.dirichlet(alpha)(LABELS, None, 5, 0), LABELS, 10)["counts"]
        shares = torch.tensor(counts) / torch.tensor(counts).sum(dim=1, keepdim=True)
        return float((shares - 0.1).abs().sum(dim=1).mean())

    assert skew(0.1) > skew(1.0) > skew(1000.0)
    assert skew(1000.0) < 0.2
    assert min(map(len, partition.dirichlet(0.5, min_size=40)(LABELS, None, 5, 0))) >= 40


@pytest.mark.parametrize("classes", [1, 2, 5, 10])
def test_pathological_gives_so_many_classes(classes: int) -> None:
    parts = partition.pathological(classes)(LABELS, None, 20, 1)
    assert all(len(LABELS[part].unique()) == classes for part in parts)
    assert all(client % 10 in LABELS[part] for client, part in enumerate(parts))


def test_shards_are_blocks_of_the_sorted_labels() -> None:
    parts = partition.shards(2)(LABELS, None, 30, 0)  # 60 shards of 10 samples, six a class
    assert {len(part) for part in parts} == {20}
    assert max(len(LABELS[part].unique()) for part in parts) == 2
    uneven = partition.shards(2)(LABELS[:590], None, 29, 0)  # 58 shards of 10, and one more for the first client
    assert [len(part) for part in uneven] == [30] + [20] * 28


def test_quantity_sizes_follow_sigma() -> None:
    assert {len(part) for part in partition.quantity(0.0)(LABELS, None, 6, 0)} == {100}
    sizes = [len(part) for part in partition.quantity(1.0, min_size=5)(LABELS, None, 30, 0)]
    assert min(sizes) >= 5
    assert max(sizes) > 3 * min(sizes)
    logs = np.log([len(part) for part in partition.quantity(0.5)(torch.zeros(200_000).long(), None, 400, 1)])
    assert np.std(logs) == pytest.approx(0.5, abs=0.06)


def test_natural_keeps_makers_whole_in_blocks() -> None:
    writers = torch.tensor([9, 2, 2, 7, 4, 4, 9, 7, 7, 5])
    labels = torch.zeros(10, dtype=torch.int64)
    owned = [sorted(set(writers[part].tolist())) for part in partition.natural()(labels, writers, 2, 0)]
    assert owned == [[2, 4, 5], [7, 9]]
    owned = [sorted(set(writers[part].tolist())) for part in partition.natural()(labels, writers, 5, 0)]
    assert owned == [[2], [4], [5], [7], [9]]
    parts = partition.natural()(LABELS, WRITERS, 10, 0)
    assert {len(WRITERS[part].unique()) for part in parts} == {8, 9}
    assert [int(WRITERS[part].min()) for part in parts] == sorted(int(WRITERS[part].min()) for part in parts)


def test_natural_shuffled_takes_random_makers() -> None:
    def blocks(seed: int) -> list[set[int]]:
        parts = partition.natural(shuffle=True)(LABELS, WRITERS, 10, seed)
        return [set(WRITERS[part].tolist()) for part in parts]

    assert blocks(0) == blocks(0) != blocks(1)
    assert sum(map(len, blocks(0))) == 86


@pytest.mark.parametrize(
    ("make", "clients", "said"),
    [
        (partition.iid(), 601, "601 clients for 600 samples"),
        (partition.iid(), 0, "0 clients"),
        (partition.dirichlet(0.01), 100, "partition dirichlet.*100 clients.*raise alpha"),
        (partition.dirichlet(0.5, min_size=61), 10, "partition dirichlet.*min_size"),
        (partition.pathological(2), 3, "partition pathological.*3 clients"),
        (partition.pathological(11), 20, "11 of 10 classes"),
        (partition.pathological(10), 100, "partition pathological.*100 clients"),
        (partition.shards(7), 100, "partition shards.*shards_per_client"),
        (partition.quantity(1.0, min_size=7), 100, "partition quantity.*min_size"),
        (partition.natural(), 87, "87 clients, but samples of 86 makers"),
    ],
)
def test_what_cannot_be_split_is_said_in_one_line(make: partition.Partition, clients: int, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        make(LABELS, WRITERS, clients, 0)
    assert "\n" not in str(error.value)


def test_natural_needs_makers() -> None:
    with pytest.raises(ValueError, match="does not tell who made"):
        partition.natural()(LABELS, None, 5, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: partition.dirichlet(alpha=0),
        lambda: partition.dirichlet(min_size=0),
        lambda: partition.pathological(0),
        lambda: partition.shards(0),
        lambda: partition.quantity(sigma=-1),
        lambda: partition.Noise(labels=1.1),
        lambda: partition.Noise(features=-1),
    ],
)
def test_options_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"must be|needs"):
        make()  # type: ignore[operator]


def test_report_counts_and_is_json() -> None:
    parts = [torch.tensor([0, 1, 2]), torch.tensor([4, 3])]
    told = partition.report(parts, torch.tensor([0, 2, 2, 1, 1]), 4)
    assert told == {"clients": 2, "samples": 5, "sizes": [3, 2], "counts": [[1, 0, 2, 0], [0, 2, 0, 0]]}
    assert json.loads(json.dumps(told)) == told


def plain(samples: int = 200) -> Samples:
    x = torch.full((samples, 2, 3, 3), 100, dtype=torch.uint8)
    return Samples(x, torch.arange(samples) % 10, mean=(100.0, 50.0), std=(10.0, 20.0))


def test_label_noise_changes_its_share_to_other_classes() -> None:
    given = plain()
    noisy = partition.Noise(labels=0.25).apply(given, 3, 10, 10, 0)
    assert int((noisy.y != given.y).sum()) == 50
    assert noisy.y.min() >= 0
    assert noisy.y.max() < 10
    assert torch.equal(noisy.x, given.x)
    assert torch.equal(given.y, torch.arange(200) % 10)


def test_feature_noise_has_its_deviation_on_normalised_values() -> None:
    given = plain()
    noisy = partition.Noise(features=0.5).apply(given, 3, 10, 10, 0)
    everything = torch.arange(200)
    added = noisy.batch(everything)[0] - given.batch(everything)[0]
    assert noisy.x.dtype == torch.float32
    assert added.mean().item() == pytest.approx(0, abs=0.03)
    for channel in range(2):
        assert added[:, channel].std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(noisy.y, given.y)


def test_noise_grows_with_the_client_where_asked() -> None:
    given = plain()
    noise = partition.Noise(labels=0.5, grow=True)
    changed = [int((noise.apply(given, client, 5, 10, 0).y != given.y).sum()) for client in range(5)]
    assert changed == [20, 40, 60, 80, 100]


def test_noise_depends_on_seed_and_client_alone() -> None:
    given, noise = plain(), partition.Noise(labels=0.3, features=0.1)

    def drawn(client: int, seed: int) -> tuple[list[int], float]:
        noisy = noise.apply(given, client, 10, 10, seed)
        return noisy.y.tolist(), float(noisy.x.double().sum())

    assert drawn(1, 0) == drawn(1, 0)
    assert len({str(drawn(*who)) for who in [(1, 0), (2, 0), (1, 1)]}) == 3


def test_no_noise_leaves_the_samples() -> None:
    given = plain()
    same = partition.Noise().apply(given, 0, 1, 10, 0)
    assert torch.equal(same.x, given.x)
    assert torch.equal(same.y, given.y)


def test_parts_are_built_from_yaml_fields() -> None:
    made = config.part("partition", {"name": "dirichlet", "alpha": 1, "min_size": 2}, partition.TABLE)
    assert made == partition.dirichlet(1.0, 2)
    noise = config.part("noise", {"name": "noise", "labels": 0.1, "grow": 1.0}, {"noise": partition.Noise})
    assert noise == partition.Noise(labels=0.1, grow=True)
