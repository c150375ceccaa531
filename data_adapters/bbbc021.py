"""`BBBC021`: cells under drugs, three fluorescence channels of 16 bits, labelled with the mechanism of action (MOA).

Dataset string: `BBBC021:root=bbbc021`, with `split=train` or `split=val` for parts without a common compound.

    bbbc021/
        BBBC021_v1_image.csv      a row for each field of view: Image_FileName_DAPI, Image_PathName_DAPI and the same
                                  for Tubulin and Actin, Image_Metadata_Plate_DAPI, Image_Metadata_Well_DAPI,
                                  Replicate, Image_Metadata_Compound, Image_Metadata_Concentration
        BBBC021_v1_moa.csv        compound, concentration, moa; joined by compound and concentration, as a number
        Week1/Week1_22123/Week1_150607_B02_s1_w1<id>.tif      as the path column says (w1 DAPI, w2 Tubulin, w4 Actin)
        Week1_22123/...                                       or without the week
        BBBC021_v1_images_Week1_22123/Week1_22123/...         or as the archives unpack, a folder each

Another table, such as one row an image with path, compound, concentration, moa, plate and well, is named by
`csv=BBBC021_annotated_fixed.csv` and its columns by `dapi_col=`, `tubulin_col=`, `actin_col=` (a file a channel),
`path_col=` (one file with all channels), `moa_col=`, `compound_col=`, `concentration_col=`, `treatment_col=`,
`plate_col=`, `well_col=`, `replicate_col=` and `batch_col=`. Columns called as in the files above, or moa, compound,
concentration, treatment, plate, well, batch, Unique_MoA, Unique_Compounds, Unique_Treatments, are found by themselves.

Source: P. D. Caie et al. 2010, doi:10.1158/1535-7163.MCT-09-1148; BBBC021v1 of the Broad Bioimage Benchmark Collection,
V. Ljosa et al. 2012, doi:10.1038/nmeth.2083.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from data_adapters.bbbc021_images import ChannelFiles, ChannelsInFile, ScaledImage
from data_adapters.bbbc021_scaling import FULL_WINDOW, SharedWindows, Window
from data_adapters.bbbc021_tables import CONTROL, FileColumns, ImageTable, read_image_table
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.errors import ConfigError, DatasetError

CHANNELS = ("Tubulin", "Actin", "DAPI")
TARGETS = ("moa", "compound", "treatment", "plate", "well", "batch")
_SPLITS_BY = ("compound", "treatment", "plate", "well", "batch", "image")
_SCALINGS = ("image", "plate", "dataset", "none")
_CONTROLS = ("keep", "drop", "only")
_MISSING = ("error", "skip")
_PERCENTILES = (0.1, 99.9)
_SAMPLE_SIZE = 50


class BBBC021(ExtendedVisionDataset):
    """Fields of view, their channels stacked, in the order of the table.

    Each channel is scaled by itself: the value at or below which `low_pct` percent of the pixels lie becomes 0, that of
    `high_pct` becomes full scale. An image of one channel is repeated if the network takes more.

    Args:
        root: folder with the tables; `~` is the home folder.
        csv: table of images, below `root` or anywhere.
        moa_csv: table of MOAs, joined if the table of images has no MOA; none: do without.
        images: folder below `root` that the paths start from.
        path_prefix: beginning of the table's paths that is left out, e.g. of a computer the images were on before.
        target: one of `TARGETS`, what the labels are. Labels are numbered over all splits; an image without one has
            the target None.
        labelled_only: leave out images without a label.
        controls: keep, drop or only; images of compound DMSO. The MOA table calls their MOA DMSO.
        missing: error or skip; what to do with rows whose files are missing.
        channels_order: which channels an image has, in this order; from `CHANNELS`, any number of them.
        dapi_only: the same as channels_order=DAPI.
        scaling: image, plate or dataset: whose percentiles; for plate and dataset they are found once, from a sample
            of up to `sample_size` images each, whatever split is asked for, and kept in the cache folder. none: 16
            bits as they are.
        low_pct: 0..100; None: 0.1. Not with scaling=none, as `high_pct`.
        high_pct: 0..100, above `low_pct`; None: 99.9.
        sample_size: images, >= 1; None: 50. With scaling=plate or dataset only.
        file_channels: with path_col only: the channels in the files, in their order; None: those of `CHANNELS`.
        split_by: compound, treatment, plate, well, batch or image.
        options: arguments of `ExtendedVisionDataset`. bits=16 keeps 16 bits.

    Raises:
        ConfigError: an argument is wrong.
        DatasetError: a table, a column or a file is missing or wrong.
    """

    def __init__(
        self,
        *,
        root: str,
        csv: str = "BBBC021_v1_image.csv",
        moa_csv: str | None = "BBBC021_v1_moa.csv",
        images: str = "",
        path_prefix: str = "",
        target: str = "moa",
        labelled_only: bool = False,
        controls: str = "keep",
        missing: str = "error",
        channels_order: str = "Tubulin,Actin,DAPI",
        dapi_only: bool = False,
        scaling: str = "image",
        low_pct: float | None = None,
        high_pct: float | None = None,
        sample_size: int | None = None,
        path_col: str | None = None,
        file_channels: str | None = None,
        dapi_col: str = "Image_FileName_DAPI",
        tubulin_col: str = "Image_FileName_Tubulin",
        actin_col: str = "Image_FileName_Actin",
        moa_col: str | None = None,
        compound_col: str | None = None,
        concentration_col: str | None = None,
        treatment_col: str | None = None,
        plate_col: str | None = None,
        well_col: str | None = None,
        replicate_col: str | None = None,
        batch_col: str | None = None,
        split_by: str = "compound",
        **options: Any,
    ) -> None:
        self.channel_names = ("DAPI",) if dapi_only else _channels("channels_order", channels_order)
        super().__init__(split_by=split_by, **options)
        _require_one_of(target=(target, TARGETS), controls=(controls, _CONTROLS), missing=(missing, _MISSING))
        _require_one_of(scaling=(scaling, _SCALINGS), split_by=(split_by, _SPLITS_BY))
        if scaling == "none":
            _refuse("scaling=none", low_pct=low_pct, high_pct=high_pct)
        if scaling in ("none", "image"):
            _refuse(f"scaling={scaling}", sample_size=sample_size)
        if path_col is None:
            _refuse("a file for each channel; path_col= names a column of files with all", file_channels=file_channels)
        self._scaling = scaling
        self._percentiles = _percentages(low_pct, high_pct)
        num_sampled = _num_sampled(sample_size)
        folder = os.path.expanduser(root)
        self.root = os.path.join(folder, images) if images else folder
        by_channel = {"DAPI": dapi_col, "Tubulin": tubulin_col, "Actin": actin_col}
        names = self.channel_names if path_col is None else ("image",)
        in_files = CHANNELS if file_channels is None else _channels("file_channels", file_channels)
        self._file_channels = None if path_col is None else in_files
        self._require_planes()
        table = read_image_table(
            _existing(os.path.join(folder, csv), "csv= to the table of images"),
            where=FileColumns(
                names=names,
                files=[path_col or by_channel[name] for name in names],
                folders=[f"Image_PathName_{name}" for name in names],
                root=self.root,
                path_prefix=path_prefix,
                skips_missing=missing == "skip",
            ),
            named={
                "moa": moa_col,
                "compound": compound_col,
                "concentration": concentration_col,
                "treatment": treatment_col,
                "plate": plate_col,
                "well": well_col,
                "replicate": replicate_col,
                "batch": batch_col,
            },
            moa_csv=None if moa_csv is None else os.path.join(folder, moa_csv),
        )
        self._files = table.files
        self._windows = self._find_windows(table, num_sampled)  # of all images, whichever are chosen
        self._take(_choose_rows(table, target=target, labelled_only=labelled_only, controls=controls), target=target)

    def _take(self, table: ImageTable, *, target: str) -> None:
        """Keep as arrays the labels, which are numbered over all rows, and the rows of this split."""
        labels = table.columns.get(target, pd.Series([""] * len(table)))
        self._class_names = sorted(set(labels) - {""})
        self._targets = pd.Index(self._class_names, dtype=str).get_indexer(labels).astype(np.int64)
        keys = _group_keys(table, self.split_by, required=self.split != "all")
        self._group_keys = None if keys is None else pd.Categorical(keys)
        if self.split != "all":
            rows = self.own_rows(table.files[0] if keys is None else keys)
            table = table.rows(rows, what=f"split={self.split}")
            self._targets = self._targets[rows]
            self._group_keys = None if keys is None else self._group_keys[rows]
        self._files = table.files
        self._texts = {name: pd.Categorical(column) for name, column in table.columns.items()}

    def _find_windows(self, table: ImageTable, sample_size: int) -> dict[str, list[Window]]:
        """Find the windows that images share, by plate, or under "" for all; none if each image has its own."""
        if self._scaling == "image":
            return {}
        if self._scaling == "none":
            return {"": [FULL_WINDOW] * len(self.channel_names)}
        members = {"": np.arange(len(table))}
        if self._scaling == "plate":
            plates = pd.Categorical(table.require("plate", needed_by="scaling=plate"))
            members = {name: np.flatnonzero(plates.codes == code) for code, name in enumerate(plates.categories)}
        shared = SharedWindows(
            read=lambda index: self._open(index).planes(),
            files=self.image_files,
            settings=(self._scaling, *self.channel_names, *(self._file_channels or ())),
            percentiles=self._percentiles,
            sample_size=sample_size,
            cache_dir=self.cache_dir,
        )
        found = shared.find({f"plate {name}" if name else "the dataset": rows for name, rows in members.items()})
        return dict(zip(members, found, strict=True))

    def image_files(self, index: int) -> list[str]:
        """Return the files of an image."""
        return [os.path.join(self.root, os.fsdecode(files[index])) for files in self._files]

    def _open(self, index: int) -> ChannelFiles | ChannelsInFile:
        """Read the headers of an image's files."""
        files = [os.fsdecode(files[index]) for files in self._files]
        if self._file_channels is None:
            return ChannelFiles(self.root, files, names=self.channel_names, max_image_pixels=self.max_image_pixels)
        return ChannelsInFile(
            self.root,
            files[0],
            num_channels=len(self._file_channels),
            wanted=[self._file_channels.index(name) for name in self.channel_names],
            max_image_pixels=self.max_image_pixels,
        )

    def __len__(self) -> int:
        return len(self._targets)

    def path(self, index: int) -> str:
        """File of the first channel."""
        return os.path.join(self.root, os.fsdecode(self._files[0][index]))

    def get_target(self, index: int) -> int | None:
        label = int(self._targets[index])
        return label if label >= 0 else None

    @property
    def class_names(self) -> list[str]:
        return self._class_names

    def get_targets(self) -> np.ndarray | None:
        return self._targets if self._class_names else None

    def groups(self) -> np.ndarray | None:
        """Number of what `split_by` says, of each image; None for split_by=image or if the table does not tell."""
        return None if self._group_keys is None else self._group_keys.codes.astype(np.int64)

    def columns(self) -> dict[str, Callable[[], np.ndarray]]:
        """Columns of `metadata`: path, target, group (as `split_by` says), batch, site (field of view of its well),
        control (is it DMSO), and those of moa, compound, concentration (float64), treatment, plate, well, replicate
        that the table has.
        """
        columns = super().columns()
        columns |= {name: partial(np.asarray, texts, dtype=str) for name, texts in self._texts.items()}
        if "concentration" in self._texts:
            columns["concentration"] = lambda: pd.to_numeric(np.asarray(self._texts["concentration"], dtype=str))
        if "compound" in self._texts:
            columns["control"] = lambda: np.char.upper(np.asarray(self._texts["compound"], dtype=str)) == CONTROL
        if self._group_keys is not None:
            columns["group"] = partial(np.asarray, self._group_keys, dtype=str)
        return columns

    def require_channels(self) -> None:
        """Check that the network takes these channels, or that there is one, which can be repeated."""
        count = len(self.channel_names)
        if count != 1 and self.channels != count:
            raise ConfigError(
                f"student.in_chans={self.channels}: dataset BBBC021 gives {count} channels "
                f"({', '.join(self.channel_names)}); set student.in_chans={count}, or choose with channels_order= or "
                "dapi_only=true"
            )

    def encoded_image(self, index: int) -> ScaledImage:
        """Image with its headers read and its pixels not yet."""
        key = str(self._texts["plate"][index]) if self._scaling == "plate" else ""
        return ScaledImage(
            self._open(index),
            self._windows.get(key),
            percentiles=self._percentiles,
            bits=self.bits,
            channels=self.channels,
        )

    def _require_planes(self) -> None:
        """Check that files with all channels hold those that are wanted."""
        for name in self.channel_names if self._file_channels is not None else ():
            if name not in self._file_channels:
                raise ConfigError(
                    f"dataset BBBC021: file_channels={','.join(self._file_channels)} lacks {name}, which "
                    "channels_order or dapi_only asks for"
                )


def _channels(key: str, text: str) -> tuple[str, ...]:
    """Read a list of channels, in any case."""
    known = {name.lower(): name for name in CHANNELS}
    names = [name.strip().lower() for name in text.split(",")]
    if not set(names) <= known.keys() or len(set(names)) < len(names):
        raise ConfigError(f"dataset BBBC021: {key}={text} must be some of {', '.join(CHANNELS)}, each once")
    return tuple(known[name] for name in names)


def _require_one_of(**choices: tuple[str, Sequence[str]]) -> None:
    """Check that values are known ones."""
    for key, (value, known) in choices.items():
        if value not in known:
            raise ConfigError(f"dataset BBBC021: {key}={value} must be one of {', '.join(known)}")


def _refuse(where: str, **settings: Any) -> None:
    """Refuse settings that have no effect."""
    for key, value in settings.items():
        if value is not None:
            raise ConfigError(f"dataset BBBC021: {key}={value} has no effect with {where}; remove it")


def _percentages(low_pct: float | None, high_pct: float | None) -> tuple[float, float]:
    """Fill in and check the percentiles."""
    low, high = _PERCENTILES[0] if low_pct is None else low_pct, _PERCENTILES[1] if high_pct is None else high_pct
    if not 0 <= low < high <= 100:
        raise ConfigError(
            f"dataset BBBC021: low_pct={low:g} and high_pct={high:g} must be percentages, the first below the second"
        )
    return low, high


def _num_sampled(sample_size: int | None) -> int:
    """Fill in and check the size of samples."""
    number = _SAMPLE_SIZE if sample_size is None else sample_size
    if number < 1:
        raise ConfigError(f"dataset BBBC021: sample_size={number} must be at least 1 image")
    return number


def _existing(path: str, instead: str) -> str:
    """Check that a table is there."""
    if not os.path.isfile(path):
        raise DatasetError(f"{path} is missing; set root= to the folder that holds it, or {instead}")
    return path


def _choose_rows(table: ImageTable, *, target: str, labelled_only: bool, controls: str) -> ImageTable:
    """Leave out the rows that are not asked for."""
    if target != "moa" or labelled_only:  # without MOA one can still train
        table.require(target, needed_by=f"target={target}")
    if controls != "keep":
        key = f"controls={controls}"
        is_control = table.require("compound", needed_by=key).str.upper() == CONTROL
        table = table.rows(is_control == (controls == "only"), what=key)
    return table.rows(table.columns[target] != "", what="labelled_only=true") if labelled_only else table


def _group_keys(table: ImageTable, split_by: str, *, required: bool) -> pd.Series | None:
    """Name the group of each image; None if each stands alone, or if the table does not tell and need not."""
    if split_by == "image" or not (required or split_by in table.columns):
        return None
    key = f"split_by={split_by}"
    keys = table.require(split_by, needed_by=key)
    return table.require("plate", needed_by=key) + " " + keys if split_by == "well" else keys
