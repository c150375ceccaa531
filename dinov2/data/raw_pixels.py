"""Pixels of a dataset's images before any augmentation, as facts and pictures about them need them.

Shapes: C channels, H rows, W columns.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.datasets.decoders import pil_to_tensor
from dinov2.data.datasets.image_source import RegionSource
from dinov2.errors import DatasetError

_LARGEST_SHOWN_PX = 4096  # side; of a larger image that can be read in parts, its middle


def open_image(dataset: Any, index: int) -> Any:
    """Image of a dataset, as training takes it: an image source, a Pillow image or a tensor.

    Raises:
        DatasetError: it cannot be read.
    """
    return dataset.encoded_image(index) if hasattr(dataset, "encoded_image") else dataset[index][0]


def read_pixels(image: Any) -> Tensor:
    """Pixels [C, H, W] of a whole image, uint8 or uint16.

    Raises:
        DatasetError: it is damaged, or no such image.
    """
    if isinstance(image, Image.Image):
        pixels = pil_to_tensor(image)
    else:
        pixels = image if isinstance(image, Tensor) else image.to_tensor()
    if pixels.ndim != 3 or pixels.dtype not in (torch.uint8, torch.uint16):
        shape = " x ".join(map(str, pixels.shape))
        raise DatasetError(f"it is a tensor of {shape} {pixels.dtype}, but must be uint8 or uint16 of C x H x W")
    return pixels


def read_shown_pixels(image: Any) -> np.ndarray:
    """Pixels to be shown, [C, H, W], uint8 or uint16; the middle of a huge image that can be read in parts.

    Raises:
        DatasetError: it is damaged, or no such image.
    """
    if isinstance(image, RegionSource) and max(image.height, image.width) > _LARGEST_SHOWN_PX:
        height, width = min(image.height, _LARGEST_SHOWN_PX), min(image.width, _LARGEST_SHOWN_PX)
        return image.read_region((image.height - height) // 2, (image.width - width) // 2, height, width).numpy()
    return read_pixels(image).numpy()


def as_fractions(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as fractions of full scale, float32."""
    return pixels / np.float32(np.iinfo(pixels.dtype).max)
