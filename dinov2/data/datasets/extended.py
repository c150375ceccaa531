"""Base of datasets whose images are files: bytes and target by index, decoding and errors here."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.datasets.decoders import MAX_IMAGE_PIXELS, EncodedImage, pillow_mode
from dinov2.errors import DatasetError


class ExtendedVisionDataset(Dataset[tuple[Any, Any]], ABC):
    """A dataset of image files; an item is (image, target), the target None without a label.

    A subclass gives `__len__`, `get_image_data`, `get_target` and `path`, and passes these arguments on. Its own
    keyword arguments are the keys of its dataset string.

    Args:
        channels: 3 for RGB, 1 for grey; any image is converted.
        max_image_pixels: larger images are refused; None: no limit.
        transform: called with the image of an item, a Pillow image.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        max_image_pixels: int | None = MAX_IMAGE_PIXELS,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        pillow_mode(channels)
        self.channels = channels
        self.max_image_pixels = max_image_pixels
        self.transform = transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def get_image_data(self, index: int) -> bytes:
        """Content of the image's file."""

    @abstractmethod
    def get_target(self, index: int) -> Any:
        """Label, an int for classes; None without one."""

    @abstractmethod
    def path(self, index: int) -> str:
        """Where the image comes from, for messages."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0, 1, ...; empty without labels."""
        return []

    def get_targets(self) -> np.ndarray | None:
        """Labels of all images, int64, -1 for an image without one; None if no image has one."""
        return None

    def metadata(self) -> dict[str, np.ndarray]:
        """Columns that describe each image, by name; each as long as the dataset."""
        columns = {"path": np.array([self.path(index) for index in range(len(self))])}
        targets = self.get_targets()
        return columns if targets is None else columns | {"target": targets}

    def encoded_image(self, index: int) -> EncodedImage:
        """Image with its header read and its pixels not yet; decoding it raises a `DatasetError` without the path."""
        try:
            data = self.get_image_data(index)
        except OSError as error:
            raise DatasetError(error.strerror or str(error)) from error
        return EncodedImage(data, channels=self.channels, max_image_pixels=self.max_image_pixels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Item `index`, decoded and transformed.

        Raises:
            DatasetError: the image cannot be read; names index and path.
        """
        try:
            image = self.encoded_image(index).to_pil()
        except DatasetError as error:
            raise unreadable(self, index, error) from error
        return (image if self.transform is None else self.transform(image)), self.get_target(index)


def unreadable(dataset: Any, index: int, reason: Exception) -> DatasetError:
    """Error about one image, with its index and path."""
    return DatasetError(f"image {index} ({image_path(dataset, index)}) cannot be read: {reason}")


def image_path(dataset: Any, index: int) -> str:
    """Path of an image; its index, if the dataset is a class of the user's own without paths."""
    return str(dataset.path(index)) if hasattr(dataset, "path") else f"item {index}"
