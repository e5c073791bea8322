"""Files of data sets: where they lie, and what they hold as tensors; one clear line where something is wrong."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from prfl.samples import Dataset, Samples

Split = tuple[Tensor, Tensor]
"""Raw images, uint8 (N, C, H, W), and their labels, int64 (N,)."""

Normal = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation of every channel, as shares of 255."""

Array = np.ndarray[Any, Any]


class DataError(ValueError):
    """A data set cannot be loaded; the message is one line: which set, where, what is wrong, what to do."""


def place(
    name: str, folder: Path | None, files: Sequence[str], download: bool | None, also: Sequence[str] = ()
) -> Path:
    """The folder that holds all `files`: `folder/name`, `folder` itself, or one of `also` below it.

    download: True gives `folder/name` where nothing is found; None says that the set is not fetched by prfl.
    """
    if folder is None:
        fetch = "" if download is None else ", or with `download: true` to fetch them there"
        raise DataError(
            f"data set {name}: no data folder given; pass --data-dir DIR with its files in DIR/{name}{fetch}"
        )
    roots = [folder / name, folder, *(folder / other for other in also)]
    for root in roots:
        if all((root / file).exists() for file in files):
            return root
    if download:
        return roots[0]
    gone = next(file for file in files if not (roots[0] / file).exists())
    fetch = "put it there, or " if download is None else "set `download: true` to fetch it, or "
    raise DataError(
        f"data set {name}: no {gone} in {roots[0]}; {fetch}point --data-dir at the folder that holds {name}"
    )


def arrays(name: str, path: Path, keys: Sequence[str]) -> list[Array]:
    """Arrays of an .npz file, by key; nothing is unpickled. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            have = list(file)
            found = {key: file[key] for key in keys if key in have}
    except (OSError, EOFError, ValueError, TypeError, BadZipFile, zlib.error) as error:
        raise DataError(f"data set {name}: {path} is damaged: {one_line(error)}; fetch it anew") from None
    if gone := [key for key in keys if key not in found]:
        raise DataError(f"data set {name}: {path} has no array {gone[0]!r}; have {', '.join(have)}")
    return [found[key] for key in keys]


def checked(name: str, x: Tensor, y: Tensor, classes: int) -> Split:
    """The split, where images and labels fit each other. Raises DataError."""
    if len(x) != len(y) or not len(y):
        raise DataError(f"data set {name}: {len(x)} images and {len(y)} labels; its files do not belong together")
    if x.dtype != torch.uint8:
        raise DataError(f"data set {name}: images must be uint8, got {x.dtype}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise DataError(f"data set {name}: labels go from {y.min()} to {y.max()}, expected 0 to {classes - 1}")
    return x, y


def dataset(
    name: str, splits: tuple[Split, Split], classes: int, normal: Normal, natural: Tensor | None = None
) -> Dataset:
    """Of the training and the test split."""
    mean, std = (tuple(255 * value for value in values) for values in normal)
    train, test = (Samples(x, y, mean, std) for x, y in splits)
    return Dataset(name, train, test, classes, natural)


def labels(y: Array) -> Tensor:
    """Integers as labels, int64."""
    return torch.from_numpy(y.astype(np.int64))


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
