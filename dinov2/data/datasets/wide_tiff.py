"""TIFF files with pixels that Pillow cuts to 8 bits or cannot range: 32-bit and float grey, 16-bit colour.

Numbers of 32 bits and floats are windowed to 16 bits: smallest of the image to 0, largest to 65535. Integers that fit
into 16 bits already are left as they are. `EMFolder` offers other windows and reads parts of large files.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from dinov2.data.datasets.array_image import ArrayImage, Plane, Scaling
from dinov2.data.datasets.decoders import (
    MAX_IMAGE_PIXELS,
    EncodedImage,
    UnknownFormatError,
    pillow_mode,
    require_image_pixels,
    turn_upright,
)
from dinov2.data.datasets.tiff import TiffArray

_SUFFIXES = (".tif", ".tiff")
_UINT16_MAX = 65535
_WHOLE_RANGE = Scaling("percentile", 0, 100)
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
        self.channels = channels
        self._path = path
        self._bits = bits
        self._max_image_pixels = max_image_pixels
        self._orientation = orientation
        with self._plane() as plane:
            width, height = plane.width, plane.height
        require_image_pixels(width, height, max_image_pixels)
        self.width, self.height = (height, width) if orientation in _SWAPPED else (width, height)

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        """Decode, once, to [C, H, W], uint8 or uint16; `reduce` is not used.

        Raises:
            DatasetError: the file is damaged, or has pixels that are no numbers.
        """
        with self._plane() as plane:
            image = ArrayImage(
                plane,
                scaling=_WHOLE_RANGE,
                window=lambda: _window(plane),
                channels=self.channels,
                bits=self._bits,
                max_image_pixels=self._max_image_pixels,
            )
            return turn_upright(image.to_tensor(), self._orientation)

    @contextmanager
    def _plane(self) -> Iterator[Plane]:
        """Open the first page."""
        array = TiffArray(self._path, max_image_pixels=self._max_image_pixels)
        try:
            samples = "S" if "S" in array.axes else None
            fixed = {axis: 0 for axis in array.axes if axis not in "YXS"}
            yield Plane(array, rows="Y", columns="X", channels=samples, fixed=fixed, drops_alpha=True)
        finally:
            array.close()


def _window(plane: Plane) -> tuple[float, float]:
    """Numbers that become 0 and full scale."""
    dtype = plane.array.dtype
    if dtype.kind in "ub" and dtype.itemsize <= 2:
        return 0, (1 << (8 * dtype.itemsize if dtype.kind == "u" else 1)) - 1
    low, high = _WHOLE_RANGE.window(plane)
    return (0, _UINT16_MAX) if dtype.kind in "iu" and low >= 0 and high <= _UINT16_MAX else (low, high)
