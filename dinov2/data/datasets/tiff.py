"""TIFF files as arrays with named axes, of which a box is read without the rest of the file.

Axes: Y rows, X columns, S samples of a pixel (red, green, blue), and what ImageJ, OME or the order of the pages tells
about the others, such as Z, T or C; I or Q where nothing is told. Uncompressed pixels that lie in one piece are
memory-mapped; of tiles and strips, only those are decoded that the box touches.

Source: TIFF 6.0 and BigTIFF; axes and decoding by tifffile, compressions besides deflate and LZMA by imagecodecs.
"""

import itertools
import logging
import math
import os
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import tifffile

from dinov2.data.datasets.decoders import MAX_IMAGE_PIXELS
from dinov2.errors import DatasetError

_PLANE = "YX"
_BIG_TIFF = 43  # the number after the byte order; 42 in others
_MIN_IS_WHITE, _PALETTE, _CMYK = 0, 3, 5  # values of the tag PhotometricInterpretation
# Other files that a file's metadata name are never opened, so that no path leaves the dataset's folder. tifffile's
# constructor offers no public name for the first.
_ONE_FILE = {"_multifile": False, "is_mmstack": False, "is_ndtiff": False, "is_micromanager": False}


class TiffArray:
    """The first image or stack of a TIFF file; nothing but headers is read at first. Closed with its last reference.

    Args:
        path: of the file.
        max_image_pixels: largest tile or strip that is decoded; None: no limit. The image may be larger.

    Attributes:
        axes: one letter a dimension, e.g. ZYX.
        shape: of the array.
        dtype: in the machine's byte order; integers, floats or bool.
        bits: of a sample, as the file tells; 12 in 16 is known here.

    Raises:
        DatasetError: the file cannot be read, is truncated, or holds no pixels of these kinds.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_image_pixels: int | None = MAX_IMAGE_PIXELS) -> None:
        self._max_pixels = max_image_pixels
        self._path = os.fspath(path)
        with _damaged(), _silent():
            with open(self._path, "rb") as file:
                _require_whole_chain(file)
            self._file = tifffile.TiffFile(self._path, **_ONE_FILE)
        try:
            with _damaged(), _silent():
                self._open()
        except BaseException:
            self._file.close()
            raise
        self._finish = weakref.finalize(self, self._file.close)  # also where nobody closes it

    def _open(self) -> None:
        """Find the first series and how it is read."""
        self._series = self._file.series[0]
        page = self._series.keyframe
        self.axes = str(self._series.axes)
        self.shape = tuple(int(size) for size in self._series.shape)
        dtype = self._series.dtype
        if dtype is None or dtype.kind not in "uifb" or page.photometric == _CMYK:
            kind = "CMYK" if page.photometric == _CMYK else page.dtype or f"{page.bitspersample} bits"
            raise DatasetError(f"its pixels are {kind}; store grey or RGB as integers or floats")
        self.dtype = dtype.newbyteorder("=")
        self.bits = int(page.bitspersample)
        if not set(_PLANE) <= set(self.axes):
            raise DatasetError(f"its axes are {self.axes}; an image needs Y and X")
        self._num_outer = len(self.shape) - len(page.shape)  # axes that count pages
        offset = self._series.dataoffset
        self._mapped = None if offset is None else self._map(offset, self.shape)
        self._colours = self._palette()

    def close(self) -> None:
        """Close the file; arrays that were read stay."""
        self._mapped = None
        self._finish()

    def read(self, box: Sequence[slice]) -> np.ndarray:
        """Read a box.

        Args:
            box: start and stop along each axis.

        Returns:
            A copy, of the box's shape and the array's dtype. Of images with a palette, and of those in which 0 is
            white, the brightness.

        Raises:
            DatasetError: it is not inside the array, or this part of the file is damaged.
        """
        self._require_inside(box)
        with _damaged():
            if self._mapped is not None:
                pixels = np.array(self._mapped[tuple(box)], dtype=self.dtype)
            else:
                pixels = self._read_pages(box[: self._num_outer], box[self._num_outer :])
        return self._brightness(pixels)

    def _map(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """Map pixels that lie in one piece."""
        stored = self._series.dtype.newbyteorder(self._file.byteorder)
        self._require_bytes(offset + math.prod(shape) * stored.itemsize)
        return np.memmap(self._path, dtype=stored, mode="r", offset=offset, shape=shape)

    def _require_bytes(self, end: int) -> None:
        size = self._file.filehandle.size
        if end > size:
            raise DatasetError(f"the file is truncated: its pixels end at byte {end}, the file at byte {size}")

    def _require_inside(self, box: Sequence[slice]) -> None:
        for axis, size, part in zip(self.axes, self.shape, box, strict=True):
            if not 0 <= part.start < part.stop <= size:
                outside = part.stop - 1 if part.start >= 0 else part.start
                kind = "page or slice" if axis not in _PLANE else "pixel"
                raise DatasetError(f"{kind} {outside} along {axis} is out of range; the file has 0..{size - 1}")

    def _palette(self) -> np.ndarray | None:
        """Brightness of each value of an image with a palette, [values] in the array's dtype."""
        page = self._series.keyframe
        if page.photometric != _PALETTE or page.colormap is None or self.dtype.kind != "u":
            return None
        grey = np.array([0.299, 0.587, 0.114]) @ np.asarray(page.colormap, dtype=np.float64)  # ITU-R BT.601
        return np.round(grey / 65535 * np.iinfo(self.dtype).max).astype(self.dtype)

    def _brightness(self, pixels: np.ndarray) -> np.ndarray:
        if self._colours is not None:
            return self._colours[np.minimum(pixels, len(self._colours) - 1)]
        if self._series.keyframe.photometric != _MIN_IS_WHITE or self.dtype.kind == "f":
            return pixels
        return ~pixels if self.dtype.kind == "b" else (1 << self.bits) - 1 - pixels

    def _read_pages(self, outer: Sequence[slice], inner: Sequence[slice]) -> np.ndarray:
        """Read the same box of each page in `outer`."""
        sizes = [part.stop - part.start for part in outer]
        counts = self.shape[: self._num_outer]
        pages = [
            self._read_page(sum(place * math.prod(counts[axis + 1 :]) for axis, place in enumerate(places)), inner)
            for places in itertools.product(*(range(part.start, part.stop) for part in outer))
        ]
        return np.stack(pages).reshape(*sizes, *pages[0].shape)

    def _read_page(self, number: int, inner: Sequence[slice]) -> np.ndarray:
        """Read a box of one page."""
        page, key = self._series.pages[number], self._series.keyframe
        if page is not None and key.is_final and _is_one_piece(page):
            return np.array(self._map(page.dataoffsets[0], key.shape)[tuple(inner)], dtype=self.dtype)
        box = dict(zip(key.axes, inner, strict=True))
        # tifffile's order of a page's dimensions: separate planes of samples, depth, rows, columns, samples
        samples = box.get("S", slice(0, 1))
        separate, together = (samples, slice(0, 1)) if key.shaped[0] > 1 else (slice(0, 1), samples)
        parts = (separate, box.get("Z", slice(0, 1)), box["Y"], box["X"], together)
        pixels = np.zeros([part.stop - part.start for part in parts], dtype=self.dtype)
        for index in self._segments(key, parts) if page is not None else ():
            self._paste(page, index, parts, pixels)
        order = {"Z": 1, "Y": 2, "X": 3, "S": 0 if key.shaped[0] > 1 else 4}
        kept = [order[axis] for axis in key.axes]
        others = [axis for axis in range(5) if axis not in kept]
        return pixels.transpose(*others, *kept).reshape([pixels.shape[axis] for axis in kept])

    def _segments(self, page: Any, parts: Sequence[slice]) -> Iterator[int]:
        """Numbers of the tiles or strips that a box touches."""
        _, depth, height, width, _ = page.shaped
        tile = (page.tiledepth, page.tilelength, page.tilewidth) if page.is_tiled else (1, page.rowsperstrip, width)
        rows_px = min(tile[1], height) if not page.is_tiled else tile[1]
        if self._max_pixels is not None and rows_px * tile[2] > self._max_pixels:
            raise DatasetError(
                f"its {'tiles' if page.is_tiled else 'strips'} hold {tile[2]} x {rows_px} pixels each, more than "
                f"data.max_image_pixels={self._max_pixels}; store it in smaller tiles"
            )
        counts = [-(-size // step) for size, step in zip((depth, height, width), tile, strict=True)]
        touched = [
            range(part.start // step, -(-part.stop // step)) for part, step in zip(parts[1:4], tile, strict=True)
        ]
        for plane, layer, row, column in itertools.product(range(parts[0].start, parts[0].stop), *touched):
            yield ((plane * counts[0] + layer) * counts[1] + row) * counts[2] + column

    def _paste(self, page: Any, index: int, parts: Sequence[slice], pixels: np.ndarray) -> None:
        """Decode one tile or strip and copy what the box shares with it."""
        if index >= len(page.dataoffsets) or index >= len(page.databytecounts):
            raise DatasetError(f"it names {len(page.dataoffsets)} of its tiles or strips; part {index} is missing")
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if count == 0:  # an empty part, left 0
            return
        self._require_bytes(offset + count)
        data = os.pread(self._file.filehandle.fileno(), count, offset)
        decoded, place, _ = page.decode(data, index, jpegtables=page.jpegtables)
        if decoded is None:
            return
        segment = decoded[None]  # [1, depth, rows, columns, samples]
        source, target = [], []
        for part, first, size in zip(parts, place, segment.shape, strict=True):
            low, high = max(part.start, first), min(part.stop, first + size)
            source.append(slice(low - first, high - first))
            target.append(slice(low - part.start, high - part.start))
        pixels[tuple(target)] = segment[tuple(source)]


def _require_whole_chain(file: BinaryIO) -> None:
    """Follow the pages' directories to the last; tifffile goes round circles of them, and drops pages that are cut off.

    A file whose start is not that of a TIFF file is left to tifffile.

    Raises:
        DatasetError: they lead out of the file or round in a circle.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is None or len(start) < 8:
        return
    is_big = struct.unpack(f"{order}H", start[2:4])[0] == _BIG_TIFF
    count_format, place_format, tag_size = (f"{order}Q", f"{order}Q", 20) if is_big else (f"{order}H", f"{order}I", 12)
    place = struct.unpack(place_format, start[8:16] if is_big else start[4:8])[0]
    seen: set[int] = set()
    while place:
        if place in seen:
            raise DatasetError(f"damaged TIFF file: page {len(seen)} leads back to one before it")
        seen.add(place)
        try:
            file.seek(min(place, size))
            num_tags = struct.unpack(count_format, file.read(struct.calcsize(count_format)))[0]
            file.seek(min(file.tell() + num_tags * tag_size, size))
            place = struct.unpack(place_format, file.read(struct.calcsize(place_format)))[0]
        except struct.error as error:
            raise DatasetError(f"the file is truncated: page {len(seen) - 1} is cut off; copy it anew") from error


def _is_one_piece(page: Any) -> bool:
    """Tell whether the strips of a page follow each other."""
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    return bool(ends) and tuple(page.dataoffsets[1:]) == tuple(ends[:-1])


@contextmanager
def _silent() -> Iterator[None]:
    """Keep tifffile from logging what becomes an error here."""
    logger = logging.getLogger("tifffile")

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


@contextmanager
def _damaged() -> Iterator[None]:
    """Turn what a damaged file, or a missing codec, makes tifffile raise into a `DatasetError`."""
    try:
        yield
    except (DatasetError, MemoryError):
        raise
    except OSError as error:
        raise DatasetError(error.strerror or str(error)) from error
    except Exception as error:  # tifffile and its codecs raise a dozen kinds: ValueError, struct.error, zlib.error
        text = " ".join(str(error).split())
        if "imagecodecs" in text:
            raise DatasetError(
                f"its compression needs the package imagecodecs ({text}); install the extra: "
                "pip install 'dinov2-adapt[tiff]'"
            ) from error
        raise DatasetError(f"damaged or unknown TIFF file ({text or type(error).__name__})") from error
