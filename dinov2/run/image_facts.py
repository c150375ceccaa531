"""What each image of a dataset is: size, bits, channels, brightness, or why it cannot be read; found by loader workers.

Images are decoded whole, but for huge ones that can be read in parts, of which rows spread over the image are read.
Shapes: C channels, H rows, W columns.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.datasets.extended import image_path
from dinov2.data.datasets.image_source import RegionSource
from dinov2.data.raw_pixels import open_image, read_pixels
from dinov2.errors import DatasetError
from dinov2.run.stored_files import stored_as
from dinov2.run.workers import run_in_workers

NUM_BINS = 256  # of the brightness histograms
_BATCH = 8  # images that a worker looks at between two messages
_BAND_VALUES = 1 << 24  # values looked at at a time
_MAX_VALUES_READ = 1 << 28  # of an image that can be read in parts
_MAX_REASONS = 1000  # unreadable images that are remembered with their reason


@dataclass(frozen=True)
class ImageFacts:
    """One image that could be read; brightness is a fraction of full scale."""

    height: int  # px
    width: int  # px
    bits: int  # of a channel: 8 or 16
    highest: int  # value, of that many bits
    mean: np.ndarray  # [C] float64
    square: np.ndarray  # [C] float64, mean of the squares
    histogram: np.ndarray  # [C, NUM_BINS] float64, shares of the pixels
    is_grey: bool  # has several channels, all the same
    stored: str  # format, channels and bits of the file
    digest: int  # of the pixels, if asked for, else 0


@dataclass
class Brightness:
    """Brightness of all images with one number of channels, each image counted alike."""

    count: int
    mean: np.ndarray  # [C], sum over the images
    square: np.ndarray  # [C], sum over the images
    histogram: np.ndarray  # [C, NUM_BINS], sum over the images

    def add(self, facts: ImageFacts) -> None:
        """Count one more image."""
        self.count += 1
        self.mean += facts.mean
        self.square += facts.square
        self.histogram += facts.histogram

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel."""
        mean = self.mean / self.count
        variance = np.maximum(self.square / self.count - mean**2, 0)
        return mean.tolist(), np.sqrt(variance).tolist()


@dataclass
class SetFacts:
    """All images that were looked at, in the order of `indices`; those that cannot be read have height 0."""

    indices: np.ndarray  # [n] int64
    height: np.ndarray = field(init=False)  # [n] int32, px
    width: np.ndarray = field(init=False)  # [n] int32, px
    spread: np.ndarray = field(init=False)  # [n] float32, standard deviation of the channel that has the most
    level: np.ndarray = field(init=False)  # [n] float32, the step between two values of the image
    digest: np.ndarray = field(init=False)  # [n] uint64, 0 where not asked for
    kinds: Counter[tuple[int, int]] = field(default_factory=Counter)  # images by (channels, bits)
    stored: Counter[str] = field(default_factory=Counter)  # images by kind of file
    highest: dict[int, int] = field(default_factory=dict)  # highest value by bits
    brightness: dict[int, Brightness] = field(default_factory=dict)  # by number of channels
    num_grey: int = 0  # images of several channels that are all the same
    num_unreadable: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of the first unreadable images

    def __post_init__(self) -> None:
        count = len(self.indices)
        self.height, self.width = np.zeros(count, dtype=np.int32), np.zeros(count, dtype=np.int32)
        self.spread, self.level = np.zeros(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
        self.digest = np.zeros(count, dtype=np.uint64)

    @property
    def is_readable(self) -> np.ndarray:
        """[n] bool."""
        return self.height > 0

    @property
    def is_nearly_constant(self) -> np.ndarray:
        """[n] bool: values spread by less than one step of the image's, or 2 % of the dataset's usual spread."""
        readable = self.is_readable
        usual = float(np.median(self.spread[readable])) if readable.any() else 0.0
        return readable & (self.spread < np.maximum(self.level, 0.02 * usual))

    def add(self, place: int, facts: ImageFacts) -> None:
        """Note the image at one place of `indices`."""
        num_channels = len(facts.mean)
        self.height[place], self.width[place] = facts.height, facts.width
        self.spread[place] = np.sqrt(np.maximum(facts.square - facts.mean**2, 0)).max()
        self.level[place] = 1 / (2**facts.bits - 1)
        self.digest[place] = facts.digest
        self.kinds[num_channels, facts.bits] += 1
        self.stored[facts.stored] += 1
        self.highest[facts.bits] = max(self.highest.get(facts.bits, 0), facts.highest)
        self.num_grey += facts.is_grey
        zeros = np.zeros(num_channels)
        known = self.brightness.setdefault(
            num_channels, Brightness(0, zeros, zeros.copy(), np.zeros((num_channels, NUM_BINS)))
        )
        known.add(facts)

    def add_unreadable(self, path: str, reason: str) -> None:
        """Note an image that cannot be read."""
        self.num_unreadable += 1
        if len(self.reasons) < _MAX_REASONS:
            self.reasons.append((path, reason))


def inspect_images(
    dataset: Any, indices: np.ndarray, *, wants_digest: np.ndarray, num_workers: int, description: str
) -> SetFacts:
    """Look at images; the result does not depend on the number of workers.

    Args:
        dataset: images by index.
        indices: of the images, rising.
        wants_digest: [len(dataset)] bool, for which images the pixels are hashed.
        num_workers: processes; 0: everything in this one.
        description: for the progress bar.

    Raises:
        DatasetError: a worker was killed.
    """
    found = SetFacts(indices)
    place = 0
    for results in run_in_workers(
        _Inspection(dataset, wants_digest), indices, batch=_BATCH, num_workers=num_workers, description=description
    ):
        for facts in results:
            if isinstance(facts, str):
                found.add_unreadable(image_path(dataset, int(indices[place])), facts)
            else:
                found.add(place, facts)
            place += 1
    return found


class _Inspection(Dataset[ImageFacts | str]):
    """Facts about the image at an index, or why it cannot be read."""

    def __init__(self, dataset: Any, wants_digest: np.ndarray) -> None:
        self.dataset = dataset
        self.wants_digest = wants_digest

    def __getitem__(self, index: int) -> ImageFacts | str:
        try:
            image = open_image(self.dataset, index)
            stored = stored_as(image_path(self.dataset, index))
            return _look(image, stored=stored, wants_digest=bool(self.wants_digest[index]))
        except DatasetError as error:
            return str(error)
        except OSError as error:
            return f"{error.strerror or error}"


def _look(image: Any, *, stored: str, wants_digest: bool) -> ImageFacts:
    """Go through the pixels of one image."""
    counts = np.zeros((0, 0), dtype=np.int64)
    state = blake2b(digest_size=8)
    is_grey, size, bits = True, (0, 0), 8
    for size, band in _bands(image):
        bits = band.dtype.itemsize * 8
        if not len(counts):
            counts = np.zeros((len(band), 2**bits), dtype=np.int64)
            state.update(f"{band.dtype} {len(band)} {size}".encode())
        is_grey = is_grey and len(band) > 1 and bool((band[1:] == band[:1]).all())
        for number, channel in enumerate(band):
            counts[number] += np.bincount(channel.ravel(), minlength=counts.shape[1])
        if wants_digest:
            state.update(np.ascontiguousarray(band).data)
    levels = np.arange(counts.shape[1]) / (counts.shape[1] - 1)
    shares = counts / counts.sum(1, keepdims=True)
    return ImageFacts(
        height=size[0],
        width=size[1],
        bits=bits,
        highest=int(np.flatnonzero(counts.any(0))[-1]),
        mean=shares @ levels,
        square=shares @ levels**2,
        histogram=shares.reshape(len(shares), NUM_BINS, -1).sum(2),
        is_grey=is_grey,
        stored=stored,
        digest=int.from_bytes(state.digest(), "little") if wants_digest else 0,
    )


def _bands(image: Any) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Height and width of an image, and bands of its rows [C, rows, W]: all, or some if it is huge."""
    if not isinstance(image, RegionSource) or image.channels * image.height * image.width <= _BAND_VALUES:
        pixels = read_pixels(image).numpy()
        rows = _band_rows(pixels.shape[0], pixels.shape[2])
        for top in range(0, pixels.shape[1], rows):
            yield pixels.shape[1:], pixels[:, top : top + rows]
        return
    rows = _band_rows(image.channels, image.width)
    tops = range(0, image.height, rows)
    wanted = max(1, _MAX_VALUES_READ // (image.channels * image.width * rows))
    for number in np.unique(np.linspace(0, len(tops) - 1, min(wanted, len(tops))).round().astype(int)):
        band = image.read_region(tops[number], 0, min(rows, image.height - tops[number]), image.width)
        yield (image.height, image.width), band.numpy()


def _band_rows(num_channels: int, width: int) -> int:
    return max(1, _BAND_VALUES // (num_channels * width))
