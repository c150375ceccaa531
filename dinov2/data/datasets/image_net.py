"""`ImageNet`: the ILSVRC 2012 photographs, 1,281,167 for training, 50,000 for validation, 100,000 without labels.

    imagenet/
        train/n01440764/n01440764_10026.JPEG
        val/n01440764/ILSVRC2012_val_00000293.JPEG     in class folders too
        test/ILSVRC2012_test_00000001.JPEG             no labels
        labels.txt            n01440764,tench          a line a class; may be missing

Dataset string, as in the official code: `ImageNet:split=TRAIN:root=imagenet:extra=imagenet_extra`. The list of files is
made on first use and kept in the folder `extra`, or, without that key, in data.cache_dir.
Source: layout and keys of the parents' dataset of this name; Russakovsky et al. 2015, arXiv:1409.0575.
"""

import csv
import os
from typing import Any

from dinov2.data.datasets.folder_images import GROUP_KEYS, FolderImages, require_folders, require_split, unique_titles
from dinov2.errors import DatasetError

_SPLITS = ("train", "val", "test", "all")
_TITLES = "labels.txt"
_MAX_TITLES_BYTES = 1 << 20


class ImageNet(FolderImages):
    """Photographs of one split, in the order of their paths; classes in the order of their names in WordNet.

    Args:
        root: folder of the photographs; `~` is the home folder.
        extra: folder for what is found out about the files; made if needed.
        split: train, val, test or all (train and val), in any case.
        cache_dir: takes the place of `extra`, if that is not given.
        options: other arguments of `ExtendedVisionDataset`.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: the folder is missing, or is not laid out as above.
    """

    HIDDEN_KEYS = GROUP_KEYS

    def __init__(
        self,
        *,
        root: str,
        extra: str | None = None,
        split: str = "train",
        cache_dir: str | None = None,
        **options: Any,
    ) -> None:
        require_split("ImageNet", split, _SPLITS)
        super().__init__(split=split, cache_dir=extra or cache_dir, **options)
        folders = ("train", "val") if self.split == "all" else (self.split,)
        layout = ", ".join(f"{root}/{name}/{'' if name == 'test' else '<class>/'}*.JPEG" for name in folders)
        require_folders("ImageNet", root, folders, layout=layout)
        self.open_folder(root, folders=folders, label_level=0 if self.split == "test" else 2, split_by_hash=False)
        self._titles = _read_titles(os.path.join(self.root, _TITLES))
        targets = self.get_targets()
        if self.split != "test" and (targets is None or targets.min() < 0):
            stray = 0 if targets is None else int(targets.argmin())
            raise DatasetError(f"dataset ImageNet: {self.path(stray)} lies in no class folder; expected {layout}")

    @property
    def class_names(self) -> list[str]:
        return unique_titles(super().class_names, self._titles)


def _read_titles(path: str) -> dict[str, str]:
    """Read lines such as `n01440764,tench`; none if there is no such file."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file.read(_MAX_TITLES_BYTES).splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(f"dataset ImageNet: {path} cannot be read ({error}); mend it or remove it") from error
    broken = next((number for number, row in enumerate(rows, start=1) if len(row) == 1), None)
    if broken is not None:
        raise DatasetError(f"dataset ImageNet: {path}: line {broken} is not <class>,<title>; mend it or remove it")
    return {row[0]: row[1] for row in rows if row}
