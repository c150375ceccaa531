"""Pixels of `BBBC021`: the channels of one field of view, read together and scaled.

Shapes: C channels, H rows, W columns.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_adapters.bbbc021_scaling import Window, histogram, percentile_window
from data_adapters.contained_paths import require_inside
from dinov2.data.datasets.decoders import EncodedImage, require_image_pixels
from dinov2.data.datasets.tiff import TiffArray
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
        path = _path(root, file)
        with _named(self.label):
            kind = _TiffPlanes if _is_tiff(path) else _PillowPlanes
            self._image = kind(path, num_channels=num_channels, max_image_pixels=max_image_pixels)
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
        scaled = np.empty((len(planes), self.height, self.width), dtype=np.uint8 if self._bits == 8 else np.uint16)
        for window, plane, result in zip(windows, planes, scaled, strict=True):
            np.take(window.table(self._bits), plane, mode="clip", out=result)  # clip: faster, no value is out of range
        pixels = torch.from_numpy(scaled)
        return pixels if len(pixels) == self.channels else pixels.expand(self.channels, -1, -1).contiguous()


class _PillowPlanes:
    """Channels of an image that is no TIFF file: red, green and blue, or grey."""

    def __init__(self, path: str, *, num_channels: int, max_image_pixels: int | None) -> None:
        if num_channels not in (1, 3):
            raise DatasetError(f"it is no TIFF file, so it cannot hold {num_channels} channels (file_channels=)")
        data = Path(path).read_bytes()
        self._image = EncodedImage(data, channels=num_channels, max_image_pixels=max_image_pixels, bits=16)
        self.width, self.height = self._image.width, self._image.height

    def planes(self) -> np.ndarray:
        return self._image.to_tensor().numpy()


class _TiffPlanes:
    """Channels of a TIFF file: its pages, or the samples of one page."""

    def __init__(self, path: str, *, num_channels: int, max_image_pixels: int | None) -> None:
        self._path = path
        self._max_image_pixels = max_image_pixels
        with contextlib.closing(self._open()) as array:
            sizes = dict(zip(array.axes, array.shape, strict=True))
            if array.dtype not in (np.uint8, np.uint16):
                raise DatasetError(f"its pixels are {array.dtype}; they must be whole numbers of 8 or 16 bits")
        self.height, self.width = sizes["Y"], sizes["X"]
        others = [size for axis, size in sizes.items() if axis not in "YX" and size > 1]
        if others != [num_channels] * (num_channels > 1):
            found = " x ".join(str(size) for size in others) or "1"
            raise DatasetError(f"it holds {found} channels or pages, but must hold {num_channels} (file_channels=)")
        require_image_pixels(self.width, self.height, max_image_pixels)

    def planes(self) -> np.ndarray:
        with contextlib.closing(self._open()) as array:
            pixels = array.read([slice(0, size) for size in array.shape])
            rows, columns = array.axes.index("Y"), array.axes.index("X")
        planes = np.moveaxis(pixels, (rows, columns), (-2, -1)).reshape(-1, self.height, self.width)
        return planes if planes.dtype == np.uint16 else planes.astype(np.uint16) * _WIDEN

    def _open(self) -> TiffArray:
        return TiffArray(self._path, max_image_pixels=self._max_image_pixels)


def _is_tiff(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in _TIFF_STARTS


def _path(root: str, file: str) -> str:
    """Path of a file that is really below the root."""
    path = os.path.join(root, file)
    require_inside(root, path)
    return path


def _open(root: str, file: str, label: str, max_image_pixels: int | None) -> EncodedImage:
    """Read the header of one channel's file."""
    path = _path(root, file)
    with _named(label):
        return EncodedImage(Path(path).read_bytes(), channels=1, max_image_pixels=max_image_pixels, bits=16)


@contextlib.contextmanager
def _named(label: str) -> Iterator[None]:
    """Put the name of a file before what is wrong with it."""
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{label}: {error.strerror or error}") from error
    except DatasetError as error:
        raise DatasetError(f"{label}: {error}") from error
