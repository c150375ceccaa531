"""`EMFolder`: a folder of micrographs of any kind and depth; slices of stacks, and tiles of large images, are images.

    micrographs/
        liver/grid1/image_001.tif      8, 16 or 32 bits; class liver, as for ImageFolder
        liver/grid1/stack.tif          31 pages: 31 images
        brain/volume.mrc               needs the extra mrc
        brain/volume.h5                needs the extra hdf5; array=volumes/raw names one of several arrays, and
                                       axes=yxs the axes of one in colour
        brain/volume.zarr/             needs the extra zarr; OME-Zarr names its array itself
        scan.png                       also .jpg .bmp .webp .pgm .ppm; no label

Dataset string: `EMFolder:root=micrographs`, with `split=train`, `split=val` and `split=test` for parts without a common
file, or folder with `split_by=folder`.

Stacks: the images are planes of Y and X, one for each place along all other axes; `axis=y` or `axis=x` cuts a stack the
other ways, `slices=10-19` takes some along that axis, and `channel_axis=c` makes the planes along C the channels of one
image. Brightness: `scaling=dtype`, `scaling=percentile:low=0.1:high=99.9` (of each plane), or
`scaling=window:low=-200:high=1800` in the file's numbers; without it, 8 bits are kept as they are and others scaled by
percentiles. `bits=16` gives images of 16 bits. `tile_px=1024` cuts each plane into tiles of that side, so that a
huge image is as many images as it has tiles, the same ones each time; of uncompressed and tiled TIFF files, MRC, HDF5
and Zarr, only what is needed is read.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from data_adapters.em_arrays import HDF5, MRC, PICTURES, TIFF, ZARR, PictureArray, open_array, read_bytes
from data_adapters.em_planes import Cut, OpenArrays, Range
from dinov2.data.datasets.array_image import SCALINGS, ArrayImage, PixelArray, Plane, Scaling
from dinov2.data.datasets.decoders import EncodedImage
from dinov2.data.datasets.extended import ExtendedVisionDataset, unreadable
from dinov2.data.datasets.folder_images import FolderImages, comma_list
from dinov2.data.datasets.image_source import ImageSource
from dinov2.data.folder_scan import scan_images
from dinov2.data.index import Index, counted, stored_index
from dinov2.errors import ConfigError, DatasetError

_AXES = ("z", "y", "x")
_SLICES = re.compile(r"(\d+)(?:-(\d+))?")
_PROBE_PX = 64
_MAX_WINDOWS = 1 << 16  # planes whose window is kept
_DEFAULT_PERCENTILES = (0.1, 99.9)


class EMFolder(ExtendedVisionDataset):
    """Planes, or tiles of planes, of all files below a folder, in the order of the files' paths.

    Args:
        root: the folder; `~` is the home folder.
        axis: z, y or x: what the planes of a stack are perpendicular to.
        slices: place or range of places (0-9, both ends counted) along that axis; None: all.
        channel_axis: axis whose planes are the channels of an image, e.g. c; None: each plane is an image, of RGB if
            its pixels have samples.
        array: path of the array in HDF5 and Zarr files; needed where there are several.
        axes: letters of the axes of arrays in HDF5 and Zarr files; None: their own, or YX, ZYX, TZYX, TCZYX.
        scaling: dtype, percentile or window; None: see above.
        low: what becomes 0, percent or number; needed for window.
        high: what becomes full scale, likewise.
        tile_px: side of the tiles; None: whole planes. Tiles at the right and lower edge overlap their neighbours.
        classes: names with commas; only files of these classes.
        exclude: patterns with commas, see `ImageFolder`.
        label_level: level of the folders that are the classes; 0: no labels.
        options: arguments of `ExtendedVisionDataset`; `split_by` as for `ImageFolder`. All images of a file are in one
            split.

    Raises:
        ConfigError: an argument is wrong, or a package that reads one of the files is missing.
        DatasetError: the folder is missing, or holds no image that can be read.
    """

    scans_folder = True

    def __init__(
        self,
        *,
        root: str,
        axis: str = "z",
        slices: str | None = None,
        channel_axis: str | None = None,
        array: str | None = None,
        axes: str | None = None,
        scaling: str | None = None,
        low: float | None = None,
        high: float | None = None,
        tile_px: int | None = None,
        classes: str | None = None,
        exclude: str | None = None,
        label_level: int = 1,
        **options: Any,
    ) -> None:
        self._channel_axis = None if channel_axis is None else channel_axis.upper()
        super().__init__(**options)
        self._require(axis.lower() in _AXES, f"axis={axis}", "z, y or x")
        self._require(tile_px is None or tile_px >= 1, f"tile_px={tile_px}", "at least 1")
        self._require(label_level >= 0, f"label_level={label_level}", "at least 0")
        self._require(classes is None or label_level > 0, "label_level=0", "left out beside classes=")
        self.tile_px = tile_px
        self.scaling = self._read_scaling(scaling, low, high)
        self._axis = axis.upper()
        self._array, self._axes_letters = array, axes
        self._slices = self._read_slices(slices)
        self._opened = OpenArrays(self._open)
        self._windows: dict[tuple[int, int], tuple[float, float]] = {}
        self.root = os.path.expanduser(root)
        files = scan_images(
            self.root,
            cache_dir=self.cache_dir,
            exclude=comma_list(exclude, "dataset EMFolder: exclude") or (),
            extensions=(*TIFF, *PICTURES, *MRC, *HDF5),
            folder_extensions=ZARR,
        )
        self._files = _Files(self, files, label_level, comma_list(classes, "dataset EMFolder: classes"))
        self._planes, heights, widths = self._find_shapes(files)
        side = tile_px or np.maximum(heights, widths).clip(min=1)
        num_tiles = np.maximum(1, -(-heights // side)) * np.maximum(1, -(-widths // side))
        self._ends = np.cumsum(self._planes * num_tiles)  # number of the image after the last of each file

    def __len__(self) -> int:
        return int(self._ends[-1])

    def path(self, index: int) -> str:
        """File, with plane and tile if it has several."""
        return self._name(*self._place(index))

    def file(self, index: int) -> str:
        """File that an image is in."""
        return self._files.path(self._place(index)[0])

    def get_target(self, index: int) -> int | None:
        return self._files.get_target(self._place(index)[0])

    @property
    def class_names(self) -> list[str]:
        return self._files.class_names

    def get_targets(self) -> np.ndarray | None:
        targets = self._files.get_targets()
        return None if targets is None else targets[self._file_of_each()]

    def groups(self) -> np.ndarray:
        """Number of the group of each image; without `split_by`, each file is a group."""
        groups = self._files.groups()
        files = self._file_of_each()
        return files if groups is None else groups[files]

    def columns(self) -> dict[str, Callable[[], np.ndarray]]:
        of_files = self._files.columns()
        columns = super().columns() | {"file": lambda: of_files["path"]()[self._file_of_each()]}
        columns["group"] = lambda: of_files["group" if "group" in of_files else "path"]()[self._file_of_each()]
        columns["slice"] = lambda: self._places()[1] + self._slices.start
        if self.tile_px is not None:
            columns["tile"] = lambda: self._places()[2]
        return columns

    def require_channels(self) -> None:
        """Any number of channels, if an axis gives them; else 1 or 3."""
        if self._channel_axis is None:
            super().require_channels()
        elif self._channel_axis in "YXZ" or len(self._channel_axis) != 1:
            raise ConfigError(
                f"dataset EMFolder: channel_axis={self._channel_axis.lower()} must be a letter other than z, y and x"
            )

    def encoded_image(self, index: int) -> ImageSource:
        file, plane, tile = self._place(index)
        if _is_picture(self._files.path(file)):
            return self._picture(file, tile)
        found = self._plane(file, plane)
        return ArrayImage(
            found,
            scaling=self.scaling,
            window=lambda: self._window(file, plane, found),
            part=self._part(found.height, found.width, tile),
            channels=self.channels,
            bits=self.bits,
            max_image_pixels=self.max_image_pixels,
        )

    def probe(self, file: int) -> None:
        """Read a little of the first plane of a file.

        Raises:
            DatasetError: it cannot be read.
        """
        if _is_picture(self._files.path(file)):
            self._picture(file, 0).to_tensor()
            return
        plane = self._plane(file, 0)
        plane.read(0, 0, min(_PROBE_PX, plane.height), min(_PROBE_PX, plane.width))

    def _picture(self, file: int, tile: int) -> ImageSource:
        """Image that Pillow reads."""
        data = read_bytes(self._files.path(file))
        options = {"channels": self.channels, "max_image_pixels": self.max_image_pixels}
        image = EncodedImage(data, **options)
        is_kept = self.scaling.kind == "dtype" or (self.scaling.kind is None and image.file_bits == 8)
        if is_kept and self.tile_px is None:
            return EncodedImage(data, **options, bits=self.bits) if self.bits != 8 else image
        plane = Plane(PictureArray(data, **options), "Y", "X", "S", {})
        part = self._part(plane.height, plane.width, tile)
        return ArrayImage(plane, scaling=self.scaling, part=part, bits=self.bits, **options)

    def _open(self, path: str) -> PixelArray:
        return open_array(path, array=self._array, axes=self._axes_letters, max_image_pixels=self.max_image_pixels)

    def _plane(self, file: int, number: int) -> Plane:
        """Plane of a file by its number among those that are used."""
        array = self._opened[self._files.path(file)]
        return Cut.through(array, self._axis, self._channel_axis).plane(number, self._slices)

    def _window(self, file: int, number: int, plane: Plane) -> tuple[float, float]:
        """Window of a plane, kept so that its other tiles and the next pass need not look for it again."""
        key = (file, number)
        if key not in self._windows:
            if len(self._windows) >= _MAX_WINDOWS:
                self._windows.clear()
            self._windows[key] = self.scaling.window(plane)
        return self._windows[key]

    def _find_shapes(self, files: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of planes of each file of the split, their height and width in px, int64; headers are read once."""
        paths = files["path"]

        def measure() -> Index:
            found = np.empty((len(paths), 3), dtype=np.int64)
            for row, path in enumerate(counted(paths, description=f"reading headers in {self.root}")):
                found[row] = self._shape(os.path.join(self.root, os.fsdecode(path)))
            return Index({"planes": found[:, 0], "height": found[:, 1], "width": found[:, 2]})

        def is_current(index: Index) -> bool:
            """Tell whether the first file that could not be read still cannot, as for want of a package."""
            unread = np.flatnonzero(index["planes"] == 0)
            return not len(unread) or self._shape(os.path.join(self.root, os.fsdecode(paths[int(unread[0])])))[0] == 0

        settings = [self._axis, self._channel_axis, self._slices.start, self._slices.stop, self._array]
        shapes = stored_index(
            None if files.path is None else self.cache_dir,
            name="planes",
            key=["planes", 1, files.digest, *settings, self._axes_letters, self.tile_px is not None],
            build=measure,
            is_current=is_current,
        )
        rows = np.fromiter((self._files.row(file) for file in range(len(self._files))), dtype=np.int64)
        # a file that cannot be read counts as one image, whose use will say so
        return np.maximum(shapes["planes"][rows], 1), shapes["height"][rows], shapes["width"][rows]

    def _shape(self, path: str) -> tuple[int, int, int]:
        """Planes, height and width of a file; no plane if it cannot be read, no size where none is needed."""
        try:
            if _is_picture(path):
                if self.tile_px is None:
                    return 1, 0, 0
                image = EncodedImage(read_bytes(path), channels=3, max_image_pixels=self.max_image_pixels)
                return 1, image.height, image.width
            array = self._open(path)
            try:
                cut = Cut.through(array, self._axis, self._channel_axis)
                plane = cut.plane(0, self._slices)
                return cut.num_planes(self._slices), plane.height, plane.width
            finally:
                array.close()
        except DatasetError:
            return 0, 0, 0

    def _part(self, height: int, width: int, tile: int) -> tuple[int, int, int, int] | None:
        """Top, left, height and width of a tile; those at the edges are moved inside."""
        if self.tile_px is None:
            return None
        row, column = divmod(tile, max(1, -(-width // self.tile_px)))
        top = max(0, min(row * self.tile_px, height - self.tile_px))
        left = max(0, min(column * self.tile_px, width - self.tile_px))
        return top, left, min(self.tile_px, height), min(self.tile_px, width)

    def _place(self, index: int) -> tuple[int, int, int]:
        """File, plane and tile of an image."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} images")
        file = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[file - 1]) if file else 0)
        num_planes = int(self._planes[file])
        num_tiles = int(self._ends[file] - (self._ends[file - 1] if file else 0)) // num_planes
        return file, *divmod(within, num_tiles)

    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """File, plane and tile of each image, int64."""
        files = self._file_of_each()
        starts = np.concatenate([[0], self._ends[:-1]])
        num_tiles = np.diff(self._ends, prepend=0) // self._planes
        within = np.arange(len(self)) - starts[files]
        return files, within // num_tiles[files], within % num_tiles[files]

    def _file_of_each(self) -> np.ndarray:
        return np.repeat(np.arange(len(self._ends)), np.diff(self._ends, prepend=0))

    def _name(self, file: int, plane: int, tile: int) -> str:
        name = self._files.path(file)
        if self._planes[file] > 1:
            name += f", slice {plane + self._slices.start}"
        return name if self.tile_px is None else f"{name}, tile {tile}"

    def _require(self, holds: bool, setting: str, rule: str) -> None:
        if not holds:
            raise ConfigError(f"dataset EMFolder: {setting} must be {rule}")

    def _read_scaling(self, kind: str | None, low: float | None, high: float | None) -> Scaling:
        """Check and complete `scaling`, `low` and `high`."""
        self._require(kind is None or kind in SCALINGS, f"scaling={kind}", f"one of {', '.join(SCALINGS)}")
        if kind in (None, "dtype"):
            for name, value in (("low", low), ("high", high)):
                self._require(value is None, f"{name}={value}", "left out without scaling=percentile or scaling=window")
        if kind == "window" and (low is None or high is None):
            raise ConfigError("dataset EMFolder: scaling=window needs low= and high=, the numbers of black and white")
        low = _DEFAULT_PERCENTILES[0] if low is None else low
        high = _DEFAULT_PERCENTILES[1] if high is None else high
        self._require(bool(np.isfinite([low, high]).all()) and low < high, f"low={low:g}", f"below high={high:g}")
        if kind == "percentile":
            self._require(low >= 0 and high <= 100, f"low={low:g}:high={high:g}", "percentages, 0..100")
        return Scaling(kind, low, high)

    def _read_slices(self, text: str | None) -> "Range":
        """Read `slices`."""
        if text is None:
            return Range(0, None)
        match = _SLICES.fullmatch(text.strip())
        self._require(match is not None, f"slices={text}", "a number, or two such as 10-19")
        assert match is not None
        first, last = int(match[1]), int(match[2] or match[1])
        self._require(first <= last, f"slices={text}", "a rising range")
        return Range(first, last + 1)


def _is_picture(path: str) -> bool:
    """Tell whether Pillow reads a file."""
    return path.lower().endswith(PICTURES)


class _Files(FolderImages):
    """The files of an `EMFolder`, with their labels, groups and split."""

    def __init__(self, owner: EMFolder, files: Index, label_level: int, classes: list[str] | None) -> None:
        names = ("split", "val_fraction", "test_fraction", "split_by", "cache_dir")
        super().__init__(**{name: getattr(owner, name) for name in names})
        self.root = owner.root
        self._owner: EMFolder | None = owner
        owner._files = self
        self.use_files(files, label_level=label_level, classes=classes)
        self._owner = None

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Try a file."""
        assert self._owner is not None, "only while the folder is opened"
        try:
            self._owner.probe(index)
        except DatasetError as error:
            raise unreadable(self, index, error) from error
        return None, None


_Files.__name__ = EMFolder.__name__  # which its sentences name
