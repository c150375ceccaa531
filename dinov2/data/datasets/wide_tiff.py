"""TIFF files with pixels that Pillow cuts to 8 bits or cannot range: 32-bit and float grey, 16-bit colour.

Values of 32 bits and floats are windowed to 16 bits: smallest of the image to 0, largest to 65535. Integers that fit
into 16 bits already are left as they are. `EMFolder` offers other windows and reads parts of large files.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.decoders import (
    MAX_IMAGE_PIXELS,
    EncodedImage,
    UnknownFormatError,
    pillow_mode,
    require_image_pixels,
    turn_upright,
)
from dinov2.data.datasets.tiff import TiffArray
from dinov2.errors import DatasetError

_SUFFIXES = (".tif", ".tiff")
_UINT16_MAX = 65535
_WIDEN = 257  # from 8 to 16 bits
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's grey
_SWAPPED = (5, 6, 7, 8)  # orientations that swap width and height


def open_image_file(
    path: str, data: bytes, *, channels: int = 3, max_image_pixels: int | None = MAX_IMAGE_PIXELS, bits: int = 8
) -> "EncodedImage | WideTiff":
    """Open an image by the reader that keeps its pixels whole.

    Args:
        path: of the file.
        data: its content.
        channels: see `EncodedImage`, as the others.

    Raises:
        DatasetError: no reader knows the file, or it is too large.
    """
    is_tiff = path.lower().endswith(_SUFFIXES)
    orientation = 1
    try:
        image = EncodedImage(data, channels=channels, max_image_pixels=max_image_pixels, bits=bits)
        if not is_tiff or image.is_read_whole:
            return image
        orientation = image.tiff_orientation
    except UnknownFormatError:
        if not is_tiff:
            raise
    return WideTiff(path, channels=channels, max_image_pixels=max_image_pixels, bits=bits, orientation=orientation)


class WideTiff:
    """First page of a TIFF file; an `ImageSource`.

    Args:
        path: of the file.
        channels: 3 for RGB, 1 for grey; any image is converted, transparency is dropped.
        max_image_pixels: larger images are refused before they are decoded; None: no limit.
        bits: 8 or 16, of what `to_tensor` gives.
        orientation: tag of that name, 1..8.

    Raises:
        DatasetError: the file is damaged or too large.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        channels: int = 3,
        max_image_pixels: int | None = MAX_IMAGE_PIXELS,
        bits: int = 8,
        orientation: int = 1,
    ) -> None:
        pillow_mode(channels)
        self._path = Path(path)
        self.channels = channels
        self.bits = bits
        self._max_image_pixels = max_image_pixels
        self._orientation = orientation
        array = TiffArray(path, max_image_pixels=max_image_pixels)
        array.close()
        height, width = (array.shape[array.axes.index(axis)] for axis in "YX")
        require_image_pixels(width, height, max_image_pixels)
        self.width, self.height = (height, width) if orientation in _SWAPPED else (width, height)

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        """Decode, once, to [C, H, W], uint8 or uint16; `reduce` is not used.

        Raises:
            DatasetError: the file is damaged, or has pixels that are no numbers.
        """
        pixels = to_integers(self._read())
        pixels = pixels[:1] if len(pixels) < 3 else pixels[:3]
        if len(pixels) == 3 and self.channels == 1:
            pixels = np.round(np.tensordot(_LUMA, pixels, axes=1)[None]).astype(pixels.dtype)
        if pixels.dtype == np.uint8 and self.bits == 16:
            pixels = pixels.astype(np.uint16) * _WIDEN
        elif pixels.dtype == np.uint16 and self.bits == 8:
            pixels = np.round(pixels * (255 / _UINT16_MAX)).astype(np.uint8)
        upright = turn_upright(torch.from_numpy(np.ascontiguousarray(pixels)), self._orientation)
        return upright.expand(self.channels, -1, -1).contiguous()

    def _read(self) -> np.ndarray:
        """Samples of the first page, [S, Y, X]."""
        array = TiffArray(self._path, max_image_pixels=self._max_image_pixels)
        try:
            box = [slice(0, size if axis in "YXS" else 1) for axis, size in zip(array.axes, array.shape, strict=True)]
            pixels = array.read(box)
            axes = [array.axes.index(axis) for axis in "SYX" if axis in array.axes]
        finally:
            array.close()
        others = [axis for axis in range(pixels.ndim) if axis not in axes]
        shape = [pixels.shape[axis] for axis in axes]
        return pixels.transpose(*others, *axes).reshape(shape if len(shape) == 3 else [1, *shape])


def to_integers(pixels: np.ndarray) -> np.ndarray:
    """Turn pixels of any type to uint8, if they are, or uint16; wider ones are windowed to their own range.

    Raises:
        DatasetError: some are no numbers.
    """
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels
    strange = pixels.size - int(np.isfinite(pixels).sum())
    if strange:
        raise DatasetError(f"{strange} of its {pixels.size} values are NaN or infinite; mend the file or leave it out")
    low, high = float(pixels.min()), float(pixels.max())
    if pixels.dtype.kind in "iu" and low >= 0 and high <= _UINT16_MAX:
        return pixels.astype(np.uint16)
    scale = _UINT16_MAX / (high - low) if high > low else 0.0
    return np.round((pixels.astype(np.float64) - low) * scale).astype(np.uint16)
