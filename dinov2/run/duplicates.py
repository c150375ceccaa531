"""Images that occur twice, in one set or in several: files by a hash of their content, other images by their pixels.

Only files of equal size are read. An image that has no file of its own, such as a page of a stack, counts by its
pixels, if these were looked at.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.datasets.extended import image_path
from dinov2.run.workers import run_in_workers

_BATCH = 256  # files that a worker looks at between two messages
_CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class FilesOfSet:
    """The files of all images of a set."""

    size: np.ndarray  # [n] int64, bytes; -1 for an image without a file of its own

    @property
    def has_none(self) -> np.ndarray:
        """[n] bool: the image has no file of its own."""
        return self.size < 0


def find_files(dataset: Any, *, num_workers: int, description: str) -> FilesOfSet:
    """Find the sizes of a set's files.

    Raises:
        DatasetError: a worker was killed.
    """
    sizes, names = np.empty(len(dataset), dtype=np.int64), np.empty(len(dataset), dtype=np.uint64)
    place = 0
    for batch in run_in_workers(
        _FileSizes(dataset),
        np.arange(len(dataset)),
        batch=_BATCH,
        num_workers=num_workers,
        description=description,
    ):
        sizes[place : place + len(batch)], names[place : place + len(batch)] = zip(*batch, strict=True)
        place += len(batch)
    _, first, counts = np.unique(names, return_inverse=True, return_counts=True)
    sizes[counts[first] > 1] = -1
    return FilesOfSet(sizes)


def content_keys(
    datasets: Sequence[Any], files: Sequence[FilesOfSet], pixels: Sequence[np.ndarray], *, num_workers: int
) -> list[np.ndarray]:
    """Give a number to each image that may occur twice; equal numbers mean equal content.

    Args:
        datasets: the sets.
        files: of each set.
        pixels: for each set [n] uint64, hashes of the pixels; 0 if not known.
        num_workers: processes.

    Returns:
        For each set [n] uint64; 0 where the image is known to be the only one, or nothing is known.

    Raises:
        DatasetError: a worker was killed.
    """
    size, count = np.unique(np.concatenate([one.size for one in files]), return_counts=True)
    repeated = size[(count > 1) & (size > 0)]
    keys = []
    for dataset, one, known in zip(datasets, files, pixels, strict=True):
        found = np.where(one.has_none, known, 0).astype(np.uint64)
        chosen = np.flatnonzero(np.isin(one.size, repeated))
        place = 0
        for batch in run_in_workers(
            _FileHashes(dataset), chosen, batch=_BATCH, num_workers=num_workers, description="comparing files"
        ):
            found[chosen[place : place + len(batch)]] = batch
            place += len(batch)
        keys.append(found)
    return keys


@dataclass(frozen=True)
class Repeats:
    """Images that are in a set more than once."""

    num_surplus: int  # images that could go without any content being lost
    groups: list[list[int]]  # indices of images that are the same, of the first groups


def find_repeats(keys: np.ndarray, *, max_groups: int) -> Repeats:
    """Find equal keys that are not 0; [n] uint64 given."""
    rows = np.flatnonzero(keys)
    rows = rows[np.argsort(keys[rows], kind="stable")]
    starts = np.flatnonzero(np.append(True, keys[rows[1:]] != keys[rows[:-1]])[: len(rows)])
    lengths = np.diff(np.append(starts, len(rows)))
    starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    first = np.argsort(rows[starts])[:max_groups]
    groups = [
        rows[start : start + length].tolist() for start, length in zip(starts[first], lengths[first], strict=True)
    ]
    return Repeats(int((lengths - 1).sum()), groups)


def find_common(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find images that two sets have in common: indices in `one`, rising, and of the first equal image in `other`."""
    known, place = np.unique(other, return_index=True)
    where = np.searchsorted(known, one).clip(max=len(known) - 1)
    rows = np.flatnonzero((one != 0) & (known[where] == one))
    return rows, place[where[rows]]


class _FileSizes(Dataset[tuple[int, int]]):
    """Size of an image's file, -1 without one, and a hash of its name."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, int]:
        path = image_path(self.dataset, index)
        name = blake2b(os.fsencode(path), digest_size=8)
        return os.path.getsize(path) if os.path.isfile(path) else -1, int.from_bytes(name.digest(), "little")


class _FileHashes(Dataset[int]):
    """Hash of the content of an image's file; 0 if it cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> int:
        state = blake2b(digest_size=8)
        try:
            with open(image_path(self.dataset, index), "rb") as file:
                while chunk := file.read(_CHUNK):
                    state.update(chunk)
        except OSError:
            return 0
        return int.from_bytes(state.digest(), "little")
