"""Scaling of `BBBC021`: which pixel values of a channel become 0 and full scale, by percentiles of its values.

Values are those of 16 bits throughout; files of 8 bits are widened on reading.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dinov2.data.index import Index, counted, stored_index
from dinov2.errors import DatasetError

NUM_VALUES = 65_536
_FULL_SCALE = {8: 255, 16: 65_535}
_TYPES = {8: np.uint8, 16: np.uint16}


@dataclass(frozen=True)
class Window:
    """Pixel values that become 0 and full scale; those between are spread evenly, those outside are clipped."""

    low: int
    high: int  # if not above low, the channel is blank and all of it becomes 0

    def table(self, bits: int) -> np.ndarray:
        """Scaled value of each value of 16 bits, [65536], uint8 or uint16."""
        if self.high <= self.low:
            return np.zeros(NUM_VALUES, dtype=_TYPES[bits])
        shares = (np.arange(NUM_VALUES, dtype=np.float64) - self.low) / (self.high - self.low)
        return np.round(shares.clip(0, 1) * _FULL_SCALE[bits]).astype(_TYPES[bits])


FULL_WINDOW = Window(0, NUM_VALUES - 1)


def histogram(pixels: np.ndarray) -> np.ndarray:
    """Count the values of an array of uint16, [65536] int64."""
    return np.bincount(pixels.reshape(-1), minlength=NUM_VALUES)


def percentile_window(counts: np.ndarray, percentiles: tuple[float, float]) -> Window:
    """Find the values at or below which two shares of all pixels lie.

    Args:
        counts: pixels of each value, [65536], not all 0.
        percentiles: 0..100, of the values that become 0 and full scale.

    Source: NumPy's percentile, method inverted_cdf.
    """
    totals = np.cumsum(counts)
    ranks = [max(1, math.ceil(int(totals[-1]) * pct / 100)) for pct in percentiles]
    return Window(*(int(np.searchsorted(totals, rank)) for rank in ranks))


@dataclass(frozen=True)
class SharedWindows:
    """Windows that many images share, from a sample of them.

    Args:
        read: planes of an image by its index, one array of uint16 a channel; may raise `DatasetError`.
        files: paths of an image's files by its index; windows are found anew if size or time of a sampled file change.
        settings: what else the windows depend on, e.g. the channels.
        percentiles: low and high, see `percentile_window`.
        sample_size: images looked at for one set of windows, at most; evenly spread.
        cache_dir: where they are kept; None: nowhere.
    """

    read: Callable[[int], Sequence[np.ndarray]]
    files: Callable[[int], Sequence[str]]
    settings: tuple[str, ...]
    percentiles: tuple[float, float]
    sample_size: int
    cache_dir: str | None

    def find(self, members: Mapping[str, np.ndarray]) -> list[list[Window]]:
        """Find the windows of each set of images.

        Args:
            members: indices of the images of each set, by its name for messages.

        Returns:
            For each set, windows of the channels.

        Raises:
            DatasetError: no sampled image of a set can be read.
        """
        samples = {name: indices[_spread(len(indices), self.sample_size)] for name, indices in members.items()}
        index = stored_index(
            self.cache_dir,
            name="bbbc021_windows",
            key=[
                self.settings,
                self.percentiles,
                {
                    name: [_stamp(file) for at in indices for file in self.files(int(at))]
                    for name, indices in samples.items()
                },
            ],
            build=lambda: self._measure(samples),
        )
        lows, highs = (index[name].reshape(len(members), -1).tolist() for name in ("low", "high"))
        return [[Window(low, high) for low, high in zip(*pair, strict=True)] for pair in zip(lows, highs, strict=True)]

    def _measure(self, samples: Mapping[str, np.ndarray]) -> Index:
        """Read the samples."""
        images = ((name, int(at)) for name, indices in samples.items() for at in indices)
        counts: dict[str, list[np.ndarray]] = {}
        errors: dict[str, DatasetError] = {}
        for name, at in counted(images, description="brightness of channels", unit="images"):
            try:
                found = [histogram(plane) for plane in self.read(at)]
            except DatasetError as error:  # left to whoever wants this image
                errors.setdefault(name, error)
                continue
            before = counts.get(name)
            counts[name] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]
        for name, indices in samples.items():
            if name not in counts:
                raise DatasetError(
                    f"none of the {len(indices)} images looked at to scale {name} can be read; "
                    f"the first: {errors[name]}"
                ) from errors[name]
        windows = [percentile_window(total, self.percentiles) for name in samples for total in counts[name]]
        return Index(
            {
                "low": np.array([window.low for window in windows], dtype=np.int32),
                "high": np.array([window.high for window in windows], dtype=np.int32),
            }
        )


def _spread(count: int, limit: int) -> np.ndarray:
    """Up to `limit` places among `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def _stamp(file: str) -> tuple[str, int, int]:
    """Path, size and time of change of a file."""
    try:
        status = os.stat(file)
    except OSError:
        return os.path.abspath(file), -1, 0
    return os.path.abspath(file), status.st_size, status.st_mtime_ns
