"""`ImageFolder`: a folder of images of any depth; the first folder level, if there is one, gives the labels.

Dataset string: `ImageFolder:root=photos`, with `split=train` or `split=val` for two disjoint parts of one folder.
"""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.errors import DatasetError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm")
_NUM_PROBES = 100  # images tried, at most, before a folder counts as unreadable


class ImageFolder(ExtendedVisionDataset):
    """All images below a folder, in the order of their paths.

    Files are chosen by extension in any case; hidden files and folders are left out. The names of the folders right
    below `root` are the classes; an image that lies in `root` itself has no label. A link may point to another place
    below `root`, not out of it.

    Args:
        root: the folder; `~` is the home folder.
        options: arguments of `ExtendedVisionDataset`. An image belongs to a split by a hash of its path below `root`.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: the folder is missing, or holds no image that can be read.
    """

    def __init__(self, *, root: str, **options: Any) -> None:
        super().__init__(**options)
        self.root = os.path.expanduser(root)
        files = _list_images(self.root)
        self._class_names, labels = _classes(files)
        everything = self.split == "all"
        keep = None if everything else self.own_rows(files[index] for index in range(len(files)))
        self._files = files if keep is None else files.take(keep)
        self._labels = labels if keep is None or labels is None else labels[keep]
        self._require_a_readable_image()

    def __len__(self) -> int:
        return len(self._files)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._files[index]))

    def get_image_data(self, index: int) -> bytes:
        return Path(self.path(index)).read_bytes()

    def get_target(self, index: int) -> int | None:
        if self._labels is None or self._labels[index] < 0:
            return None
        return int(self._labels[index])

    @property
    def class_names(self) -> list[str]:
        return self._class_names

    def get_targets(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels.astype(np.int64)

    def _require_a_readable_image(self) -> None:
        """Try images from the first on until one can be read."""
        num_probes = min(len(self), _NUM_PROBES)
        first_error = None
        for index in range(num_probes):
            try:
                self[index]
                return
            except DatasetError as error:
                first_error = first_error or error
        raise DatasetError(
            f"folder {self.root}: none of the first {num_probes} of its {len(self)} images can be read; "
            f"the first: {first_error}"
        )


class _PathList:
    """Many byte strings in one array: their bytes end to end, and where each ends."""

    def __init__(self, letters: np.ndarray, ends: np.ndarray) -> None:
        self._letters = letters  # uint8
        self._ends = ends  # int64

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} images")
        start = self._ends[index - 1] if index else 0
        return self._letters[start : self._ends[index]].tobytes()

    def take(self, indices: np.ndarray) -> "_PathList":
        """Copy the chosen strings."""
        return _pack(self[index] for index in indices)


def _pack(strings: Iterator[bytes]) -> _PathList:
    letters, ends = bytearray(), array("q")
    for string in strings:
        letters += string
        ends.append(len(letters))
    return _PathList(np.frombuffer(letters, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))


def _list_images(root: str) -> _PathList:
    """Paths, relative to `root`, of all its images."""
    if not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise DatasetError(f"folder {root} {problem}; check root= in the dataset string")
    others = _OtherFiles()
    files = _pack(_walk(root, (os.path.realpath(root),), others))
    if not len(files):
        if not others.count:
            raise DatasetError(f"folder {root} is empty")
        raise DatasetError(
            f"folder {root} holds {others.count} files but no image ({' '.join(EXTENSIONS)}); the first: {others.first}"
        )
    return files


@dataclass
class _OtherFiles:
    """Files that are no images, for the message about a folder without any."""

    count: int = 0
    first: str = ""


def _walk(folder: str, real: tuple[str, ...], others: _OtherFiles) -> Iterator[bytes]:
    """Yield the images below a folder, relative to it, in order; `real` are the real folders from the root to it."""
    for entry in _entries(folder):
        target = _real_path(entry, real)
        if entry.is_dir():
            prefix = os.fsencode(entry.name) + b"/"
            for path in _walk(entry.path, (*real, target), others):
                yield prefix + path
        elif entry.is_file() and entry.name.lower().endswith(EXTENSIONS):
            yield os.fsencode(entry.name)
        elif entry.is_file():
            others.count += 1
            others.first = others.first or entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Content of a folder by name, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"folder {folder} cannot be read: {error.strerror}") from error


def _real_path(entry: os.DirEntry[str], real: tuple[str, ...]) -> str:
    """Where an entry really is; refuses links that leave the root or lead back to a folder they lie in."""
    if not entry.is_symlink():
        return os.path.join(real[-1], entry.name)
    target = os.path.realpath(entry.path)
    if os.path.commonpath((real[0], target)) != real[0]:
        raise DatasetError(f"link {entry.path} leaves the dataset's folder; copy the files, or set root= above both")
    if target in real:
        raise DatasetError(f"link {entry.path} leads back to a folder it lies in; remove it")
    return target


def _classes(files: _PathList) -> tuple[list[str], np.ndarray | None]:
    """Class names and the label of each image, -1 for those that lie in the root; no labels without folders."""
    numbers: dict[bytes, int] = {}
    labels = np.full(len(files), -1, dtype=np.int32)
    for index in range(len(files)):
        folder, slash, _ = files[index].partition(b"/")
        if slash:
            labels[index] = numbers.setdefault(folder, len(numbers))
    if not numbers:
        return [], None
    names = sorted(numbers)
    rank = np.empty(len(names) + 1, dtype=np.int32)
    rank[-1] = -1
    for new, name in enumerate(names):
        rank[numbers[name]] = new
    return [os.fsdecode(name) for name in names], rank[labels]
