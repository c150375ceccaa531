"""`ImageNet100`: a hundred classes of ImageNet, 126,689 photographs for training and 5,000 for validation.

    imagenet100/              as the archive of that name on Kaggle unpacks
        train.X1/n01440764/*.JPEG    each class lies in one of the four
        train.X2/  train.X3/  train.X4/
        val.X/n01440764/*.JPEG
        Labels.json           {"n01440764": "tench, Tinca tinca", ...}; may be missing

Dataset string: `ImageNet100:root=imagenet100:split=train`, or `split=val`; `split=all` takes both.
Source: the classes of Tian et al. 2019, arXiv:1906.05849.
"""

import json
import os
from typing import Any

from dinov2.data.datasets.folder_images import GROUP_KEYS, FolderImages, require_folders, require_split, unique_titles
from dinov2.errors import DatasetError

_FOLDERS = {"train": ("train.X1", "train.X2", "train.X3", "train.X4"), "val": ("val.X",)}
_TITLES = "Labels.json"
_MAX_TITLES_BYTES = 1 << 20


class ImageNet100(FolderImages):
    """Photographs of one split, in the order of their paths; classes in the order of their names in WordNet.

    Args:
        root: the unpacked folder; `~` is the home folder.
        split: all, train or val, in any case.
        options: arguments of `ExtendedVisionDataset`.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: the folder is missing or is not laid out as above, or `Labels.json` is broken.
    """

    HIDDEN_KEYS = GROUP_KEYS

    def __init__(self, *, root: str, split: str = "all", **options: Any) -> None:
        require_split("ImageNet100", split, ("all", *_FOLDERS))
        super().__init__(split=split, **options)
        folders = tuple(name for part, names in _FOLDERS.items() for name in names if self.split in ("all", part))
        layout = f"{root}/train.X1 to train.X4 and {root}/val.X, each with a folder for each class"
        require_folders("ImageNet100", root, folders, layout=layout)
        self.open_folder(root, folders=folders, label_level=2, split_by_hash=False)
        self._titles = _read_titles(os.path.join(self.root, _TITLES))

    @property
    def class_names(self) -> list[str]:
        return unique_titles(super().class_names, self._titles)


def _read_titles(path: str) -> dict[str, str]:
    """Read the titles of classes; none if there is no such file."""
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            titles = json.loads(file.read(_MAX_TITLES_BYTES))
    except (OSError, ValueError) as error:
        raise DatasetError(f"dataset ImageNet100: {path} is not JSON ({error}); mend it or remove it") from error
    if not isinstance(titles, dict) or not all(isinstance(title, str) for title in titles.values()):
        raise DatasetError(f"dataset ImageNet100: {path} does not map class names to titles; mend it or remove it")
    return titles
