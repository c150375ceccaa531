"""A dataset of images of five channels of 16 bits, as a laboratory would write one: the adapter and the files."""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from torch import Tensor

from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.errors import ConfigError, DatasetError
from support.images import photo

NAME = "support.many_channels.Stacks"
NUM_CHANNELS = 5


class Stack:
    """A TIFF file with a page for each channel; an `ImageSource`."""

    def __init__(self, path: Path) -> None:
        try:
            self._pages = tifffile.memmap(path, mode="r")
        except (tifffile.TiffFileError, ValueError) as error:
            raise DatasetError(f"damaged TIFF file ({error})") from error
        self.channels, self.height, self.width = self._pages.shape

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        return torch.from_numpy(np.array(self._pages))


class Stacks(ExtendedVisionDataset):
    """TIFF files `<root>/<class>/<name>.tif`.

    Args:
        root: folder.
        trusting: leave it to the pipeline to find out that the network wants another number of channels.
        options: of the base.
    """

    def __init__(self, *, root: str, trusting: bool = False, **options: Any) -> None:
        self.trusting = trusting
        super().__init__(**options)
        files = sorted(Path(root).glob("*/*.tif"))
        self.files = [files[row] for row in self.own_rows([f"{file.parent.name}/{file.name}" for file in files])]
        self.names = sorted({file.parent.name for file in files})

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        return str(self.files[index])

    def get_target(self, index: int) -> int:
        return self.names.index(self.files[index].parent.name)

    def get_targets(self) -> np.ndarray:
        return np.array([self.get_target(index) for index in range(len(self))])

    @property
    def class_names(self) -> list[str]:
        return self.names

    def require_channels(self) -> None:
        if self.channels != NUM_CHANNELS and not self.trusting:
            raise ConfigError(f"student.in_chans={self.channels}: dataset Stacks gives {NUM_CHANNELS} channels")

    def encoded_image(self, index: int) -> Stack:
        return Stack(self.files[index])


def write_stacks(root: Path, count: int, *, num_classes: int = 2, size: tuple[int, int] = (48, 40)) -> None:
    """Write images whose channels are brightness at five gains, dark like most of microscopy; classes differ in them.

    Args:
        root: folder.
        count: images.
        num_classes: class k has its channels turned round by k.
        size: width and height, px.
    """
    for number in range(count):
        grey = np.asarray(photo(number, size=size).convert("L"), dtype=np.float64)
        gains = np.roll([4, 8, 16, 32, 48], number % num_classes)
        planes = np.stack([500 + gain * grey for gain in gains]).astype(np.uint16)
        folder = root / f"class_{number % num_classes}"
        folder.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / f"{number:03d}.tif", planes, photometric="minisblack")
