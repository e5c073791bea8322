"""Data sets kept as folders of pictures: Tiny-ImageNet and CelebA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from prfl import leaf
from prfl.archives import DataError, Normal, Split, checked, dataset, one_line, place
from prfl.samples import Dataset

IMAGENET: Normal = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Portrait = tuple[Path, int, str]
"""Picture, label and celebrity."""


@dataclass(frozen=True)
class tiny_imagenet:
    """Tiny-ImageNet: 200 classes of 500 + 50 photographs, 64x64; its labelled validation folder is the test split.

    `classes`: the first so many by wnid. It is not downloaded here.
    """

    size: int = 64
    classes: int = 200

    def __post_init__(self) -> None:
        if self.size < 1 or self.classes < 2:
            raise ValueError(f"tiny_imagenet: needs size 1 and classes 2 or more, got {self.size} and {self.classes}")

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `train/WNID/images/*.JPEG` and `val/`; the whole set takes 1.4 GB of memory at 64x64."""
        name, listing, unpacked = "tiny_imagenet", "val/val_annotations.txt", "tiny-imagenet-200"
        root = place(name, folder, ["train", listing], None, [f"{name}/{unpacked}", unpacked])
        wnids = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())[: self.classes]
        if len(wnids) < self.classes:
            raise DataError(f"data set {name}: {root / 'train'} has {len(wnids)} class folders, not {self.classes}")
        label = {wnid: i for i, wnid in enumerate(wnids)}
        images = {wnid: sorted((root / "train" / wnid / "images").glob("*.JPEG")) for wnid in wnids}
        if bare := [wnid for wnid in wnids if not images[wnid]]:
            raise DataError(f"data set {name}: no .JPEG in {root / 'train' / bare[0] / 'images'}; unpack the set anew")
        train = [(path, label[wnid]) for wnid in wnids for path in images[wnid]]
        rows = _rows(name, root / listing, 2)
        test = [(root / "val" / "images" / row[0], label[row[1]]) for row in rows if row[1] in label]
        splits = _labelled(name, train, self.size, self.classes), _labelled(name, test, self.size, self.classes)
        return dataset(name, splits, self.classes, IMAGENET)


@dataclass(frozen=True)
class celeba:
    """CelebA (Liu et al. 2015): one attribute as the label, and the celebrity of every picture. LEAF's task is Smiling.

    size: sides after resizing, 84 as in LEAF. celebrities: at most so many in each split; all of them (0) take 4 GB of
    memory at 84x84. It is not downloaded here.
    """

    attribute: str = "Smiling"
    size: int = 84
    celebrities: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.celebrities < 0:
            raise ValueError(f"celeba: needs size 1 and celebrities 0 or more, got {self.size} and {self.celebrities}")

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From torchvision's layout or, where `data/train` lies in the folder, from LEAF's.

        torchvision's is `img_align_celeba` and the lists of attributes, identities and splits; the official train and
        validation splits together are the training split. LEAF's is `data/train/*.json`, `data/test/*.json` with the
        labels that LEAF was told to take, and the pictures in `data/raw/img_align_celeba`.
        """
        own = Path(folder or "") / "celeba" / "data"
        if (own / "train").is_dir():
            splits = [_leaf(own, "train"), _leaf(own, "test")]
        else:
            splits = _listed(folder, self.attribute)
        train, test = (_limited(split, self.celebrities) for split in splits)
        made = [_labelled("celeba", [row[:2] for row in split], self.size, 2) for split in (train, test)]
        natural = leaf.numbered([who for _, _, who in train])
        return dataset("celeba", (made[0], made[1]), 2, ((0.5,) * 3, (0.5,) * 3), natural)


def decode(name: str, paths: Sequence[Path], size: int) -> Tensor:
    """RGB pictures resized to size x size (bilinear), uint8 (N, 3, size, size). Raises DataError."""
    out = np.empty((len(paths), 3, size, size), np.uint8)
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                sized = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            out[i] = np.asarray(sized).transpose(2, 0, 1)
        except FileNotFoundError:
            raise DataError(f"data set {name}: no picture {path}; unpack the set anew") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"data set {name}: {path} is damaged: {one_line(error)}; unpack the set anew") from None
    return torch.from_numpy(out)


def _leaf(data: Path, split: str) -> list[Portrait]:
    pictures = data / "raw" / "img_align_celeba"
    users = leaf.users("celeba", data / split)
    return [(pictures / file, label, who) for who, x, y in users for file, label in zip(x, y, strict=True)]


def _listed(folder: Path | None, attribute: str) -> list[list[Portrait]]:
    attributes, identities, splits = "list_attr_celeba.txt", "identity_CelebA.txt", "list_eval_partition.txt"
    root = place("celeba", folder, ["img_align_celeba", attributes, identities, splits], None)
    names = next(_rows("celeba", root / attributes, 1, skip=1), [])
    if attribute not in names:
        raise DataError(f"data set celeba: no attribute {attribute!r} in {root / attributes}; have {', '.join(names)}")
    column = names.index(attribute) + 1
    label = {row[0]: int(row[column] == "1") for row in _rows("celeba", root / attributes, 1 + len(names), skip=2)}
    who = {row[0]: row[1] for row in _rows("celeba", root / identities, 2)}
    split = {row[0]: row[1] for row in _rows("celeba", root / splits, 2)}
    if gone := sorted(split.keys() - (label.keys() & who.keys())):
        raise DataError(f"data set celeba: {gone[0]} has no attributes or no identity in {root}; fetch the lists anew")
    by_celebrity = sorted(split, key=lambda file: (len(who[file]), who[file], file))
    return [
        [(root / "img_align_celeba" / f, label[f], who[f]) for f in by_celebrity if (split[f] == "2") == test]
        for test in (False, True)
    ]


def _limited(split: Sequence[Portrait], celebrities: int) -> list[Portrait]:
    kept = set(list(dict.fromkeys(who for _, _, who in split))[: celebrities or None])
    return [row for row in split if row[2] in kept]


def _labelled(name: str, rows: Sequence[tuple[Path, int]], size: int, classes: int) -> Split:
    y = torch.tensor([label for _, label in rows], dtype=torch.int64)
    return checked(name, decode(name, [path for path, _ in rows], size), y, classes)


def _rows(name: str, path: Path, columns: int, skip: int = 0) -> Iterator[list[str]]:
    """A text table's rows after `skip` lines, split at white space, each with at least so many columns."""
    with path.open(errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            row = line.split()
            if number > skip and row:
                if len(row) < columns:
                    raise DataError(f"data set {name}: {path}: line {number} has {len(row)} columns, not {columns}")
                yield row
