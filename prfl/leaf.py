"""LEAF's JSON layout (Caldas et al. 2018), users with their samples in files of a hundred users; and FEMNIST in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prfl.archives import DataError, Split, checked, dataset, one_line, place
from prfl.samples import Dataset

User = tuple[str, list[Any], list[int]]
"""Name, samples (pixels in [0, 1] or file names) and labels."""


@dataclass(frozen=True)
class femnist:
    """FEMNIST: 62 digits and letters by 3,597 writers, 28x28, values 0 to 1, not normalised.

    LEAF's own `preprocess.sh` makes it; it is not downloaded here.
    """

    def load(self, folder: Path | None = None, download: bool = False) -> Dataset:
        """From `data/train/*.json` and `data/test/*.json`; writers are numbered in the order of the files."""
        root = place("femnist", folder, ["data/train", "data/test"], None) / "data"
        train, owners = grey("femnist", root / "train", 28, 62)
        test, _ = grey("femnist", root / "test", 28, 62)
        return dataset("femnist", (train, test), 62, ((0.0,), (1.0,)), numbered(owners))


def users(name: str, folder: Path) -> Iterator[User]:
    """Every user of the JSON files in `folder`, in the order of file names and of the files. Raises DataError."""
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"data set {name}: no .json file in {folder}; LEAF's preprocess.sh writes them there")
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            yield from _users(content)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise DataError(f"data set {name}: {path} is not a whole LEAF file: {one_line(error)}") from None


def grey(name: str, folder: Path, side: int, classes: int) -> tuple[Split, list[str]]:
    """All users' square one-channel images, and the user of every sample. Raises DataError.

    LEAF divides eight-bit pixels by 255, hence uint8 gives them back without loss.
    """
    xs, ys, owners = [], [], []
    for user, x, y in users(name, folder):
        try:
            pixels = np.asarray(x, dtype=np.float32).reshape(len(y), 1, side, side)
        except (ValueError, TypeError):
            raise DataError(
                f"data set {name}: {folder}: an image of user {user} is not {side * side} numbers"
            ) from None
        if not ((pixels >= 0) & (pixels <= 1)).all():
            raise DataError(f"data set {name}: {folder}: an image of user {user} has pixels outside [0, 1]")
        xs.append(torch.from_numpy((pixels * 255).round().astype(np.uint8)))
        ys += y
        owners += [user] * len(y)
    return checked(name, torch.cat(xs), torch.tensor(ys, dtype=torch.int64), classes), owners


def numbered(owners: list[str]) -> Tensor:
    """Names as numbers, int64, in the order in which they first come."""
    number = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    return torch.tensor([number[owner] for owner in owners], dtype=torch.int64)


def _users(content: Any) -> Iterator[User]:
    listed, sizes, data = content["users"], content["num_samples"], content["user_data"]
    if len(listed) != len(sizes):
        raise ValueError(f"{len(listed)} users but {len(sizes)} entries in num_samples")
    for user, size in zip(listed, sizes, strict=True):
        if user not in data:
            raise ValueError(f"user {user} has no user_data")
        x, y = data[user]["x"], data[user]["y"]
        if not len(x) == len(y) == size:
            raise ValueError(f"user {user} has {len(x)} x and {len(y)} y, num_samples says {size}")
        yield user, x, [int(label) for label in y]
