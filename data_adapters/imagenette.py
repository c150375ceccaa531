"""`Imagenette`: 13,394 photographs of ten classes of ImageNet that are easily told apart.

    imagenette2-320/          as imagenette2-320.tgz unpacks; imagenette2 and imagenette2-160 look the same
        train/n01440764/*.JPEG
        val/n01440764/*.JPEG
        noisy_imagenette.csv  not read

Dataset string: `Imagenette:root=imagenette2-320:split=train`, or `split=val`; `split=all` takes both.
Source: github.com/fastai/imagenette.
"""

from typing import Any

from dinov2.data.datasets.folder_images import GROUP_KEYS, FolderImages, require_folders, require_split, unique_titles

_FOLDERS = ("train", "val")
_TITLES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


class Imagenette(FolderImages):
    """Photographs of one split, in the order of their paths; classes in the order of their folders.

    Args:
        root: the unpacked folder; `~` is the home folder.
        split: all, train or val, in any case.
        options: arguments of `ExtendedVisionDataset`.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: the folder is missing, or is not laid out as above.
    """

    HIDDEN_KEYS = GROUP_KEYS

    def __init__(self, *, root: str, split: str = "all", **options: Any) -> None:
        require_split("Imagenette", split, ("all", *_FOLDERS))
        super().__init__(split=split, **options)
        require_folders(
            "Imagenette", root, _FOLDERS, layout=f"{root}/train/<class>/*.JPEG and {root}/val/<class>/*.JPEG"
        )
        folders = _FOLDERS if self.split == "all" else (self.split,)
        self.open_folder(root, folders=folders, label_level=2, split_by_hash=False)

    @property
    def class_names(self) -> list[str]:
        return unique_titles(super().class_names, _TITLES)
