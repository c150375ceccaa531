"""How `EMFolder` cuts arrays into planes, and which files it keeps open."""

import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.data.datasets.array_image import PixelArray, Plane
from dinov2.errors import DatasetError

_MAX_OPEN = 8  # files


@dataclass(frozen=True)
class Range:
    """Places along an axis; without a stop, all."""

    start: int
    stop: int | None


@dataclass(frozen=True)
class Cut:
    """How an array is cut into planes."""

    array: PixelArray
    rows: str
    columns: str
    channels: str | None
    along: str | None  # axis that the planes are perpendicular to; None: the array is one plane
    others: str  # axes gone through besides
    drops_alpha: bool  # of the samples of a pixel

    @classmethod
    def through(cls, array: PixelArray, axis: str, channel_axis: str | None) -> "Cut":
        """Cut an array perpendicularly to Z, Y or X.

        Raises:
            DatasetError: it lacks an axis.
        """
        if channel_axis is not None and channel_axis not in array.axes:
            raise DatasetError(f"its axes are {array.axes}; channel_axis={channel_axis.lower()} is none of them")
        channels = channel_axis or ("S" if "S" in array.axes else None)
        rest = [letter for letter in array.axes if letter not in ("Y", "X", channels)]
        depth = "Z" if "Z" in rest else (rest[-1] if rest else None)
        others = "".join(letter for letter in rest if letter != depth)
        if axis == "Z":
            return cls(array, "Y", "X", channels, depth, others, channel_axis is None)
        if depth is None:
            raise DatasetError(f"its axes are {array.axes}; axis={axis.lower()} needs a stack")
        return cls(array, depth, "X" if axis == "Y" else "Y", channels, axis, others, channel_axis is None)

    def num_planes(self, slices: Range) -> int:
        """Planes that are used."""
        first, stop = self._range(slices)
        return int(np.prod([self._size(axis) for axis in self.others], dtype=np.int64)) * (stop - first)

    def plane(self, number: int, slices: Range) -> Plane:
        """Plane by its number among those that are used.

        Raises:
            DatasetError: it is out of range.
        """
        first, stop = self._range(slices)
        rest, place = divmod(number, stop - first)
        fixed = {} if self.along is None else {self.along: first + place}
        for axis in reversed(self.others):
            rest, fixed[axis] = divmod(rest, self._size(axis))
        if rest:
            raise DatasetError(f"plane {number} is out of range; the file has {self.num_planes(slices)}")
        return Plane(self.array, self.rows, self.columns, self.channels, fixed, drops_alpha=self.drops_alpha)

    def _range(self, slices: Range) -> tuple[int, int]:
        size = 1 if self.along is None else self._size(self.along)
        stop = size if slices.stop is None else slices.stop
        if not slices.start < stop <= size:
            raise DatasetError(f"slice {stop - 1} is out of range; the file has 0..{size - 1}")
        return slices.start, stop

    def _size(self, axis: str) -> int:
        return self.array.shape[self.array.axes.index(axis)]


class OpenArrays:
    """Arrays kept open, the least recently used given up first; each process opens its own.

    Args:
        open_file: opens one by its path.
    """

    def __init__(self, open_file: Callable[[str], PixelArray]) -> None:
        self._open_file = open_file
        self._arrays: OrderedDict[str, PixelArray] = OrderedDict()
        self._process = os.getpid()

    def __getitem__(self, path: str) -> PixelArray:
        if self._process != os.getpid():  # a forked worker must not share the place in a file
            self._arrays = OrderedDict()
            self._process = os.getpid()
        if path not in self._arrays:
            self._arrays[path] = self._open_file(path)
            while len(self._arrays) > _MAX_OPEN:
                self._arrays.popitem(last=False)  # closed when nobody uses it any more
        self._arrays.move_to_end(path)
        return self._arrays[path]

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenArrays, (self._open_file,)
