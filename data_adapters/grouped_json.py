"""`GroupedJSON`: images listed in JSON files, with labels, and groups of images that belong together.

Dataset string: `GroupedJSON:split=TRAIN:root=bbu_full_dataset`.

    bbu_full_dataset/
        annotations/train.json      one file a split, from train, val and test
        annotations/val.json
        annotations/test.json
        train/1015272/1015272-0.jpeg      <split>/<group>/<group>-<number>.jpeg, or as the files say
        val/1015301/1015301-0.jpeg

    train.json:  {"metainfo": {"classes": ["negative", "positive"]},
                  "data_list": [{"img_path": "train/1015272/1015272-0.jpeg", "gt_label": 0, "group_id": "1015272"}]}

`img_path` starts from the root, or, if the first image of a file is only found there, from the folder of the file's
split. `gt_label` is the number of a class, or null. If there is one annotation file only, whatever its name, its groups
are split by a hash of their names. Files, entries and images are checked once, when the index of the dataset is made;
after that an image that has gone is found when it is read.

Source: the files are those of MMPretrain's CustomDataset with a group to each image.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_adapters.contained_paths import find_missing, require_inside
from data_adapters.grouped_json_annotations import read_annotations
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.image_source import ImageSource
from dinov2.data.datasets.wide_tiff import open_image_file
from dinov2.data.index import Index, Strings, stored_index
from dinov2.errors import ConfigError, DatasetError

_SPLITS = ("train", "val", "test")
_FRACTION = 0.2  # of the groups in val, and in test, if there is one annotation file only


class GroupedJSON(ExtendedVisionDataset):
    """Images of one split, in the order of its annotation file; for split=all, of all files, one after the other.

    An image in two entries, or a group with images in two files, is refused, whichever split is asked for.

    Args:
        root: folder of the dataset; `~` is the home folder.
        val_fraction: share of the groups in val, about, if there is one annotation file only; None: 0.2.
        test_fraction: the same for test.
        split_by: group; there is no other choice.
        options: arguments of `ExtendedVisionDataset`.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: an annotation file is missing or wrong, or an image is missing.
    """

    def __init__(
        self,
        *,
        root: str,
        val_fraction: float | None = None,
        test_fraction: float | None = None,
        split_by: str = "group",
        **options: Any,
    ) -> None:
        fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        set_fractions = {key: value for key, value in fractions.items() if value is not None}
        super().__init__(split_by=split_by, **(dict.fromkeys(fractions, _FRACTION) | set_fractions), **options)
        if split_by != "group":
            raise ConfigError(f"dataset GroupedJSON: split_by={split_by} must be group")
        self.root = os.path.expanduser(root)
        files = _annotation_files(self.root)
        if set_fractions and len(files) > 1:
            raise ConfigError(
                f"dataset GroupedJSON: {next(iter(set_fractions))} has no effect, as {files[0].parent} has "
                f"{len(files)} files, each of which is a split; remove it"
            )
        self._index = stored_index(
            self.cache_dir,
            name="grouped_json",
            key=[os.path.abspath(self.root), *(_stamp(file) for file in files)],
            build=partial(_make_index, self.root, files),
        )
        self._rows = self._rows_of_split(files)

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._index["path"][self._rows[index]]))

    def get_image_data(self, index: int) -> bytes:
        path = self.path(index)
        require_inside(self.root, path)
        return Path(path).read_bytes()

    def encoded_image(self, index: int) -> ImageSource:
        """Image with its header read and its pixels not yet."""
        settings = {"channels": self.channels, "max_image_pixels": self.max_image_pixels, "bits": self.bits}
        return open_image_file(self.path(index), self.file_data(index), **settings)

    def get_target(self, index: int) -> int | None:
        label = int(self._index["label"][self._rows[index]])
        return label if label >= 0 else None

    @property
    def class_names(self) -> list[str]:
        return list(self._index.attributes["classes"])

    def get_targets(self) -> np.ndarray:
        return self._take("label").astype(np.int64)

    def groups(self) -> np.ndarray:
        """Number of the group of each image, the same in every split."""
        return self._take("group").astype(np.int64)

    def columns(self) -> dict[str, Callable[[], np.ndarray]]:
        """Columns of `metadata`: path, target, group (its name) and split (the name of the annotation file)."""
        return super().columns() | {"group": self._group_names, "split": self._split_names}

    def _take(self, name: str) -> np.ndarray:
        """Part of an index column for this split's images."""
        column = self._index[name]
        return column[self._rows.start : self._rows.stop] if isinstance(self._rows, range) else column[self._rows]

    def _group_names(self) -> np.ndarray:
        names = np.array([name.decode("utf-8", "surrogatepass") for name in self._index["group_name"]])
        return names[self._take("group")]

    def _split_names(self) -> np.ndarray:
        return np.array(self._index.attributes["splits"])[self._take("split")]

    def _rows_of_split(self, files: list[Path]) -> range | np.ndarray:
        """Places in the index of the images of this split."""
        if self.split == "all":
            return range(len(self._index["path"]))
        if len(files) == 1:
            names = list(self._index["group_name"])
            return self.own_rows(names[group] for group in self._index["group"])
        splits = self._index.attributes["splits"]
        if self.split not in splits:
            found = " and ".join(", ".join(f"{name}.json" for name in splits).rsplit(", ", 1))
            raise DatasetError(f"{files[0].parent} has {found}, but no {self.split}.json for split={self.split}")
        places = np.flatnonzero(self._index["split"] == splits.index(self.split))
        return range(int(places[0]), int(places[-1]) + 1)


def _annotation_files(root: str) -> list[Path]:
    """Find the annotation files, in the order train, val, test."""
    folder = Path(root) / "annotations"
    if not folder.is_dir():
        what = f"folder {root} has no folder annotations" if os.path.isdir(root) else f"folder {root} does not exist"
        raise DatasetError(f"{what}; check root= in the dataset string")
    files = [folder / f"{split}.json" for split in _SPLITS if (folder / f"{split}.json").is_file()]
    others = sorted(folder.glob("*.json"))
    if not files and len(others) != 1:
        found = f"holds {', '.join(file.name for file in others)}" if others else "holds no .json file"
        raise DatasetError(f"{folder} {found}; it needs train.json, val.json and test.json, some of them, or one file")
    return files or others


def _stamp(file: Path) -> list[Any]:
    """Name, size and time of change of a file."""
    status = file.stat()
    return [file.name, status.st_size, status.st_mtime_ns]


def _make_index(root: str, files: list[Path]) -> Index:
    """Read the annotation files and look for the images."""
    annotations = read_annotations(root, files)
    missing = find_missing(root, annotations.paths, description="looking for images")
    if missing:
        others = f", as are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DatasetError(
            f"{annotations.place(missing[0])} names the image "
            f"{os.path.join(root, os.fsdecode(annotations.paths[missing[0]]))}, which is missing{others}; "
            "copy it there or remove the entry"
        )
    return Index(
        {
            "path": Strings.pack(annotations.paths),
            "label": annotations.labels,
            "group": annotations.groups,
            "group_name": Strings.pack(name.encode("utf-8", "surrogatepass") for name in annotations.group_names),
            "split": annotations.splits,
        },
        {"classes": list(annotations.classes), "splits": [file.stem for file in files]},
    )
