"""Base of datasets whose images lie below one folder, where the names of folders may be their classes.

All that is known about the files, paths, labels and the rows of a split, stands in indexes that are mapped from the
cache folder, so that a million files cost a process next to no memory.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.data.datasets.decoders import EncodedImage
from dinov2.data.datasets.extended import NUM_PROBES, ExtendedVisionDataset, failure_of_all
from dinov2.data.datasets.wide_tiff import WideTiff, open_image_file
from dinov2.data.folder_scan import EXTENSIONS, scan_images
from dinov2.data.index import Index, Strings, counted, stored_index
from dinov2.data.names import nearest
from dinov2.errors import ConfigError, DatasetError

GROUP_KEYS = ("val_fraction", "test_fraction", "split_by", "one_per_group")  # of no use where folders are the splits
_NUM_SHOWN = 20  # classes offered in a sentence


class FolderImages(ExtendedVisionDataset):
    """Images in files below one folder; a subclass calls `open_folder` in its constructor.

    `split_by` is path (each image stands alone), folder (the images of one folder are a group) or level1, level2, ...
    (the images below one folder of that level are).
    """

    scans_folder = True

    def open_folder(
        self,
        root: str,
        *,
        folders: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        label_level: int = 1,
        classes: Sequence[str] | None = None,
        extensions: Sequence[str] = EXTENSIONS,
        split_by_hash: bool = True,
    ) -> None:
        """Find the images.

        Args:
            root: the folder; `~` is the home folder.
            folders: see `scan_images`.
            exclude: see `scan_images`.
            label_level: folders of this level below `root` are the classes, 1 those right below; 0: no labels. An
                image that lies higher has no label.
            classes: only images of these; None: all images.
            extensions: of images.
            split_by_hash: whether the split is found by hashes, or lies in the folders.

        Raises:
            ConfigError: `split_by` names no kind of group.
            DatasetError: the folder is missing, holds no image that can be read, or lacks a class.
        """
        self._prepare_groups()
        self.root = os.path.expanduser(root)
        files = scan_images(
            self.root, cache_dir=self.cache_dir, folders=folders, exclude=exclude, extensions=extensions
        )
        self.use_files(files, label_level=label_level, classes=classes, split_by_hash=split_by_hash)

    def use_files(
        self, files: Index, *, label_level: int = 1, classes: Sequence[str] | None = None, split_by_hash: bool = True
    ) -> None:
        """Choose and label images that were found; `self.root` is set.

        Args:
            files: index with a column `path`, `Strings` with slashes between folders.
            label_level: see `open_folder`, as the others.

        Raises:
            ConfigError: `split_by` names no kind of group.
            DatasetError: no image can be read, or a class is missing.
        """
        self._prepare_groups()
        self.files = files
        paths: Strings = files["path"]
        split = self.split if split_by_hash else "all"
        fractions = [self.val_fraction, self.test_fraction, self.split_by] if split != "all" else []
        chosen = None if classes is None else sorted(set(classes))

        def choose() -> Index:
            table = _labels(paths, label_level, description=f"labels of {self.root}")
            if chosen is not None:
                table = _only_classes(table, chosen, where=f"dataset {type(self).__name__}", root=self.root)
            if split == "all":
                return table
            rows = table["row"] if "row" in table else np.arange(len(paths))
            kept = self.own_rows(self._group_of(paths[row]) for row in counted(rows.tolist(), description="split"))
            return _take(table, rows, kept)

        self._table = stored_index(
            None if files.path is None else self.cache_dir,
            name="rows",
            key=["rows", 1, files.digest, label_level, chosen, split, fractions],
            build=choose,
        )
        self._require_a_readable_image()

    def __len__(self) -> int:
        return len(self._table["row"]) if "row" in self._table else len(self.files["path"])

    def row(self, index: int) -> int:
        """Row of an image in the index of all files."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} images")
        return int(self._table["row"][index]) if "row" in self._table else index

    def relative_path(self, index: int) -> bytes:
        """Path below the root, in file-system encoding."""
        return self.files["path"][self.row(index)]

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.relative_path(index)))

    def get_image_data(self, index: int) -> bytes:
        return Path(self.path(index)).read_bytes()

    def encoded_image(self, index: int) -> EncodedImage | WideTiff:
        settings = {"channels": self.channels, "max_image_pixels": self.max_image_pixels, "bits": self.bits}
        return open_image_file(self.path(index), self.file_data(index), **settings)

    def get_target(self, index: int) -> int | None:
        if "target" not in self._table or self._table["target"][index] < 0:
            return None
        return int(self._table["target"][index])

    @property
    def class_names(self) -> list[str]:
        return self._table.attributes["classes"]

    def get_targets(self) -> np.ndarray | None:
        return self._table["target"].astype(np.int64) if "target" in self._table else None

    def groups(self) -> np.ndarray | None:
        if self._is_ungrouped():
            return None
        numbers: dict[bytes, int] = {}
        names = (self._group_of(self.relative_path(index)) for index in range(len(self)))
        return np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), dtype=np.int64)

    def columns(self) -> dict[str, Callable[[], np.ndarray]]:
        columns = super().columns()
        return columns if self._is_ungrouped() else columns | {"group": self._group_names}

    def _prepare_groups(self) -> None:
        """Read `split_by`, before anything that takes time."""
        self._group_of = _grouping(self.split_by, type(self).__name__)
        if self.one_per_group and self._is_ungrouped():
            raise self.no_groups()

    def _is_ungrouped(self) -> bool:
        return self.split_by in (None, "path")

    def _group_names(self) -> np.ndarray:
        return np.array([os.fsdecode(self._group_of(self.relative_path(index))) for index in range(len(self))])

    def _require_a_readable_image(self) -> None:
        """Try images from the first on until one can be read."""
        num_probes = min(len(self), NUM_PROBES)
        error = failure_of_all(self, num_probes=num_probes)
        if error is not None:
            raise DatasetError(
                f"folder {self.root}: none of the first {num_probes} of its {len(self)} images can be read; "
                f"the first: {error}"
            )


def require_folders(dataset: str, root: str, folders: Sequence[str], *, layout: str) -> None:
    """Check that a root holds the folders of a published data set.

    Args:
        dataset: its name, for the sentence.
        root: as in the dataset string.
        folders: names right below it.
        layout: what is expected, for the sentence.

    Raises:
        DatasetError: it is missing or lacks one; names a folder of it that has them.
    """
    top = os.path.expanduser(root)
    missing = [name for name in folders if not os.path.isdir(os.path.join(top, name))]
    if not missing:
        return
    if not os.path.isdir(top):
        raise DatasetError(f"dataset {dataset}: folder {root} does not exist; expected {layout}")
    inside = [entry.path for entry in os.scandir(top) if entry.is_dir()]
    fitting = [path for path in inside if all(os.path.isdir(os.path.join(path, name)) for name in folders)]
    hint = f"; did you mean root={min(fitting)}?" if fitting else ""
    raise DatasetError(f"dataset {dataset}: folder {root} has no folder {missing[0]}; expected {layout}{hint}")


def unique_titles(names: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    """Title of each class, its name where there is none; a title that several share has the name added."""
    found = [titles.get(name, name) for name in names]
    return [f"{title} ({name})" if found.count(title) > 1 else title for name, title in zip(names, found, strict=True)]


def require_split(dataset: str, split: str, known: Sequence[str]) -> None:
    """Check the name of a split that a published data set has.

    Raises:
        ConfigError: it has others.
    """
    if split.lower() not in known:
        raise ConfigError(f"dataset {dataset}: split={split} must be one of {', '.join(known)}")


def comma_list(text: str | None, setting: str) -> list[str] | None:
    """Names of a value such as `a,b`; None for None.

    Raises:
        ConfigError: a name is empty.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"{setting}={text}: must be names with a comma between two")
    return names


@dataclass(frozen=True)
class _Grouping:
    """What gives the group of a path below the root; a class, so that loader workers can be given it."""

    level: int | None  # of the folder that makes the group; 0: the one that holds the image; None: the image itself

    def __call__(self, path: bytes) -> bytes:
        if self.level is None:
            return path
        if self.level == 0:
            return path.rpartition(b"/")[0]
        return b"/".join(path.split(b"/")[:-1][: self.level])


def _grouping(split_by: str | None, dataset: str) -> _Grouping:
    """Read `split_by`."""
    if split_by in (None, "path"):
        return _Grouping(None)
    if split_by == "folder":
        return _Grouping(0)
    level = re.fullmatch("level([1-9][0-9]*)", split_by or "")
    if level is None:
        raise ConfigError(f"dataset {dataset}: split_by={split_by} must be path, folder, or level1, level2, ...")
    return _Grouping(int(level[1]))


def _labels(paths: Strings, level: int, *, description: str) -> Index:
    """Table with the label of each image, -1 for those without; without the column if no image has a label."""
    numbers: dict[bytes, int] = {}
    labels = np.full(len(paths), -1, dtype=np.int32)
    if level:
        for row, path in enumerate(counted(paths, description=description)):
            parts = path.split(b"/", level)
            if len(parts) > level:
                labels[row] = numbers.setdefault(parts[level - 1], len(numbers))
    if not numbers:
        return Index({}, {"classes": []})
    names = sorted(numbers)
    rank = np.full(len(names) + 1, -1, dtype=np.int32)  # the last place is that of images without a label
    rank[[numbers[name] for name in names]] = np.arange(len(names))
    return Index({"target": rank[labels]}, {"classes": [os.fsdecode(name) for name in names]})


def _only_classes(table: Index, chosen: list[str], *, where: str, root: str) -> Index:
    """Table of the images of some classes, numbered anew in the order of their names."""
    known = table.attributes["classes"]
    missing = [name for name in chosen if name not in known]
    if missing:
        raise DatasetError(
            f"{where}: classes={missing[0]}: no folder of that name holds images of {root}"
            + nearest(missing[0], known[:_NUM_SHOWN])
        )
    number = np.full(len(known) + 1, -1, dtype=np.int32)
    number[[known.index(name) for name in chosen]] = np.arange(len(chosen))
    targets = number[table["target"]]
    rows = np.flatnonzero(targets >= 0)
    return Index({"row": rows, "target": targets[rows]}, {"classes": chosen})


def _take(table: Index, rows: np.ndarray, kept: np.ndarray) -> Index:
    """Table of some of the images, given as places in `rows`, the rows of the table's images in the index of files."""
    columns = {"row": rows[kept]}
    if "target" in table:
        columns["target"] = table["target"][kept]
    return Index(columns, table.attributes)
