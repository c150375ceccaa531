"""Files of `EMFolder` opened as arrays with named axes: TIFF, MRC, HDF5, Zarr, and what Pillow reads.

None of them leads out of the dataset's folder: links of HDF5 and Zarr to other files are not followed, and no codec
that runs code of the file is used.
"""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_adapters.contained_paths import require_inside, why_outside
from dinov2.data.datasets.array_image import PixelArray
from dinov2.data.datasets.decoders import EncodedImage
from dinov2.data.datasets.tiff import TiffArray
from dinov2.data.names import nearest
from dinov2.errors import ConfigError, DatasetError

TIFF = (".tif", ".tiff")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm")
MRC = (".mrc", ".mrcs", ".rec", ".st", ".map")
HDF5 = (".h5", ".hdf5", ".hdf")
ZARR = (".zarr",)
_USUAL_AXES = {2: "YX", 3: "ZYX", 4: "TZYX", 5: "TCZYX"}
# Codecs of Zarr that only compress or reorder; `pickle`, which runs code, is none of them.
_ZARR_CODECS = frozenset(
    "adler32 astype bitround blosc bytes bz2 crc32 crc32c delta endian fixedscaleoffset fletcher32 gzip "
    "jenkins_lookup3 lz4 lzma packbits quantize sharding_indexed shuffle transpose zlib zstd".split()
)


def open_array(path: str, *, array: str | None, axes: str | None, max_image_pixels: int | None) -> PixelArray:
    """Open a file whose content is an array; the kind is told by its extension.

    Args:
        path: of a TIFF, MRC or HDF5 file or a Zarr folder.
        array: which one of an HDF5 or Zarr file; None: the only one, or the first scale of OME-Zarr.
        axes: of an HDF5 or Zarr array, a letter each; None: the file's own, or YX, ZYX, TZYX, TCZYX.
        max_image_pixels: largest chunk that is decoded; None: no limit.

    Raises:
        ConfigError: the package that reads it is missing.
        DatasetError: it cannot be read.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending in TIFF:
        return TiffArray(path, max_image_pixels=max_image_pixels)
    if ending in MRC:
        return _MrcArray(path)
    kind = _Hdf5Array if ending in HDF5 else _ZarrArray
    return kind(path, array=array, axes=axes, max_image_pixels=max_image_pixels)


class PictureArray:
    """An image that Pillow reads, as an array SYX, decoded whole when a part of it is asked for.

    Args:
        data: the file's content.
        channels: 1 or 3.
        max_image_pixels: larger ones are refused; None: no limit.

    Raises:
        DatasetError: it cannot be read.
    """

    axes = "SYX"

    def __init__(self, data: bytes, *, channels: int, max_image_pixels: int | None) -> None:
        options = {"channels": channels, "max_image_pixels": max_image_pixels}
        self.bits = EncodedImage(data, **options).file_bits
        self._image = EncodedImage(data, **options, bits=self.bits)
        self.shape = (channels, self._image.height, self._image.width)
        self.dtype = np.dtype(np.uint8 if self.bits == 8 else np.uint16)
        self._pixels: np.ndarray | None = None

    def read(self, box: Sequence[slice]) -> np.ndarray:
        if self._pixels is None:
            self._pixels = self._image.to_tensor().numpy()
        return self._pixels[tuple(box)]

    def close(self) -> None:
        self._pixels = None


class _StoredArray:
    """An array of a package: indexed by slices, read only where it is asked for. Closed with its last reference."""

    _finish: Callable[[], Any] | None = None

    def __init__(self, data: Any, axes: str) -> None:
        self._data = data
        self.axes = axes
        self.shape = tuple(int(size) for size in data.shape)
        self.dtype = np.dtype(data.dtype)
        self.bits = 8 * self.dtype.itemsize
        if self.dtype.kind not in "uifb":
            raise DatasetError(f"its numbers are {self.dtype}; only integers and floats make an image")
        if len(axes) != len(self.shape) or len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes):
            raise DatasetError(
                f"its array has {len(self.shape)} axes {list(self.shape)}, which {axes or 'nothing'} does not name; "
                "set axes= to a letter for each, with Y and X"
            )

    def read(self, box: Sequence[slice]) -> np.ndarray:
        for axis, size, part in zip(self.axes, self.shape, box, strict=True):
            if not 0 <= part.start < part.stop <= size:
                raise DatasetError(f"slice {part.stop - 1} along {axis} is out of range; the file has 0..{size - 1}")
        with _damaged():
            return np.array(self._data[tuple(box)])

    def close(self) -> None:
        self._data = None
        if self._finish is not None:
            self._finish()


class _MrcArray(_StoredArray):
    """An MRC file, memory-mapped."""

    def __init__(self, path: str) -> None:
        with _needs("mrcfile", "mrc"):
            import mrcfile
        with _damaged():
            self._file = mrcfile.mmap(path, mode="r")
        self._finish = weakref.finalize(self, self._file.close)
        super().__init__(self._file.data, _USUAL_AXES.get(self._file.data.ndim, ""))


class _Hdf5Array(_StoredArray):
    """An array of an HDF5 file."""

    def __init__(self, path: str, *, array: str | None, axes: str | None, max_image_pixels: int | None) -> None:
        with _needs("h5py", "hdf5"):
            import h5py
        with _damaged():
            self._file = h5py.File(path, "r")
        self._finish = weakref.finalize(self, self._file.close)
        try:
            with _damaged():
                found: list[str] = []

                def note(name: str, item: Any) -> None:  # is not shown links to other files
                    if isinstance(item, h5py.Dataset) and item.ndim >= 2 and item.dtype.kind in "uifb":
                        found.append(name)

                self._file.visititems(note)
                data = self._file[_choose(found, array)]
                if data.external or data.is_virtual:
                    raise DatasetError("its array lies in other files; store the numbers in the file itself")
            _require_chunks(data.chunks, max_image_pixels)
            super().__init__(data, (axes or _USUAL_AXES.get(data.ndim, "")).upper())
        except BaseException:
            self._finish()
            raise


class _ZarrArray(_StoredArray):
    """An array of a Zarr folder."""

    def __init__(self, path: str, *, array: str | None, axes: str | None, max_image_pixels: int | None) -> None:
        with _needs("zarr", "zarr"):
            import zarr

        class Inside(zarr.storage.LocalStore):
            """Files of the folder, and none that a link leads to."""

            async def get(self, key: str, *args: Any, **options: Any) -> Any:
                require_inside(path, os.path.join(path, key))
                return await super().get(key, *args, **options)

        with _damaged():
            node = zarr.open(Inside(path, read_only=True), mode="r")
            if isinstance(node, zarr.Group):
                named, own_axes = _ome_scale(dict(node.attrs))
                members = node.members(max_depth=None)
                found = [
                    name
                    for name, item in members
                    if isinstance(item, zarr.Array) and item.ndim >= 2 and item.dtype.kind in "uifb"
                ]
                node = node[_choose(found, array or (named if named in found else None))]
                axes = axes or (own_axes if len(own_axes or "") == node.ndim else None)
            unknown = {name.removeprefix("numcodecs.") for name in _codecs(node.metadata.to_dict())} - _ZARR_CODECS
            if unknown:
                raise DatasetError(f"its codec {min(unknown)!r} is not known to be safe; store it with blosc or zstd")
        _require_chunks(node.chunks, max_image_pixels)
        super().__init__(node, (axes or _USUAL_AXES.get(node.ndim, "")).upper())


def _choose(found: Sequence[str], wanted: str | None) -> str:
    """Name of the array to read."""
    if wanted is not None:
        if wanted.strip("/") not in found:
            raise DatasetError(f"it has no array {wanted!r} of numbers with two axes or more{nearest(wanted, found)}")
        return wanted.strip("/")
    if len(found) != 1:
        names = ", ".join(sorted(found)[:20]) or "none"
        raise DatasetError(f"it holds {len(found)} arrays of numbers with two axes or more ({names}); array= names one")
    return found[0]


def _require_chunks(chunks: Sequence[int] | None, max_image_pixels: int | None) -> None:
    size = int(np.prod(chunks, dtype=np.float64)) if chunks else 0
    if max_image_pixels is not None and size > max_image_pixels:
        raise DatasetError(
            f"its chunks hold {size} numbers each, more than data.max_image_pixels={max_image_pixels}; store it in "
            "smaller chunks"
        )


def _ome_scale(attributes: dict[str, Any]) -> tuple[str | None, str | None]:
    """Path of the full resolution and axes of an OME-Zarr image, from its attributes; None each for others."""
    try:
        image = (attributes.get("ome") or attributes)["multiscales"][0]
        path = str(image["datasets"][0]["path"])
        axes = "".join(axis["name"] for axis in image.get("axes", ()))
    except (KeyError, IndexError, TypeError, AttributeError):
        return None, None
    return (None if why_outside(path) else path), axes or None


def _codecs(metadata: dict[str, Any]) -> Iterator[str]:
    """Names of all codecs in the metadata of a Zarr array."""

    def names(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from (value[key] for key in ("id", "name") if isinstance(value.get(key), str))
            configuration = value.get("configuration")
            for key in ("codecs", "index_codecs"):  # of shards
                yield from names((configuration or {}).get(key))
        elif isinstance(value, list | tuple):
            for item in value:
                yield from names(item)

    for key in ("codecs", "filters", "compressor"):
        yield from names(metadata.get(key))


@contextmanager
def _needs(package: str, extra: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"reading this kind of file needs the package {package}; install the extra: "
            f"pip install 'dinov2-adapt[{extra}]'"
        ) from error


@contextmanager
def _damaged() -> Iterator[None]:
    """Turn what the packages raise on damaged files into a `DatasetError`."""
    try:
        yield
    except (DatasetError, ConfigError, MemoryError):
        raise
    except Exception as error:  # each package raises kinds of its own
        text = " ".join(str(error).split())
        raise DatasetError(f"damaged file ({text or type(error).__name__})") from error


def read_bytes(path: str) -> bytes:
    """Content of a file.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DatasetError(error.strerror or str(error)) from error
