"""`Histology`: tiles of tissue sections, named by a CSV file or in class folders, with normalised stain if wanted.

Dataset strings: `Histology:csv=files.csv:tile_col=tile:label_col=label:slide_col=slide:root=tiles`, or
`Histology:root=NCT-CRC-HE-100K`, with `split=train` and `split=val` for parts without a common slide.

    files.csv                         a row for each tile; paths below root, or below the CSV file's folder
        tile,label,slide
        s1/0001.png,tumour,s1
        s1/0002.png,stroma,s1

    NCT-CRC-HE-100K/                  a folder for each class; classes=TUM,STR takes some of them
        TUM/TUM-AAAHQMFP.tif
        STR/...
    tiles/                            slides in folders: slide_level=2; or in file names: slide_pattern='(s[0-9]+)_'
        tumour/s1/0001.png

Stain: `stain_norm=reinhard` gives the tissue of each tile the colours of a target before any crop is cut; white
background stays white. `stain_target_means_lab='47.9,28.0,-17.3'` and `stain_target_stds_lab='14.6,3.4,5.6'` (L, a, b)
name another target than that one; `tissue_statistics` of dinov2/data/stain.py measures a tile of yours.

Source: class folders as in J. N. Kather et al., NCT-CRC-HE-100K, doi:10.5281/zenodo.1214456.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_adapters.histology_tables import tiles_of_folders, tiles_of_table
from dinov2.data.datasets.extended import NUM_PROBES, ExtendedVisionDataset, failure_of_all
from dinov2.data.datasets.folder_images import comma_list
from dinov2.data.datasets.image_source import ImageSource
from dinov2.data.datasets.wide_tiff import open_image_file
from dinov2.data.index import Index
from dinov2.data.splits import SPLITS
from dinov2.data.stain import TARGET_MEANS_LAB, TARGET_STDS_LAB, reinhard
from dinov2.errors import ConfigError, DatasetError

_STAIN_NORMS = ("none", "reinhard")
_MISSING = ("error", "skip")
_TABLE_KEYS = ("label_col", "slide_col", "split_col", "path_prefix")
_FOLDER_KEYS = ("classes", "exclude", "slide_level", "slide_pattern")


class Histology(ExtendedVisionDataset):
    """Tiles in the order of the table, or of their paths.

    Args:
        root: folder that the paths start from and no file may leave; needed without `csv`. `~` is the home folder.
        csv: table of tiles, below `root` or anywhere.
        tile_col: its column of paths.
        label_col: its column of classes; None: no labels. An empty cell is a tile without label.
        slide_col: its column of slides or patients.
        split_col: its column of splits, train, val or test in each cell; None: by the hash of the group.
        path_prefix: beginning of the table's paths that is left out, e.g. of a computer the tiles were on before.
        missing: error or skip; what to do with rows whose file is missing.
        classes: names with commas; without `csv`, only these class folders.
        exclude: patterns with commas; without `csv`, files and folders left out, as for `ImageFolder`.
        slide_level: without `csv`, level of the folders named after slides, 2 for those in the class folders.
        slide_pattern: without `csv`, regular expression whose first group in a tile's path is its slide.
        stain_norm: none or reinhard.
        stain_target_means_lab: L, a, b with commas; None: `TARGET_MEANS_LAB`.
        stain_target_stds_lab: L, a, b with commas, each above 0; None: `TARGET_STDS_LAB`.
        split_by: slide, path (each tile stands alone), or, with `csv`, any of its columns; None: slide, if known.
        options: arguments of `ExtendedVisionDataset`.

    Raises:
        ConfigError: an argument is wrong.
        DatasetError: the table, a column, a folder or a file is missing or wrong.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        csv: str | None = None,
        tile_col: str = "tile",
        label_col: str | None = None,
        slide_col: str | None = None,
        split_col: str | None = None,
        path_prefix: str = "",
        missing: str = "error",
        classes: str | None = None,
        exclude: str | None = None,
        slide_level: int | None = None,
        slide_pattern: str | None = None,
        stain_norm: str = "none",
        stain_target_means_lab: str | None = None,
        stain_target_stds_lab: str | None = None,
        split_by: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(split_by=split_by, **options)
        self._require(missing in _MISSING, f"missing={missing}", "error or skip")
        self.stain_norm = stain_norm
        self._require(stain_norm in _STAIN_NORMS, f"stain_norm={stain_norm}", "none or reinhard")
        self.target_means_lab = self._lab("stain_target_means_lab", stain_target_means_lab, TARGET_MEANS_LAB)
        self.target_stds_lab = self._lab("stain_target_stds_lab", stain_target_stds_lab, TARGET_STDS_LAB)
        self._require_stain_fits(stain_target_means_lab or stain_target_stds_lab)
        others = {"label_col": label_col, "slide_col": slide_col, "split_col": split_col, "path_prefix": path_prefix}
        others |= {"classes": classes, "exclude": exclude, "slide_level": slide_level, "slide_pattern": slide_pattern}
        self._require_keys_fit(csv, root, others)
        self.scans_folder = csv is None
        if csv is None:
            self.root = os.path.expanduser(str(root))
            self._require_slide_rule(slide_level, slide_pattern)
            tiles = tiles_of_folders(
                self.root,
                cache_dir=self.cache_dir,
                classes=comma_list(classes, "dataset Histology: classes"),
                exclude=comma_list(exclude, "dataset Histology: exclude") or (),
                slide_level=slide_level,
                slide_pattern=slide_pattern,
            )
        else:
            path = _find_table(csv, root)
            self.root = os.path.dirname(path) or "." if root is None else os.path.expanduser(root)
            tiles = tiles_of_table(
                path,
                root=self.root,
                tile_col=tile_col,
                label_col=label_col,
                slide_col=slide_col,
                group_col=None if split_by in (None, "path", "slide") else split_by,
                split_col=split_col,
                path_prefix=path_prefix,
                skips_missing=missing == "skip",
            )
        self._tiles = tiles
        self._rows = self._rows_of_split(tiles)
        self._require_a_readable_tile()

    def __len__(self) -> int:
        return len(self._rows)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._tiles["path"][self._row(index)]))

    def get_image_data(self, index: int) -> bytes:
        return Path(self.path(index)).read_bytes()

    def get_target(self, index: int) -> int | None:
        if "target" not in self._tiles:
            return None
        target = int(self._tiles["target"][self._row(index)])
        return None if target < 0 else target

    @property
    def class_names(self) -> list[str]:
        return self._tiles.attributes["classes"]

    def get_targets(self) -> np.ndarray | None:
        return self._tiles["target"][self._rows].astype(np.int64) if "target" in self._tiles else None

    def groups(self) -> np.ndarray | None:
        return self._tiles["group"][self._rows].astype(np.int64) if self._is_grouped() else None

    def columns(self) -> dict[str, Callable[[], np.ndarray]]:
        columns = super().columns()
        if "slide" in self._tiles:
            columns["slide"] = lambda: self._names("slide", "slides")
        if self._is_grouped():
            columns["group"] = lambda: self._names("group", "groups")
        return columns

    def encoded_image(self, index: int) -> ImageSource:
        source = self.raw_image(index)
        if self.stain_norm == "none":
            return source
        return StainNormalised(source, means_lab=self.target_means_lab, stds_lab=self.target_stds_lab)

    def raw_image(self, index: int) -> ImageSource:
        """Tile with the stain it was scanned with."""
        settings = {"channels": self.channels, "max_image_pixels": self.max_image_pixels, "bits": self.bits}
        path = self.path(index)
        try:
            return open_image_file(path, self.get_image_data(index), **settings)
        except OSError as error:
            raise DatasetError(error.strerror or str(error)) from error

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"index {index} of a dataset of {len(self._rows)} images")
        return int(self._rows[index])

    def _names(self, column: str, names: str) -> np.ndarray:
        """Names of a numbered column, "" where there is none."""
        return np.array([*self._tiles.attributes[names], ""])[self._tiles[column][self._rows]]

    def _is_grouped(self) -> bool:
        return "group" in self._tiles and self.split_by != "path"

    def _rows_of_split(self, tiles: Index) -> np.ndarray:
        """Rows of this dataset's split, int64."""
        if self.split_by == "slide" and "slide" not in tiles:
            raise ConfigError(
                "dataset Histology: split_by=slide needs to know the slides; name them by slide_col=, or, without "
                "csv=, by slide_level= or slide_pattern="
            )
        if self.split == "all":
            return np.arange(len(tiles["path"]))
        if "split" in tiles:
            rows = np.flatnonzero(tiles["split"] == SPLITS.index(self.split))
            if not len(rows):
                raise DatasetError(f"dataset Histology: no row of its table is in split={self.split}")
            return rows
        if not self._is_grouped():
            return self.own_rows(tiles["path"])
        names = tiles.attributes["groups"]
        return self.own_rows(names[number] for number in tiles["group"].tolist())

    def _require(self, holds: bool, setting: str, rule: str) -> None:
        if not holds:
            raise ConfigError(f"dataset Histology: {setting} must be {rule}")

    def _lab(self, key: str, text: str | None, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Read L, a, b."""
        if text is None:
            return default
        rule = "three numbers L,a,b with commas, the stds above 0"
        try:
            lightness, a, b = (float(part) for part in text.split(","))
        except ValueError as error:
            raise ConfigError(f"dataset Histology: {key}={text} must be {rule}") from error
        values = (lightness, a, b)
        self._require(bool(np.isfinite(values).all()) and ("stds" not in key or min(values) > 0), f"{key}={text}", rule)
        return values

    def _require_stain_fits(self, target: str | None) -> None:
        if self.stain_norm == "none":
            self._require(target is None, "stain_norm=none", "reinhard where a target is named")
            return
        if self.channels != 3:
            raise ConfigError(
                f"dataset Histology: stain_norm=reinhard works on colours, but student.in_chans={self.channels}; leave "
                "it out, or use 3 channels"
            )
        self._require(self.bits == 8, f"bits={self.bits}", "8 with stain_norm=reinhard")

    def _require_keys_fit(self, csv: str | None, root: str | None, others: dict[str, Any]) -> None:
        """Check that no key of folders stands beside csv=, and none of tables without it."""
        if csv is None and root is None:
            raise ConfigError("dataset Histology needs csv=... or root=...: a table of tiles, or class folders")
        for key in _TABLE_KEYS if csv is None else _FOLDER_KEYS:
            if others[key] not in (None, ""):
                state = "needs csv=, the table it speaks of" if csv is None else "does not go with csv="
                raise ConfigError(f"dataset Histology: {key}={others[key]} {state}")
        if csv is None:
            known = self.split_by in (None, "path", "slide")
            self._require(known, f"split_by={self.split_by}", "slide or path without csv=")

    def _require_slide_rule(self, level: int | None, pattern: str | None) -> None:
        if level is not None:
            self._require(pattern is None, f"slide_level={level}", "left out beside slide_pattern=")
            self._require(level >= 1, f"slide_level={level}", "at least 1")
        if pattern is not None:
            try:
                num_groups = re.compile(pattern).groups
            except re.error as error:
                raise ConfigError(
                    f"dataset Histology: slide_pattern={pattern} is no regular expression ({error})"
                ) from error
            self._require(num_groups >= 1, f"slide_pattern={pattern}", "an expression with the slide in parentheses")

    def _require_a_readable_tile(self) -> None:
        """Try tiles from the first on until one can be read."""
        num_probes = min(len(self), NUM_PROBES)
        error = failure_of_all(self, num_probes=num_probes)
        if error is not None:
            raise DatasetError(
                f"none of the first {num_probes} of {len(self)} tiles below {self.root} can be read; the first: {error}"
            )


class StainNormalised:
    """A tile with normalised stain; an `ImageSource`.

    Args:
        source: of the tile, 3 channels of 8 bits.
        means_lab: of the target.
        stds_lab: likewise.
    """

    channels = 3

    def __init__(
        self, source: ImageSource, *, means_lab: tuple[float, float, float], stds_lab: tuple[float, float, float]
    ) -> None:
        self.width = source.width
        self.height = source.height
        self._source = source
        self._means = means_lab
        self._stds = stds_lab

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        """Decode and normalise, once, to [3, H, W] uint8; in full size whatever `reduce` is, as its colours need it.

        Raises:
            DatasetError: the file is damaged.
        """
        pixels = self._source.to_tensor().permute(1, 2, 0).contiguous().numpy()
        normalised = reinhard(pixels, means_lab=self._means, stds_lab=self._stds)
        return torch.from_numpy(normalised).permute(2, 0, 1)


def _find_table(csv: str, root: str | None) -> str:
    """Path of the table: below the root if it is there, else as it was given."""
    path = os.path.expanduser(csv)
    below = path if root is None else os.path.join(os.path.expanduser(root), path)
    return below if os.path.isfile(below) or not os.path.isfile(path) else path
