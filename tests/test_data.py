"""Data sets: what they hold, from small files in their own layouts; and one clear line where files are missing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST

from prfl import config, data, vision
from prfl.data import DataError, Dataset, Samples, load
from prfl.samples import stratified

RNG = np.random.default_rng(0)


def everything(samples: Samples) -> tuple[Tensor, Tensor]:
    return samples.batch(torch.arange(len(samples)))


def hashed(samples: Samples) -> str:
    return hashlib.sha256(samples.x.numpy().tobytes() + samples.y.numpy().tobytes()).hexdigest()[:16]


def write_idx(path: Path, values: np.ndarray, kind: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">BBBB", 0, 0, kind, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(head + values.astype(">i4" if kind == 12 else np.uint8).tobytes())


def write_mnist(raw: Path, stems: tuple[str, str], labels: tuple[list[int], list[int]]) -> list[np.ndarray]:
    images = [RNG.integers(0, 256, (len(y), 28, 28)) for y in labels]
    for stem, x, y in zip(stems, images, labels, strict=True):
        write_idx(raw / f"{stem}-images-idx3-ubyte", x)
        write_idx(raw / f"{stem}-labels-idx1-ubyte", np.array(y))
    return images


def write_picture(path: Path, size: tuple[int, int], colour: int | tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path, quality=95)


def write_leaf(folder: Path, users: dict[str, tuple[list, list]], file: str = "all_data_0.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in users.items()},
    }
    (folder / file).write_text(json.dumps(content))


def make_mnist(root: Path) -> None:
    write_mnist(root / "mnist/MNIST/raw", ("train", "t10k"), ([5, 0, 4, 1], [7, 2]))


def make_fashion_mnist(root: Path) -> None:
    write_mnist(root / "fashion_mnist/FashionMNIST/raw", ("train", "t10k"), ([9, 0, 3], [2]))


def make_emnist(root: Path) -> None:
    write_mnist(root / "emnist/EMNIST/raw", ("emnist-balanced-train", "emnist-balanced-test"), ([46, 0], [3]))


def make_mnist_by_writer(root: Path) -> None:
    make_mnist(root)
    (root / "mnist_by_writer").mkdir()
    np.savez(root / "mnist_by_writer/writers.npz", writer_ids=np.array([7, 2, 7, 300, 1, 1], np.int16))


def make_femnist(root: Path) -> None:
    pixels = [[i / 255] * 784 for i in range(6)]
    folder = root / "femnist/data"
    write_leaf(folder / "train", {"f0002": (pixels[:2], [3, 61]), "f0001": (pixels[2:3], [0])}, "a.json")
    write_leaf(folder / "train", {"f0003": (pixels[3:5], [10, 10])}, "b.json")
    write_leaf(folder / "test", {"f0002": (pixels[5:], [9])})


def make_tiny_imagenet(root: Path) -> None:
    folder = root / "tiny_imagenet/tiny-imagenet-200"
    for i in range(200):
        write_picture(folder / f"train/n{i:08}/images/n{i:08}_0.JPEG", (64, 64), (i, 0, 200))
    write_picture(folder / "train/n00000001/images/n00000001_1.JPEG", (64, 64), 120)
    for i, colour in enumerate([10, 20, 30]):
        write_picture(folder / f"val/images/val_{i}.JPEG", (64, 64), colour)
    lines = [f"val_{i}.JPEG\tn{label:08}\t0\t0\t9\t9" for i, label in enumerate([1, 0, 199])]
    (folder / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")


def make_tiny_imagenet32(root: Path) -> None:
    (root / "tiny_imagenet32").mkdir()
    np.savez(
        root / "tiny_imagenet32/tiny_imagenet32_20c.npz",
        train_images=np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3),
        train_labels=np.array([1, 0]),
        val_images=np.zeros((1, 32, 32, 3), np.uint8),
        val_labels=np.array([1]),
        wnids=np.array(["n1", "n2"]),
    )


def make_celeba(root: Path) -> None:
    folder = root / "celeba"
    files = [f"{i:06}.jpg" for i in range(1, 7)]
    for i, file in enumerate(files):
        write_picture(folder / "img_align_celeba" / file, (178, 218), (40 * i, 0, 0))
    smiles = ["-1", "1", "1", "-1", "1", "-1"]
    rows = [f"{file} -1  {smile}" for file, smile in zip(files, smiles, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join(["6", "Bald Smiling ", *rows]) + "\n")
    who = [f"{file} {person}" for file, person in zip(files, [30, 4, 30, 200, 30, 5], strict=True)]
    (folder / "identity_CelebA.txt").write_text("\n".join(who) + "\n")
    split = [f"{file} {part}" for file, part in zip(files, [0, 1, 0, 2, 0, 2], strict=True)]
    (folder / "list_eval_partition.txt").write_text("\n".join(split) + "\n")


def make_fsdd(root: Path) -> None:
    (root / "fsdd").mkdir()
    np.savez(
        root / "fsdd/fsdd_logmel.npz",
        features=RNG.integers(0, 256, (4, 40, 64), dtype=np.uint8),
        labels=np.array([1, 2, 3, 4], np.uint8),
        speaker_ids=np.array([0, 5, 1, 5], np.uint8),
        take=np.array([9, 4, 5, 0], np.uint8),
    )


FILES: dict[str, Callable[[Path], None]] = {
    "mnist": make_mnist,
    "fashion_mnist": make_fashion_mnist,
    "emnist": make_emnist,
    "mnist_by_writer": make_mnist_by_writer,
    "femnist": make_femnist,
    "tiny_imagenet": make_tiny_imagenet,
    "tiny_imagenet32": make_tiny_imagenet32,
    "celeba": make_celeba,
    "fsdd": make_fsdd,
}
FOLDERLESS = ("digits", "synthetic")


def check(made: Dataset) -> None:
    for samples in (made.train, made.test):
        x, y = everything(samples)
        assert x.dtype == torch.float32
        assert x.shape == samples.x.shape
        assert x.isfinite().all()
        assert y.dtype == torch.int64
        assert 0 <= int(y.min()) <= int(y.max()) < made.classes
        assert len(samples.mean) == len(samples.std) == x.shape[1]
    assert made.train.x.shape[1:] == made.test.x.shape[1:]
    if made.natural is not None:
        assert made.natural.dtype == torch.int64
        assert len(made.natural) == len(made.train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, make in FILES.items():
        if name != "mnist":  # written by mnist_by_writer
            make(root)
    return root


@pytest.mark.parametrize("name", [*FILES, *FOLDERLESS])
def test_every_set_loads_the_same_twice_without_a_shared_generator(name: str, folder: Path) -> None:
    made = load(name, folder=folder)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.random.get_rng_state().tolist()
    again = data.TABLE[name]().load(folder, False)
    after = random.getstate(), np.random.get_state()[1].tobytes(), torch.random.get_rng_state().tolist()
    check(made)
    assert made.name == name
    assert (hashed(made.train), hashed(made.test)) == (hashed(again.train), hashed(again.test))
    assert before == after


def test_the_table_is_covered() -> None:
    assert set(data.TABLE) == {*FILES, *FOLDERLESS, "cifar10", "cifar100"}


def test_mnist_files_are_read_as_they_are(tmp_path: Path) -> None:
    train, test = write_mnist(tmp_path / "mnist/MNIST/raw", ("train", "t10k"), ([5, 0, 4, 1], [7, 2]))
    made = load("mnist", folder=tmp_path)
    assert torch.equal(made.train.x[:, 0], torch.tensor(train, dtype=torch.uint8))
    assert torch.equal(made.test.x[:, 0], torch.tensor(test, dtype=torch.uint8))
    assert made.train.y.tolist() == [5, 0, 4, 1]
    assert made.test.y.tolist() == [7, 2]
    x, _ = made.train.batch(torch.tensor([2]))
    expected = (torch.tensor(train[2], dtype=torch.float32) / 255 - 0.1307) / 0.3081
    assert torch.allclose(x[0, 0], expected, atol=1e-5)
    assert torch.equal(load("mnist", folder=tmp_path / "mnist").train.x, made.train.x)  # torchvision's root itself


def test_emnist_letters_count_from_zero(tmp_path: Path) -> None:
    write_mnist(tmp_path / "emnist/EMNIST/raw", ("emnist-letters-train", "emnist-letters-test"), ([1, 26], [2]))
    made = load("emnist", {"split": "letters"}, tmp_path)
    assert made.classes == 26
    assert made.train.y.tolist() == [0, 25]


def test_writers_belong_to_the_training_digits(folder: Path) -> None:
    made = load("mnist_by_writer", folder=folder)
    assert made.natural is not None
    assert made.natural.tolist() == [7, 2, 7, 300]


def test_writers_come_from_qmnist_too(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    raw = tmp_path / "mnist_by_writer/QMNIST/raw"
    table = np.array([[5, 0, 2100], [0, 1, 8], [4, 0, 2100], [1, 4, 326]])
    write_idx(raw / "qmnist-train-images-idx3-ubyte", np.zeros((4, 28, 28)))
    write_idx(raw / "qmnist-train-labels-idx2-int", table, kind=12)
    made = load("mnist_by_writer", folder=tmp_path)
    assert made.natural is not None
    assert made.natural.tolist() == [2100, 8, 2100, 326]
    write_idx(raw / "qmnist-train-labels-idx2-int", table[::-1], kind=12)
    with pytest.raises(DataError, match="not those of MNIST"):
        load("mnist_by_writer", folder=tmp_path)


def test_writers_of_other_digits_are_refused(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    (tmp_path / "mnist_by_writer").mkdir()
    np.savez(tmp_path / "mnist_by_writer/writers.npz", writer_ids=np.array([1, 2]))
    with pytest.raises(DataError, match="2 writers for 4 training digits"):
        load("mnist_by_writer", folder=tmp_path)


def test_femnist_is_read_without_loss_and_by_writer(folder: Path) -> None:
    made = load("femnist", folder=folder)
    assert made.natural is not None
    assert made.natural.tolist() == [0, 0, 1, 2, 2]
    assert made.train.y.tolist() == [3, 61, 0, 10, 10]
    assert made.train.x[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert everything(made.test)[0].unique().tolist() == pytest.approx([5 / 255])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.pop("users"), "not a whole LEAF file: 'users'"),
        (lambda c: c["num_samples"].append(3), "2 users but 3 entries"),
        (lambda c: c["num_samples"].reverse(), "user f0002 has 2 x and 2 y, num_samples says 1"),
        (lambda c: c["user_data"].pop("f0001"), "user f0001 has no user_data"),
        (lambda c: c["user_data"]["f0001"]["x"][0].pop(), "user f0001 is not 784 numbers"),
        (lambda c: c["user_data"]["f0001"]["x"][0].__setitem__(5, 2.0), "outside"),
        (lambda c: c["user_data"]["f0001"]["y"].__setitem__(0, 62), "labels go from 3 to 62, expected 0 to 61"),
        (lambda c: c["user_data"]["f0001"]["y"].__setitem__(0, "a"), "not a whole LEAF file"),
    ],
)
def test_inconsistent_leaf_files_are_refused(tmp_path: Path, spoil: Callable[[dict], object], said: str) -> None:
    make_femnist(tmp_path)
    path = tmp_path / "femnist/data/train/a.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said) as error:
        load("femnist", folder=tmp_path)
    assert "\n" not in str(error.value)


def test_tiny_imagenet_takes_the_first_classes_and_its_validation_as_test(folder: Path) -> None:
    made = load("tiny_imagenet", {"classes": 2, "size": 16}, folder)
    assert made.train.x.shape == (3, 3, 16, 16)
    assert made.train.y.tolist() == [0, 1, 1]
    assert made.train.x[2].float().mean().item() == pytest.approx(120, abs=2)  # a grey picture becomes RGB
    assert made.test.y.tolist() == [1, 0]
    assert made.test.x[:, 0, 5, 5].tolist() == pytest.approx([10, 20], abs=2)


def test_tiny_imagenet32_is_channels_first(folder: Path) -> None:
    made = load("tiny_imagenet32", folder=folder)
    assert made.classes == 2
    assert made.train.x[0, :, 0, 1].tolist() == [3, 4, 5]
    assert made.train.y.tolist() == [1, 0]


def test_celeba_labels_smiles_and_knows_celebrities(folder: Path) -> None:
    made = load("celeba", {"size": 8}, folder)
    assert made.natural is not None
    assert made.natural.tolist() == [0, 1, 1, 1]  # celebrities 4 and 30, in the order of their numbers
    assert made.train.y.tolist() == [1, 0, 1, 1]
    assert made.train.x[:, 0, 4, 4].tolist() == pytest.approx([40, 0, 80, 160], abs=4)
    assert made.test.y.tolist() == [0, 0]
    assert len(load("celeba", {"size": 8, "celebrities": 1}, folder).train) == 1
    assert load("celeba", {"size": 8, "attribute": "Bald"}, folder).train.y.tolist() == [0, 0, 0, 0]
    with pytest.raises(DataError, match=r"no attribute 'Smile'.*have Bald, Smiling"):
        load("celeba", {"attribute": "Smile"}, folder)


def test_celeba_in_leaf_layout(tmp_path: Path) -> None:
    own = tmp_path / "celeba/data"
    for i in range(4):
        write_picture(own / f"raw/img_align_celeba/{i}.jpg", (178, 218), (60 * i, 0, 0))
    write_leaf(own / "train", {"77": (["3.jpg", "0.jpg"], [1.0, 0.0]), "5": (["1.jpg"], [1])})
    write_leaf(own / "test", {"77": (["2.jpg"], [0])})
    made = load("celeba", {"size": 4}, tmp_path)
    assert made.natural is not None
    assert made.natural.tolist() == [0, 0, 1]
    assert made.train.y.tolist() == [1, 0, 1]
    assert made.train.x[:, 0, 0, 0].tolist() == pytest.approx([180, 0, 60], abs=4)


def test_fsdd_holds_out_the_first_takes(folder: Path) -> None:
    made = load("fsdd", folder=folder)
    assert made.natural is not None
    assert made.train.y.tolist() == [1, 3]
    assert made.natural.tolist() == [0, 1]
    assert made.test.y.tolist() == [2, 4]


def small_cifar(root: Path) -> type[CIFAR10]:
    """A set in CIFAR's layout, as torchvision's own CIFAR100 is one."""
    folder = root / "small-batches-py"
    folder.mkdir(parents=True)
    rows = np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072)
    contents = {"one": {"data": rows[:2], "labels": [4, 9]}, "two": {"data": rows[2:], "labels": [0]}}
    sums = {}
    for name, content in {**contents, "meta": {"label_names": list("abcdefghij")}}.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    class Small(CIFAR10):
        base_folder = "small-batches-py"
        train_list = [["one", sums["one"]]]  # noqa: RUF012
        test_list = [["two", sums["two"]]]  # noqa: RUF012
        meta = {"filename": "meta", "key": "label_names", "md5": sums["meta"]}  # noqa: RUF012

    return Small


def test_cifar_files_are_read_and_their_checksums_hold(tmp_path: Path) -> None:
    kind = small_cifar(tmp_path / "small")
    train, test = vision.cifar("small", kind, tmp_path, False, 10)
    assert train[0].shape == (2, 3, 32, 32)
    assert train[0].flatten().tolist() == (np.arange(2 * 3072) % 256).tolist()
    assert (train[1].tolist(), test[1].tolist()) == ([4, 9], [0])
    path = tmp_path / "small/small-batches-py/two"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"small-batches-py/two in .* is damaged; delete it") as error:
        vision.cifar("small", kind, tmp_path, False, 10)
    assert "\n" not in str(error.value)


MISSING = {
    "mnist": ("MNIST/raw/train-images-idx3-ubyte", "download: true"),
    "fashion_mnist": ("FashionMNIST/raw/train-images-idx3-ubyte", "download: true"),
    "emnist": ("EMNIST/raw/emnist-balanced-train-images-idx3-ubyte", "download: true"),
    "cifar10": ("cifar-10-batches-py/data_batch_1", "download: true"),
    "cifar100": ("cifar-100-python/train", "download: true"),
    "femnist": ("data/train", "put it there"),
    "tiny_imagenet": ("train", "put it there"),
    "tiny_imagenet32": ("tiny_imagenet32_20c.npz", "put it there"),
    "celeba": ("img_align_celeba", "put it there"),
    "fsdd": ("fsdd_logmel.npz", "put it there"),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_files_are_named_with_what_to_do(name: str, tmp_path: Path) -> None:
    file, advice = MISSING[name]
    with pytest.raises(DataError) as error:
        load(name, folder=tmp_path)
    said = str(error.value)
    assert said.startswith(f"data set {name}: no {file} in {tmp_path / name};")
    assert advice in said
    assert "--data-dir" in said
    assert "\n" not in said
    with pytest.raises(DataError, match=f"data set {name}: no data folder given; .*--data-dir"):
        load(name)


def test_missing_writers_are_named(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    with pytest.raises(DataError, match=r"data set mnist_by_writer: no writers.npz in .*download: true"):
        load("mnist_by_writer", folder=tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 10, 500])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_cut_idx_files_are_named(file: str, keep: int, tmp_path: Path) -> None:
    make_mnist(tmp_path)
    path = tmp_path / "mnist/MNIST/raw" / file
    path.write_bytes(path.read_bytes()[: min(keep, path.stat().st_size - 1)])
    with pytest.raises(DataError, match=f"data set mnist: MNIST/raw/{file} in .* is damaged; delete it") as error:
        load("mnist", folder=tmp_path)
    assert "\n" not in str(error.value)


def test_idx_files_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    raw = tmp_path / "mnist/MNIST/raw"
    write_idx(raw / "train-labels-idx1-ubyte", np.array([1, 2, 3]))
    with pytest.raises(DataError, match="4 images and 3 labels"):
        load("mnist", folder=tmp_path)
    write_idx(raw / "train-labels-idx1-ubyte", np.array([1, 2, 3, 10]))
    with pytest.raises(DataError, match="labels go from 1 to 10, expected 0 to 9"):
        load("mnist", folder=tmp_path)


@pytest.mark.parametrize("name", ["tiny_imagenet32", "fsdd"])
def test_damaged_npz_files_are_named(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path)
    path = next((tmp_path / name).glob("*.npz"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"data set {name}: .*npz is damaged"):
        load(name, folder=tmp_path)
    np.savez(path, other=np.zeros(2))
    with pytest.raises(DataError, match=f"data set {name}: .*has no array .*; have other"):
        load(name, folder=tmp_path)
    path.write_bytes(b"not an archive at all")
    with pytest.raises(DataError, match=f"data set {name}: .*npz is damaged"):
        load(name, folder=tmp_path)


def test_an_npz_of_pickles_is_refused(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    (tmp_path / "mnist_by_writer").mkdir()
    np.savez(tmp_path / "mnist_by_writer/writers.npz", writer_ids=np.array([{}] * 4, object))
    with pytest.raises(DataError, match="pickle"):
        load("mnist_by_writer", folder=tmp_path)


def test_damaged_and_missing_pictures_are_named(tmp_path: Path) -> None:
    make_celeba(tmp_path)
    path = tmp_path / "celeba/img_align_celeba/000002.jpg"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(DataError, match=r"000002.jpg is damaged"):
        load("celeba", folder=tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"no picture .*000002.jpg"):
        load("celeba", folder=tmp_path)


def test_damaged_lists_are_named(tmp_path: Path) -> None:
    make_celeba(tmp_path)
    path = tmp_path / "celeba/identity_CelebA.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "000002.jpg", *lines[2:]]))
    with pytest.raises(DataError, match=r"identity_CelebA.txt: line 2 has 1 columns"):
        load("celeba", folder=tmp_path)
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(DataError, match=r"000001.jpg has no attributes or no identity"):
        load("celeba", folder=tmp_path)


def test_a_tiny_imagenet_with_too_few_classes_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="has 200 class folders, not 201"):
        load("tiny_imagenet", {"classes": 201}, folder)


def test_a_download_that_fails_says_so(tmp_path: Path) -> None:
    class Offline(MNIST):
        mirrors = ["http://127.0.0.1:9/"]  # noqa: RUF012

    with pytest.raises(DataError, match=r"set mnist: the download into .*mnist failed: Error downloading") as error:
        vision.idx("mnist", Offline, ("Offline/raw/train", "Offline/raw/t10k"), tmp_path, True, 10)
    assert "\n" not in str(error.value)


def test_what_is_there_is_not_downloaded(tmp_path: Path) -> None:
    class Offline(MNIST):
        mirrors = ["http://127.0.0.1:9/"]  # noqa: RUF012

    write_mnist(tmp_path / "mnist/Offline/raw", ("train", "t10k"), ([5, 0], [7]))
    train, _ = vision.idx("mnist", Offline, ("Offline/raw/train", "Offline/raw/t10k"), tmp_path, True, 10)
    assert train[1].tolist() == [5, 0]


def test_a_packed_file_of_the_right_checksum_is_unpacked_by_download(tmp_path: Path) -> None:
    raw = tmp_path / "mnist/Packed/raw"
    write_mnist(raw, ("train", "t10k"), ([5, 0], [7]))
    sums = []
    for path in sorted(raw.iterdir()):
        packed = raw / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
        sums.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))

    class Packed(MNIST):
        mirrors = ["http://127.0.0.1:9/"]  # noqa: RUF012
        resources = sums

    train, test = vision.idx("mnist", Packed, ("Packed/raw/train", "Packed/raw/t10k"), tmp_path, True, 10)
    assert (train[1].tolist(), test[1].tolist()) == ([5, 0], [7])


def test_unknown_names_and_options_say_what_exists() -> None:
    with pytest.raises(ValueError, match="no 'mnits'; have celeba, cifar10"):
        load("mnits")
    with pytest.raises(ValueError, match="data set synthetic: no option 'class'; have classes, shape"):
        load("synthetic", {"class": 3})
    with pytest.raises(ValueError, match="data set digits: no option 'x'; have none"):
        load("digits", {"x": 3})


@pytest.mark.parametrize(
    "make",
    [
        partial(data.synthetic, classes=1),
        partial(data.synthetic, test=9),
        partial(data.synthetic, shape=(1, 0, 2)),
        partial(data.synthetic, spread=-1.0),
        partial(data.emnist, split="letter"),
        partial(data.tiny_imagenet, size=0),
        partial(data.celeba, celebrities=-1),
    ],
)
def test_options_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be|needs|have"):
        make()


def test_options_come_from_yaml_fields() -> None:
    made = config.part("data set", {"name": "synthetic", "shape": [3, 4, 4], "classes": 2}, data.TABLE)
    assert made == data.synthetic(classes=2, shape=(3, 4, 4))


def test_digits_have_a_fixed_stratified_test_split() -> None:
    made = load("digits")
    assert (len(made.train), len(made.test), made.classes) == (1438, 359, 10)
    assert (hashed(made.train), hashed(made.test)) == ("a4e25f8cf44a10ce", "7c870e718477cc7a")
    total = made.train.y.bincount() + made.test.y.bincount()
    assert ((made.test.y.bincount() - 0.2 * total).abs() < 1).all()
    x, _ = everything(made.train)
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.std().item() == pytest.approx(1, abs=0.01)


def test_synthetic_classes_are_balanced_and_harder_when_spread() -> None:
    def accuracy(spread: float) -> float:
        made = data.synthetic(classes=4, shape=(2, 3, 3), samples=400, test=400, spread=spread).load()
        assert made.train.y.bincount().tolist() == [100] * 4
        assert everything(made.train)[0].std().item() == pytest.approx(1, abs=0.15)
        centres = torch.stack([made.train.x[made.train.y == c].mean(dim=0).flatten() for c in range(4)])
        nearest = torch.cdist(made.test.x.flatten(1), centres).argmin(dim=1)
        return float((nearest == made.test.y).float().mean())

    assert accuracy(0.1) == 1.0
    assert 0.3 < accuracy(4.0) < 0.9
    assert hashed(data.synthetic(seed=1).load().train) != hashed(data.synthetic(seed=2).load().train)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_is_normalised_by_channel_and_leaves_the_samples(dtype: torch.dtype) -> None:
    x = torch.tensor([[[[10]], [[20]]], [[[30]], [[40]]]], dtype=dtype)
    samples = Samples(x, torch.tensor([3, 4]), mean=(10.0, 0.0), std=(2.0, 10.0))
    batch, y = samples.batch(torch.tensor([1, 0, 1]))
    assert batch.flatten(1).tolist() == [[10, 4], [0, 2], [10, 4]]
    assert batch.dtype == torch.float32
    assert y.tolist() == [4, 3, 4]
    batch.zero_()
    assert torch.equal(samples.x, torch.tensor([[[[10]], [[20]]], [[[30]], [[40]]]], dtype=dtype))
    assert samples.subset(torch.tensor([1])).y.tolist() == [4]
    assert samples.subset(torch.tensor([1])).std == (2.0, 10.0)


def test_samples_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="got \\(2, 1, 1, 1\\) and \\(3,\\)"):
        Samples(torch.zeros(2, 1, 1, 1), torch.zeros(3, dtype=torch.int64))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=200), st.floats(0.01, 0.99), st.integers(0, 100))
def test_stratified_gives_every_class_its_share(labels: list[int], share: float, seed: int) -> None:
    y = torch.tensor(labels)
    rest, held = stratified(y, share, seed)
    assert torch.equal(torch.cat([rest, held]).sort().values, torch.arange(len(y)))
    assert len(held) == round(share * len(y))
    actual = len(held) / len(y)
    for c in y.unique():
        assert abs(int((y[held] == c).sum()) - actual * int((y == c).sum())) < 1 + 1e-9


def test_validation_is_carved_out_by_the_seed() -> None:
    whole = data.synthetic(samples=200).load()
    whole = replace(whole, natural=torch.arange(200))
    rest, held = data.split_validation(whole, 0.1, 3)
    assert (len(rest.train), len(held)) == (180, 20)
    assert held.y.bincount().tolist() == [2] * 10
    assert rest.natural is not None
    assert torch.equal(whole.train.x[rest.natural], rest.train.x)
    assert rest.test is whole.test
    assert hashed(data.split_validation(whole, 0.1, 3)[1]) == hashed(held)
    assert hashed(data.split_validation(whole, 0.1, 4)[1]) != hashed(held)
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="in \\(0, 1\\)"):
            data.split_validation(whole, share, 0)
    with pytest.raises(ValueError, match="leaves one side empty"):
        data.split_validation(whole, 0.001, 0)


REAL = {
    "mnist": (60_000, 10_000, 10, None),
    "fashion_mnist": (60_000, 10_000, 10, None),
    "mnist_by_writer": (60_000, 10_000, 10, 539),
    "cifar10": (50_000, 10_000, 10, None),
    "cifar100": (50_000, 10_000, 100, None),
    "tiny_imagenet32": (4_000, 1_000, 20, None),
    "fsdd": (2_700, 300, 10, 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_real_sets_where_they_are(name: str) -> None:
    """`PRFL_DATA_DIR` names a folder of real data sets; what it lacks is skipped."""
    root = os.environ.get("PRFL_DATA_DIR")
    if root is None or not (Path(root) / name).exists():
        pytest.skip("not in PRFL_DATA_DIR")
    made = load(name, folder=Path(root))
    check(made)
    makers = None if made.natural is None else len(made.natural.unique())
    assert (len(made.train), len(made.test), made.classes, makers) == REAL[name]
    x, _ = everything(made.train)
    assert x.mean().item() == pytest.approx(0, abs=0.06)
    assert x.std().item() == pytest.approx(1, abs=0.11)
