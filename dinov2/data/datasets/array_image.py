"""Planes of arrays of any kind of number as images of 8 or 16 bits: cut out, scaled, and read in parts.

Shapes: C channels, H rows, W columns.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.decoders import MAX_IMAGE_PIXELS
from dinov2.errors import DatasetError

SCALINGS = ("dtype", "percentile", "window")
_TYPES = {8: np.uint8, 16: np.uint16}
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's
_SAMPLE_PX = 1 << 22  # looked at, about, for the percentiles of a larger plane
_SAMPLE_BLOCKS = 8  # down and across
_LARGEST_TABLE = 16  # bits of values that are scaled by a table


class PixelArray(Protocol):
    """An array in a file with a letter for each axis, e.g. ZYX, of which boxes can be read; see `TiffArray`."""

    axes: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    bits: int  # of a number, as far as they are used

    def read(self, box: Sequence[slice]) -> np.ndarray:
        """Read a box, with start and stop along each axis.

        Raises:
            DatasetError: the file is damaged.
        """
        ...

    def close(self) -> None:
        """Close the file."""
        ...


@dataclass(frozen=True)
class Plane:
    """What part of an array is an image."""

    array: PixelArray
    rows: str  # axis
    columns: str  # axis
    channels: str | None  # axis; None: one channel
    fixed: Mapping[str, int]  # place along each other axis
    drops_alpha: bool = False  # whether the last of 2 or 4 channels is transparency, which no image shows

    @property
    def height(self) -> int:
        return self._size(self.rows)

    @property
    def width(self) -> int:
        return self._size(self.columns)

    @property
    def num_channels(self) -> int:
        count = self._size(self.channels) if self.channels else 1
        return count - 1 if self.drops_alpha and count in (2, 4) else count

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Read a rectangle, [C, height, width] of the array's dtype.

        Raises:
            DatasetError: the file is damaged, or holds NaN or infinite numbers there.
        """
        parts = {axis: slice(place, place + 1) for axis, place in self.fixed.items()}
        parts |= {self.rows: slice(top, top + height), self.columns: slice(left, left + width)}
        if self.channels:
            parts[self.channels] = slice(0, self.num_channels)
        axes = self.array.axes
        pixels = self.array.read([parts[axis] for axis in axes])
        wanted = (self.channels or "") + self.rows + self.columns
        others = [place for place, axis in enumerate(axes) if axis not in wanted]
        pixels = pixels.transpose(*others, *(axes.index(axis) for axis in wanted))
        pixels = pixels.reshape(self.num_channels, height, width)
        if pixels.dtype.kind == "f":
            num_wrong = pixels.size - int(np.isfinite(pixels).sum())
            if num_wrong:
                raise DatasetError(f"{num_wrong} of its numbers are NaN or infinite; fill them in before training")
        return pixels

    def _size(self, axis: str) -> int:
        return self.array.shape[self.array.axes.index(axis)]


@dataclass(frozen=True)
class Scaling:
    """How numbers become brightness: those at or below one become 0, those at or above another become full scale.

    Args:
        kind: dtype: smallest and largest number of the type, for floats 0 and 1; percentile: shares of the plane's
            pixels; window: given numbers. None: dtype for 8 bits, percentile for others.
        low: percent, or number, that becomes 0.
        high: percent, or number, that becomes full scale.
    """

    kind: str | None
    low: float
    high: float

    def window(self, plane: Plane) -> tuple[float, float]:
        """Find the numbers for a plane.

        Raises:
            DatasetError: its file is damaged, or holds NaN.
        """
        array = plane.array
        kind = self.kind or ("dtype" if array.dtype.itemsize == 1 else "percentile")
        if kind == "window":
            return self.low, self.high
        if kind == "percentile":
            return _percentiles(_sample(plane), self.low, self.high)
        if array.dtype.kind in "fb":
            return 0.0, 1.0
        if array.dtype.kind == "u":
            return 0.0, float((1 << min(array.bits, 8 * array.dtype.itemsize)) - 1)
        info = np.iinfo(array.dtype)
        return float(info.min), float(info.max)

    def require_range(self, pixels: np.ndarray) -> None:
        """Refuse floats that have no known range.

        Raises:
            DatasetError: with kind dtype, there are numbers outside 0..1.
        """
        if self.kind == "dtype" and pixels.dtype.kind == "f" and pixels.size and not _is_share(pixels):
            raise DatasetError(
                f"its floats reach from {pixels.min():g} to {pixels.max():g}, and scaling=dtype takes 0..1; use "
                "scaling=percentile, or scaling=window with low= and high="
            )


class ArrayImage:
    """A plane of an array, or a part of it, as the pipeline takes it; a `RegionSource`.

    Args:
        plane: of an open array.
        scaling: of its numbers.
        window: finds the window of the plane, so that the caller can keep it; None: `scaling.window`.
        part: top, left, height and width of the image in the plane; None: all of it.
        channels: of the image. 1: RGB becomes grey; others: grey is repeated.
        bits: of a channel of the image, 8 or 16.
        max_image_pixels: most that is read at once; None: no limit. The plane may be larger.

    Raises:
        DatasetError: the plane has another number of channels.
    """

    def __init__(
        self,
        plane: Plane,
        *,
        scaling: Scaling,
        window: Callable[[], tuple[float, float]] | None = None,
        part: tuple[int, int, int, int] | None = None,
        channels: int = 3,
        bits: int = 8,
        max_image_pixels: int | None = MAX_IMAGE_PIXELS,
    ) -> None:
        self._top, self._left, self.height, self.width = part or (0, 0, plane.height, plane.width)
        self.channels = channels
        self._plane = plane
        self._scaling = scaling
        self._window = window or (lambda: scaling.window(plane))
        self._bits = bits
        self._max_pixels = max_image_pixels
        is_grey_of_colour = channels == 1 and plane.num_channels == 3
        if plane.num_channels not in (1, channels) and not is_grey_of_colour:
            raise DatasetError(f"it has {plane.num_channels} channels, but student.in_chans={channels}")

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        """Read all of it, in full size whatever `reduce` is.

        Raises:
            DatasetError: the file is damaged, holds NaN, or the image is too large to be read at once.
        """
        return self.read_region(0, 0, self.height, self.width)

    def read_region(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Read one rectangle of it, [C, height, width] uint8 or uint16.

        Raises:
            DatasetError: see `to_tensor`.
        """
        if self._max_pixels is not None and height * width > self._max_pixels:
            raise DatasetError(
                f"{width} x {height} pixels at once are more than data.max_image_pixels={self._max_pixels}; set "
                "tile_px= to take the image in parts, or raise the limit"
            )
        window = self._window()
        pixels = self._plane.read(self._top + top, self._left + left, height, width)
        self._scaling.require_range(pixels)
        scaled = _scale(pixels, window, bits=self._bits)
        if len(scaled) == 3 and self.channels == 1:
            grey = np.tensordot(_GREY_WEIGHTS, scaled, axes=1)
            scaled = np.round(grey).astype(scaled.dtype)[None]
        pixels_out = torch.from_numpy(scaled)
        return pixels_out if len(scaled) == self.channels else pixels_out.expand(self.channels, -1, -1).contiguous()


def _scale(pixels: np.ndarray, window: tuple[float, float], *, bits: int) -> np.ndarray:
    """Spread the numbers of a window over 0..full scale; a window without width gives 0."""
    low, high = window
    full_scale = (1 << bits) - 1
    if pixels.dtype == _TYPES[bits] and (low, high) == (0, full_scale):
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind in "u" and 8 * pixels.dtype.itemsize <= _LARGEST_TABLE:
        table = _spread(np.arange(1 << 8 * pixels.dtype.itemsize), low, high, bits)
        return np.take(table, pixels)
    return _spread(pixels, low, high, bits)


def _spread(numbers: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    if not high > low:
        return np.zeros(numbers.shape, dtype=_TYPES[bits])
    # float32 holds 24 bits, too few for 32-bit integers
    dtype = np.float32 if numbers.dtype == np.float32 or numbers.dtype.itemsize <= 2 else np.float64
    shares = (numbers.astype(dtype) - dtype(low)) / dtype(high - low)
    return np.round(np.clip(shares, 0, 1) * dtype((1 << bits) - 1)).astype(_TYPES[bits])


def _sample(plane: Plane) -> np.ndarray:
    """All pixels of a plane, or of a large one evenly spread blocks; the same ones each time."""
    if plane.height * plane.width <= _SAMPLE_PX:
        return plane.read(0, 0, plane.height, plane.width).reshape(-1)
    side = int((_SAMPLE_PX / _SAMPLE_BLOCKS**2) ** 0.5)
    height, width = min(side, plane.height), min(side, plane.width)
    tops, lefts = (
        np.linspace(0, size - length, _SAMPLE_BLOCKS).astype(int).tolist()
        for size, length in ((plane.height, height), (plane.width, width))
    )
    return np.concatenate([plane.read(top, left, height, width).reshape(-1) for top in tops for left in lefts])


def _percentiles(values: np.ndarray, low_pct: float, high_pct: float) -> tuple[float, float]:
    """Numbers at or below which two shares of the values lie.

    Source: NumPy's percentile, method inverted_cdf.
    """
    places = [max(0, int(np.ceil(len(values) * pct / 100)) - 1) for pct in (low_pct, high_pct)]
    if values.dtype.kind == "u" and 8 * values.dtype.itemsize <= _LARGEST_TABLE:  # counting is faster than sorting
        totals = np.cumsum(np.bincount(values))
        low, high = np.searchsorted(totals, places, side="right")
        return float(low), float(high)
    found = np.partition(values, places)
    return float(found[places[0]]), float(found[places[1]])


def _is_share(pixels: np.ndarray) -> bool:
    return bool(pixels.min() >= 0 and pixels.max() <= 1)
