"""`ImageFolder`: a folder of images of any depth; the first folder level, if there is one, gives the labels.

    photos/
        cat/001.jpg           class cat
        cat/indoors/002.png   class cat
        dog/003.tif           class dog
        004.jpg               no label

Dataset string: `ImageFolder:root=photos`, with `split=train`, `split=val` and `split=test` for disjoint parts of it.
Further keys: `classes=cat,dog`, `exclude='thumbs,*/old/*'`, `label_level=2`, `split_by=folder`, `bits=16`.
"""

from typing import Any

from dinov2.data.datasets.folder_images import FolderImages, comma_list
from dinov2.errors import ConfigError


class ImageFolder(FolderImages):
    """All images below a folder, in the order of their paths.

    Files are chosen by extension in any case; hidden files and folders are left out. The names of the folders right
    below `root` are the classes; an image that lies in `root` itself has no label. A link may point to another place
    below `root`, not out of it.

    Args:
        root: the folder; `~` is the home folder.
        classes: names with commas; only images of these classes.
        exclude: patterns with commas: files and folders left out. One with a slash is compared with the path below
            `root`, others with the name alone.
        label_level: level of the folders that are the classes, 1 for those right below `root`; 0: no labels.
        options: arguments of `ExtendedVisionDataset`. An image belongs to a split by a hash of its path below `root`,
            or, with `split_by` folder, level1, level2, ..., of the folder it lies in or below.

    Raises:
        ConfigError: an option is wrong.
        DatasetError: the folder is missing, lacks a class, or holds no image that can be read.
    """

    def __init__(
        self,
        *,
        root: str,
        classes: str | None = None,
        exclude: str | None = None,
        label_level: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if label_level < 0:
            raise ConfigError(f"dataset ImageFolder: label_level={label_level} must be at least 0")
        if classes is not None and label_level == 0:
            raise ConfigError("dataset ImageFolder: classes= needs labels; leave out label_level=0")
        self.open_folder(
            root,
            exclude=comma_list(exclude, "dataset ImageFolder: exclude") or (),
            label_level=label_level,
            classes=comma_list(classes, "dataset ImageFolder: classes"),
        )
