"""The sets that torchvision knows: MNIST and its kin, CIFAR; fetched, read and checked through torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal
from urllib.error import URLError

import torch
from torch import Tensor

from prfl.archives import DataError, Split, arrays, checked, dataset, labels, one_line, place
from prfl.samples import Dataset


@dataclass(frozen=True)
class mnist:
    """MNIST (LeCun et al. 1998): 60,000 + 10,000 digits, 28x28."""

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `MNIST/raw`, torchvision's layout."""
        from torchvision.datasets import MNIST

        splits = idx("mnist", MNIST, ("MNIST/raw/train", "MNIST/raw/t10k"), folder, download, 10)
        return dataset("mnist", splits, 10, ((0.1307,), (0.3081,)))


@dataclass(frozen=True)
class fashion_mnist:
    """Fashion-MNIST (Xiao et al. 2017): 60,000 + 10,000 pieces of clothing, 28x28."""

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `FashionMNIST/raw`, torchvision's layout."""
        from torchvision.datasets import FashionMNIST

        stems = "FashionMNIST/raw/train", "FashionMNIST/raw/t10k"
        splits = idx("fashion_mnist", FashionMNIST, stems, folder, download, 10)
        return dataset("fashion_mnist", splits, 10, ((0.2860,), (0.3530,)))


@dataclass(frozen=True)
class emnist:
    """EMNIST (Cohen et al. 2017): digits and letters, 28x28, transposed as in its files."""

    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced"

    def __post_init__(self) -> None:
        if self.split not in _EMNIST:
            raise ValueError(f"emnist: no split {self.split!r}; have {', '.join(_EMNIST)}")

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `EMNIST/raw`, torchvision's layout; the labels of `letters` are 0 to 25 (1 to 26 in its files)."""
        from torchvision.datasets import EMNIST

        classes, first = _EMNIST[self.split], int(self.split == "letters")
        stems = f"EMNIST/raw/emnist-{self.split}-train", f"EMNIST/raw/emnist-{self.split}-test"
        splits = idx("emnist", partial(EMNIST, split=self.split), stems, folder, download, classes, first)
        return dataset("emnist", splits, classes, ((0.1736,), (0.3317,)))


@dataclass(frozen=True)
class cifar10:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 photographs, 3x32x32."""

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `cifar-10-batches-py`, torchvision's layout; checksums must hold."""
        from torchvision.datasets import CIFAR10

        normal = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        return dataset("cifar10", cifar("cifar10", CIFAR10, folder, download, 10), 10, normal)


@dataclass(frozen=True)
class cifar100:
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 photographs, 3x32x32, 100 fine labels."""

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `cifar-100-python`, torchvision's layout; checksums must hold."""
        from torchvision.datasets import CIFAR100

        normal = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
        return dataset("cifar100", cifar("cifar100", CIFAR100, folder, download, 100), 100, normal)


@dataclass(frozen=True)
class mnist_by_writer:
    """MNIST with the NIST writer of every training digit (Yadav & Bottou 2019): 539 writers, 19 to 131 digits each.

    Writers come from `writers.npz` (`writer_ids`, the training digits first, in MNIST's order), or from QMNIST in
    torchvision's layout, which is what a download fetches.
    """

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """MNIST from `folder/mnist`, writers from `folder/mnist_by_writer`."""
        name, given = "mnist_by_writer", mnist().load(folder, download)
        own = Path(folder or "") / name
        if not (own / "writers.npz").exists() and (download or (own / "QMNIST").exists()):
            writers = _qmnist_writers(folder, download, given.train.y)
        else:
            path = place(name, folder, ["writers.npz"], download) / "writers.npz"
            writers = labels(arrays(name, path, ["writer_ids"])[0])[: len(given.train)]
        if len(writers) != len(given.train):
            raise DataError(f"data set {name}: {len(writers)} writers for {len(given.train)} training digits")
        return replace(given, name=name, natural=writers)


def idx(
    name: str,
    make: Callable[..., Any],
    stems: tuple[str, str],
    folder: Path | None,
    download: bool,
    classes: int,
    first: int = 0,
) -> tuple[Split, Split]:
    """Training and test split of a set of the MNIST family. Raises DataError.

    make: torchvision's class. stems: the beginnings of both splits' files. first: the smallest label in the files.
    """
    files = {f"{stem}-{kind}": None for stem in stems for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")}
    return _both(name, make, files, folder, download, classes, first)


def cifar(name: str, make: Any, folder: Path | None, download: bool, classes: int) -> tuple[Split, Split]:
    """Training and test split of torchvision's class CIFAR10, CIFAR100 or one derived from them. Raises DataError."""
    listed = [*make.train_list, *make.test_list, (make.meta["filename"], make.meta["md5"])]
    return _both(name, make, {f"{make.base_folder}/{file}": md5 for file, md5 in listed}, folder, download, classes)


def fetched(
    name: str,
    sets: Sequence[Callable[..., Any]],
    files: Mapping[str, str | None],
    folder: Path | None,
    download: bool,
) -> list[Any]:
    """torchvision's data sets, made with `root` and `download`.

    files: what they need, as paths below the root, each with its MD5 where torchvision knows it. Raises DataError.
    """
    root = place(name, folder, list(files), download)
    try:
        return [make(root=root, download=download) for make in sets]
    except _BROKEN as error:
        if download and (isinstance(error, URLError) or not all((root / file).exists() for file in files)):
            raise DataError(f"data set {name}: the download into {root} failed: {one_line(error)}") from None
        bad = next((file for file, md5 in files.items() if not _whole(root / file, md5)), None)
        what = f"{bad} in {root} is damaged" if bad else f"cannot read {root}: {one_line(error)}"
        raise DataError(f"data set {name}: {what}; delete it and set `download: true` to fetch it anew") from None


def _both(
    name: str,
    make: Callable[..., Any],
    files: Mapping[str, str | None],
    folder: Path | None,
    download: bool,
    classes: int,
    first: int = 0,
) -> tuple[Split, Split]:
    def split(given: Any) -> Split:
        x, y = torch.as_tensor(given.data), torch.as_tensor(given.targets, dtype=torch.int64)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        return checked(name, x, y - first, classes)

    train, test = fetched(name, [partial(make, train=True), partial(make, train=False)], files, folder, download)
    return split(train), split(test)


def _qmnist_writers(folder: Path | None, download: bool, y: Tensor) -> Tensor:
    """Column 2 of QMNIST's labels, whose first 60,000 digits are MNIST's."""
    from torchvision.datasets import QMNIST

    name, make = "mnist_by_writer", partial(QMNIST, what="train", compat=False)
    files = [f"QMNIST/raw/qmnist-train-{file}" for file in ("images-idx3-ubyte", "labels-idx2-int")]
    table: Tensor = fetched(name, [make], dict.fromkeys(files), folder, download)[0].targets
    if not torch.equal(table[:, 0], y):
        raise DataError(f"data set {name}: the digits of QMNIST are not those of MNIST in its order; fetch both anew")
    return table[:, 2].clone()


def _whole(path: Path, md5: str | None) -> bool:
    """By its checksum, or, for the idx files of the MNIST family, by the size that its header tells."""
    from torchvision.datasets.utils import check_integrity

    if md5 is not None:
        return bool(check_integrity(path, md5))
    raw = path.read_bytes()
    kind, axes = (raw[2], raw[3]) if len(raw) > 3 else (0, 0)
    sizes = [int.from_bytes(raw[4 * i + 4 : 4 * i + 8], "big") for i in range(axes)]
    return kind in _ITEM and len(raw) == 4 + 4 * axes + _ITEM[kind] * prod(sizes)


_EMNIST = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}
_ITEM = {8: 1, 12: 4}  # bytes of an idx file's items by their type code
_BROKEN = (OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError, EOFError, UnpicklingError)
