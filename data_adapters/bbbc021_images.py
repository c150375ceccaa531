"""Pixels of `BBBC021`: the channels of one field of view, read together and scaled.

Shapes: C channels, H rows, W columns.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor

from data_adapters.bbbc021_scaling import Window, histogram, percentile_window
from data_adapters.contained_paths import require_inside
from dinov2.data.datasets.decoders import EncodedImage
from dinov2.errors import DatasetError

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDEN = 257  # from 8 to 16 bits


class ChannelFiles:
    """A field of view with a file for each channel, the headers read and the pixels not.

    Args:
        root: folder that no file may leave by a link.
        files: path of each channel's file below it.
        names: of the channels, for errors.
        max_image_pixels: larger images are refused; None: no limit.

    Raises:
        DatasetError: a file is missing, damaged or of another size than the others.
    """

    def __init__(self, root: str, files: Sequence[str], *, names: Sequence[str], max_image_pixels: int | None) -> None:
        self.labels = [f"{name} file {file}" for name, file in zip(names, files, strict=True)]
        self._images = [
            _open(root, file, label, max_image_pixels) for file, label in zip(files, self.labels, strict=True)
        ]
        self.width, self.height = self._images[0].width, self._images[0].height
        for image, name in zip(self._images, names, strict=True):
            if (image.width, image.height) != (self.width, self.height):
                raise DatasetError(
                    f"its channel files differ in size: {names[0]} has {self.width} x {self.height} px, {name} "
                    f"{image.width} x {image.height}; all channels of an image need one size"
                )

    def planes(self) -> list[np.ndarray]:
        """Decode, once: values of each channel, [H, W] uint16.

        Raises:
            DatasetError: a file is damaged.
        """
        planes = []
        for image, label in zip(self._images, self.labels, strict=True):
            with _named(label):
                planes.append(image.to_tensor()[0].numpy())
        return planes


class ChannelsInFile:
    """A field of view with all its channels in one file: pages or samples of a TIFF, or an RGB image of another kind.

    Args:
        root: folder that the file may not leave by a link.
        file: its path below it.
        num_channels: that it holds.
        wanted: numbers of the channels to give.
        max_image_pixels: larger images are refused; None: no limit.

    Raises:
        DatasetError: the file is missing, damaged or has another number of channels.
    """

    def __init__(
        self, root: str, file: str, *, num_channels: int, wanted: Sequence[int], max_image_pixels: int | None
    ) -> None:
        self.label = f"image file {file}"
        self._wanted = list(wanted)
        data = _read(root, file, self.label)
        with _named(self.label):
            is_tiff = data[:4] in _TIFF_STARTS
            kind = _TiffPlanes if is_tiff else _PillowPlanes
            self._image = kind(data, num_channels=num_channels, max_image_pixels=max_image_pixels)
        self.width, self.height = self._image.width, self._image.height

    def planes(self) -> list[np.ndarray]:
        """Decode, once: values of each wanted channel, [H, W] uint16.

        Raises:
            DatasetError: the file is damaged.
        """
        with _named(self.label):
            planes = self._image.planes()
        return [planes[number] for number in self._wanted]


class ScaledImage:
    """A field of view as the pipeline takes it; an `ImageSource`.

    Args:
        source: of the planes.
        windows: of the channels; None: from the image itself.
        percentiles: for that, see `percentile_window`.
        bits: of a channel of the result, 8 or 16.
        channels: of the result: one for each plane, or any number that a single plane is repeated to.
    """

    def __init__(
        self,
        source: ChannelFiles | ChannelsInFile,
        windows: Sequence[Window] | None,
        *,
        percentiles: tuple[float, float],
        bits: int,
        channels: int,
    ) -> None:
        self.width = source.width
        self.height = source.height
        self.channels = channels
        self._source = source
        self._windows = windows
        self._percentiles = percentiles
        self._bits = bits

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        """Decode and scale, once, to [C, H, W], uint8 or uint16; in full size whatever `reduce` is.

        Raises:
            DatasetError: a file is damaged.
        """
        planes = self._source.planes()
        windows = self._windows or [percentile_window(histogram(plane), self._percentiles) for plane in planes]
        scaled = [window.table(self._bits)[plane] for window, plane in zip(windows, planes, strict=True)]
        pixels = torch.from_numpy(np.stack(scaled))
        return pixels if len(pixels) == self.channels else pixels.expand(self.channels, -1, -1).contiguous()


class _PillowPlanes:
    """Channels of an image that is no TIFF file: red, green and blue, or grey."""

    def __init__(self, data: bytes, *, num_channels: int, max_image_pixels: int | None) -> None:
        if num_channels not in (1, 3):
            raise DatasetError(f"it is no TIFF file, so it cannot hold {num_channels} channels")
        self._image = EncodedImage(data, channels=num_channels, max_image_pixels=max_image_pixels, bits=16)
        self.width, self.height = self._image.width, self._image.height

    def planes(self) -> np.ndarray:
        return self._image.to_tensor().numpy()


class _TiffPlanes:
    """Channels of a TIFF file: its pages, or the samples of one page."""

    def __init__(self, data: bytes, *, num_channels: int, max_image_pixels: int | None) -> None:
        self._data = data
        with _undamaged(), tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            shape, self._type = tuple(size for size in series.shape if size != 1), series.dtype
        shape = shape if len(shape) == 3 else (1, *shape)
        axes = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] == num_channels]
        if not axes:
            sizes = " x ".join(str(size) for size in series.shape)
            raise DatasetError(f"its array is {sizes}, but it must hold {num_channels} channels (file_channels=)")
        self._axis, self._shape = axes[0], shape
        self.height, self.width = shape[1:] if self._axis == 0 else shape[:2]
        if self._type.kind != "u" or self._type.itemsize > 2:
            raise DatasetError(f"its pixels are {self._type}; they must be whole numbers of 8 or 16 bits")
        if max_image_pixels is not None and self.width * self.height > max_image_pixels:
            raise DatasetError(
                f"{self.width} x {self.height} pixels are more than data.max_image_pixels={max_image_pixels}; "
                "raise it if the image is what it claims to be"
            )

    def planes(self) -> np.ndarray:
        with _undamaged(), tifffile.TiffFile(io.BytesIO(self._data)) as file:
            pixels = np.moveaxis(file.series[0].asarray().reshape(self._shape), self._axis, 0)
        return pixels.astype(np.uint16) * (_WIDEN if self._type.itemsize == 1 else 1)


def _read(root: str, file: str, label: str) -> bytes:
    """Read a file below the root."""
    path = os.path.join(root, file)
    require_inside(root, path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DatasetError(f"{label}: {error.strerror or error}") from error


def _open(root: str, file: str, label: str, max_image_pixels: int | None) -> EncodedImage:
    """Read the header of one channel's file."""
    data = _read(root, file, label)
    with _named(label):
        return EncodedImage(data, channels=1, max_image_pixels=max_image_pixels, bits=16)


@contextlib.contextmanager
def _named(label: str) -> Iterator[None]:
    """Put the name of a file before what is wrong with it."""
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{label}: {error}") from error


@contextlib.contextmanager
def _undamaged() -> Iterator[None]:
    """Turn what a damaged file makes tifffile raise into a `DatasetError`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a dozen kinds: TiffFileError, ValueError, struct.error, zlib.error, ...
        raise DatasetError(f"damaged file ({error or type(error).__name__})") from error
