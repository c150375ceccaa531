"""Tables of `BBBC021`: which files hold the channels of an image, and how its cells were treated; see that module.

Everything here is per column, so that the 13,200 rows of the real set take a fraction of a second.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from data_adapters.contained_paths import find_missing, why_outside
from data_adapters.csv_tables import CsvTable
from dinov2.errors import DatasetError

logger = logging.getLogger(__name__)

CONTROL = "DMSO"  # compound of the wells that got the solvent alone
# What describes an image, and the columns it is taken from where no key names another, in any case.
COLUMNS = {
    "moa": ("moa", "Unique_MoA"),
    "compound": ("Image_Metadata_Compound", "compound", "Unique_Compounds"),
    "concentration": ("Image_Metadata_Concentration", "concentration"),
    "treatment": ("treatment", "Unique_Treatments"),
    "plate": ("Image_Metadata_Plate_DAPI", "plate"),
    "well": ("Image_Metadata_Well_DAPI", "well"),
    "replicate": ("Replicate",),
    "batch": ("batch", "week"),
}
_WEEK = r"(?i)week_?(\d+)"
_SITE = r"(?i)_s(\d+)(?:_|\.|$)"
_HINT = "; dapi_col=, tubulin_col=, actin_col= or path_col= names it"
_BETWEEN = "\x1f"  # compound and concentration in a key
_SHOWN = 3  # treatments named in a sentence


@dataclass(frozen=True)
class ImageTable:
    """Rows of an image table that are wanted; a row is one field of view."""

    path: str  # of the table
    files: list[np.ndarray]  # of each channel: path of each row's file below the folder of images, [n] bytes
    columns: dict[str, pd.Series]  # by the names of COLUMNS, as far as known, and `site`; texts, "" where unknown

    def __len__(self) -> int:
        return len(self.files[0])

    def require(self, what: str, *, needed_by: str) -> pd.Series:
        """Return a column.

        Raises:
            DatasetError: the table does not tell it.
        """
        if what not in self.columns:
            raise DatasetError(f"{self.path} does not tell the {what}, which {needed_by} needs; {what}_col= names it")
        return self.columns[what]

    def rows(self, wanted: pd.Series | np.ndarray, *, what: str) -> "ImageTable":
        """Keep some rows, given as a mask or by number.

        Raises:
            DatasetError: none is left.
        """
        wanted = np.asarray(wanted)
        kept = np.flatnonzero(wanted) if wanted.dtype == bool else wanted
        if not len(kept):
            raise DatasetError(f"{self.path}: no row is left with {what}")
        columns = {name: column.iloc[kept].reset_index(drop=True) for name, column in self.columns.items()}
        return ImageTable(self.path, [files[kept] for files in self.files], columns)


@dataclass(frozen=True)
class FileColumns:
    """Where an image table names the files.

    Args:
        names: of the channels, or `image` for files with all channels.
        files: column with the file of each, a name or a whole path.
        folders: column with the folder of each, for files that are mere names; it need not exist.
        root: folder of images.
        path_prefix: folder that paths start with and lose.
        skips_missing: rows without all their files are left out; else they are an error.
    """

    names: Sequence[str]
    files: Sequence[str]
    folders: Sequence[str]
    root: str
    path_prefix: str = ""
    skips_missing: bool = False


def read_image_table(
    path: str, *, where: FileColumns, named: Mapping[str, str | None], moa_csv: str | None
) -> ImageTable:
    """Read the table of images, all but rows whose files are missing and may be.

    Args:
        path: of the table.
        where: it names the files.
        named: see `describe_images`.
        moa_csv: likewise.

    Raises:
        DatasetError: a table, a column, or a file is missing or wrong.
    """
    table = CsvTable(path)
    paths = [
        _file_paths(table, file_col=file_col, folder_col=table.find(folder_col), where=where)
        for file_col, folder_col in zip(where.files, where.folders, strict=True)
    ]
    paths = [_locate(table, of_channel, root=where.root) for of_channel in paths]
    for of_channel, file_col in zip(paths, where.files, strict=True):
        _require_unique(table, of_channel, file_col=file_col)
    columns = describe_images(table, named=named, moa_csv=moa_csv)
    columns = {"batch": _weeks(columns, paths[0]), "site": _sites(paths[0])} | columns
    columns = {name: column for name, column in columns.items() if (column != "").any()}
    files = [[os.fsencode(path) for path in of_channel] for of_channel in paths]
    lacking = _rows_without_files(table, files, where=where)
    if lacking.any():
        logger.warning("%s: %d of %d rows lack a file and are left out", path, lacking.sum(), len(table))
    return ImageTable(path, [np.array(of_channel) for of_channel in files], columns).rows(
        ~lacking, what="all its files"
    )


def describe_images(table: CsvTable, *, named: Mapping[str, str | None], moa_csv: str | None) -> dict[str, pd.Series]:
    """Read what describes the images.

    Args:
        table: of the images.
        named: column to take something of COLUMNS from, by its name; None: the usual one.
        moa_csv: table with compound, concentration and moa, joined if the first table has no MOA; None: none.

    Returns:
        Texts by the names of COLUMNS, as far as known.

    Raises:
        DatasetError: a table or one of its columns is missing, or the join matches nothing.
    """
    found: dict[str, str] = {}
    for what, usual in COLUMNS.items():
        if named.get(what):
            table.column(named[what], hint=f"; {what}_col= names it")
        name = named.get(what) or table.find(*usual)
        if name:
            found[what] = name
    columns = {what: table.column(name) for what, name in found.items() if what != "concentration"}
    if "concentration" in found:
        columns["concentration"] = _as_text(table.numbers(found["concentration"]))
    if "moa" not in columns and moa_csv is not None:
        for what in ("compound", "concentration"):
            if what not in columns:
                table.column(COLUMNS[what][0], hint=f"; {what}_col= names it, moa_csv=none does without MOA")
        if not os.path.isfile(moa_csv):
            raise DatasetError(
                f"{moa_csv} is missing, and {table.path} has no column moa; copy it there, or set moa_csv= to another "
                "table, moa_col= to a column, or moa_csv=none to do without MOA"
            )
        columns["moa"] = _join_moa(table, columns, CsvTable(moa_csv))
    if "treatment" not in columns and {"compound", "concentration"} <= columns.keys():
        columns["treatment"] = (columns["compound"] + " " + columns["concentration"]).str.strip()
    return columns


def _as_text(numbers: pd.Series) -> pd.Series:
    """Write concentrations in one way, so that 0.10 and 0.1 are the same; "" for none."""
    texts = pd.Series(np.char.mod("%.6g", numbers.to_numpy()), index=numbers.index)
    return texts.where(numbers.notna(), "")


def _join_moa(table: CsvTable, columns: Mapping[str, pd.Series], moa: CsvTable) -> pd.Series:
    """Look up the MOA of each image by compound and concentration; "" where the MOA table has none."""
    treatments = moa.column("compound") + _BETWEEN + _as_text(moa.numbers("concentration"))
    names = moa.column("moa")
    first = names.groupby(treatments).transform("first")
    if (first != names).any():
        row = int(np.flatnonzero(first != names)[0])
        treatment = treatments.iloc[row].replace(_BETWEEN, " ")
        raise DatasetError(
            f"{moa.where(row)}: the MOA of {treatment} is {names.iloc[row]!r}, but {first.iloc[row]!r} further up; "
            "keep one of them"
        )
    known = pd.Series(names.to_numpy(), index=treatments).groupby(level=0).first()
    wanted = columns["compound"] + _BETWEEN + columns["concentration"]
    joined = wanted.map(known).fillna("")
    if (joined == "").all():
        raise DatasetError(
            f"{moa.path} has no treatment of {table.path}: compound and concentration are {_shown(treatments)} there "
            f"and {_shown(wanted)} here; both must be written alike, or set moa_csv=none to do without MOA"
        )
    return joined


def _shown(treatments: pd.Series) -> str:
    unique = treatments.unique()
    names = ", ".join(name.replace(_BETWEEN, " ").strip() for name in unique[:_SHOWN])
    return names + (", ..." if len(unique) > _SHOWN else "")


def _file_paths(table: CsvTable, *, file_col: str, folder_col: str | None, where: FileColumns) -> pd.Series:
    """Put together the paths of one channel's files, relative to the folder of images, with slashes."""
    names = table.column(file_col, hint=_HINT).str.replace("\\", "/")
    paths = names
    if folder_col is not None:
        folders = table.column(folder_col).str.replace("\\", "/").str.rstrip("/")
        is_bare = ~names.str.contains("/", regex=False) & (folders != "")
        paths = names.where(~is_bare, folders + "/" + names)
    prefix = where.path_prefix.replace("\\", "/").rstrip("/")
    for start in (prefix, os.path.abspath(where.root)):
        paths = paths.str.removeprefix(f"{start}/") if start else paths
    paths = paths.str.replace(r"/(?:\./)+", "/", regex=True).str.removeprefix("./")
    empty = np.flatnonzero((names == "").to_numpy())
    if len(empty):
        raise DatasetError(f"{table.where(empty[0])}: {file_col} is empty; it must name an image file")
    suspects = paths.str.contains(r"(?:^|/)\.\.(?:/|$)|^/|^[A-Za-z]:|\x00", regex=True).to_numpy()
    for row in np.flatnonzero(suspects):
        reason = why_outside(paths.iloc[row])
        if reason:
            raise DatasetError(
                f"{table.where(row)}: {file_col} gives {paths.iloc[row]!r}, {reason}; paths must stay below "
                f"{where.root}, and path_prefix= names a beginning to leave out"
            )
    return paths


def _require_unique(table: CsvTable, paths: pd.Series, *, file_col: str) -> None:
    """Refuse two rows with the same file."""
    again = np.flatnonzero(paths.duplicated().to_numpy())
    if len(again):
        path = paths.iloc[again[0]]
        first = int(np.flatnonzero((paths == path).to_numpy())[0])
        raise DatasetError(
            f"{table.where(again[0])}: {file_col} names {path} again, as line {table.line(first)} does; an image has "
            "one row"
        )


def _locate(table: CsvTable, paths: pd.Series, *, root: str) -> pd.Series:
    """Find out how the folders of paths are nested on disk; those that are not there stay as they are.

    `Week1/Week1_22123` of the table may be that, `Week1_22123`, or `BBBC021_v1_images_Week1_22123/Week1_22123` as the
    archives of the set unpack.
    """
    folders = paths.str.rpartition("/")[0]
    places = {folder: _place(root, folder) for folder in folders.unique()}
    if all(place is None for place in places.values()):
        folder = next(iter(places))
        tried = " nor as ".join(_candidates(folder))
        raise DatasetError(
            f"none of the {len(places)} folders that {table.path} names is below {root}: {folder} is there neither as "
            f"{tried}; set root= or images= to where the images are"
        )
    moved = {folder: folder if place is None else place for folder, place in places.items()}
    placed = folders.map(moved)
    return (placed + "/" + paths.str.rpartition("/")[2]).str.removeprefix("/")


def _candidates(folder: str) -> list[str]:
    """Ways in which a folder of the table may be nested on disk."""
    plate = folder.rpartition("/")[2]
    return list(dict.fromkeys((folder, plate, f"BBBC021_v1_images_{plate}/{plate}")))


def _place(root: str, folder: str) -> str | None:
    return next((place for place in _candidates(folder) if os.path.isdir(os.path.join(root, place))), None)


def _rows_without_files(table: CsvTable, files: Sequence[list[bytes]], *, where: FileColumns) -> np.ndarray:
    """Tell which rows lack a file, [n] bool."""
    lacking = np.zeros(len(table), dtype=bool)
    for channel, paths in zip(where.names, files, strict=True):
        missing = find_missing(where.root, paths, description=f"looking for {channel} files")
        if missing and not where.skips_missing:
            file = os.path.join(where.root, os.fsdecode(paths[missing[0]]))
            others = f", as are {len(missing) - 1} more of this channel" if len(missing) > 1 else ""
            raise DatasetError(
                f"{table.where(missing[0])}: the {channel} file {file} is missing{others}; copy it there, or set "
                "missing=skip to leave out rows without all their files"
            )
        lacking[missing] = True
    if lacking.all():
        raise DatasetError(f"no row of {table.path} has all its files below {where.root}; check root= and images=")
    return lacking


def _weeks(columns: Mapping[str, pd.Series], paths: pd.Series) -> pd.Series:
    """Name the week of each image, the batch it was made in, after its plate or its path; "" if neither tells."""
    week = paths.str.extract(_WEEK)[0]
    if "plate" in columns:
        week = columns["plate"].str.extract(_WEEK)[0].fillna(week)
    return ("Week" + week).fillna("")


def _sites(paths: pd.Series) -> pd.Series:
    """Number of each field of view in its well, from the file's name; "" if it does not tell."""
    return paths.str.rpartition("/")[2].str.extract(_SITE)[0].fillna("")
