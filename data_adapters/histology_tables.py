"""Where the tiles of `Histology` are and what is known about them: from a CSV file, or from the names of folders.

Either gives an index with the columns path (`Strings` below the root), target (int32, -1 without a label), slide
(int32, -1 where none is named), group (int32, what no split tears apart) and split (int32, a place in `SPLITS`), of
which only path is always there, and with the attributes classes, slides and groups, their names by number.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_adapters.contained_paths import find_missing, why_outside
from data_adapters.csv_tables import CsvTable
from dinov2.data.folder_scan import scan_images
from dinov2.data.index import Index, Strings
from dinov2.data.names import nearest
from dinov2.data.splits import SPLITS, require_disjoint_groups
from dinov2.errors import DatasetError

_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NUM_SHOWN = 20


def tiles_of_table(
    csv: str,
    *,
    root: str,
    tile_col: str,
    label_col: str | None,
    slide_col: str | None,
    group_col: str | None,
    split_col: str | None,
    path_prefix: str,
    skips_missing: bool,
) -> Index:
    """Read the tiles that a CSV file names.

    Args:
        csv: the file.
        root: folder that the paths start from and none may leave.
        tile_col: column with the paths.
        label_col: column with the classes; an empty cell is a tile without label.
        slide_col: column with the slide or patient.
        group_col: column whose values no split tears apart; None: the slide, if there is one.
        split_col: column with the split of each tile.
        path_prefix: beginning that paths lose.
        skips_missing: leave out rows without a file; else they are an error.

    Raises:
        DatasetError: the table, a column or a file is missing or wrong, or the splits overlap.
    """
    table = CsvTable(csv)
    paths = _paths(table, tile_col, root=root, prefix=path_prefix)
    missing = find_missing(root, paths, description="looking for tiles")
    if missing and (not skips_missing or len(missing) == len(paths)):
        others = f", as are {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DatasetError(
            f"{table.where(missing[0])}: the tile {os.path.join(root, os.fsdecode(paths[missing[0]]))} is "
            f"missing{others}; check root=, or set missing=skip to leave out rows without a file"
        )
    kept = np.delete(np.arange(len(paths)), missing)
    columns: dict[str, Any] = {"path": Strings.pack(paths[row] for row in kept)}
    attributes: dict[str, Any] = {"classes": [], "slides": [], "groups": []}
    group_col = group_col or slide_col
    wanted = (
        ("target", "classes", label_col, "label_col"),
        ("slide", "slides", slide_col, "slide_col"),
        ("group", "groups", group_col, "split_by"),
    )
    for name, names, column, key in wanted:
        if column is not None:
            numbers, attributes[names] = _numbered(table.column(column, hint=f"; {key}= names it"))
            columns[name] = numbers[kept]
    if group_col is not None and (columns["group"] < 0).any():
        row = int(kept[np.flatnonzero(columns["group"] < 0)[0]])
        raise DatasetError(f"{table.where(row)}: {group_col} is empty; tiles are split by it, so each needs one")
    if split_col is not None:
        columns["split"] = _splits(table, split_col)[kept]
        _require_disjoint(columns, attributes, group_col)
    return Index(columns, attributes)


def tiles_of_folders(
    root: str,
    *,
    cache_dir: str | None,
    classes: Sequence[str] | None,
    exclude: Sequence[str],
    slide_level: int | None,
    slide_pattern: str | None,
) -> Index:
    """Find the tiles below class folders.

    Args:
        root: the folder with a folder for each class.
        cache_dir: see `scan_images`.
        classes: only these; None: all.
        exclude: see `scan_images`.
        slide_level: level of the folders named after slides, 1 those of the classes; None: no such folders.
        slide_pattern: regular expression, searched for in the path below `root`, whose first group is the slide.

    Raises:
        DatasetError: the folder is missing, holds no images, or lacks a class, or a tile has no slide.
    """
    paths: Strings = scan_images(root, cache_dir=cache_dir, folders=classes, exclude=exclude)["path"]
    numbers, names = _numbered(os.fsdecode(path.partition(b"/")[0]) if b"/" in path else "" for path in paths)
    for name in classes or ():
        if name not in names:
            known = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())[:_NUM_SHOWN]
            raise DatasetError(f"classes={name}: no folder of that name holds tiles of {root}{nearest(name, known)}")
    columns: dict[str, Any] = {"path": paths}
    attributes: dict[str, Any] = {"classes": names, "slides": [], "groups": []}
    if names:
        columns["target"] = numbers
    if slide_level is not None or slide_pattern is not None:
        columns["slide"], attributes["slides"] = _slides(paths, level=slide_level, pattern=slide_pattern)
        columns["group"], attributes["groups"] = columns["slide"], attributes["slides"]
    return Index(columns, attributes)


def _paths(table: CsvTable, tile_col: str, *, root: str, prefix: str) -> list[bytes]:
    """Paths below the root, each once."""
    texts = table.column(tile_col, hint="; tile_col= names the one with the tiles").str.replace("\\", "/")
    below_root = os.path.join(os.path.abspath(root), "")
    found: dict[str, int] = {}
    for row, text in enumerate(texts):
        if not text:
            raise DatasetError(f"{table.where(row)}: {tile_col} is empty; it must name an image file")
        path = text.removeprefix(prefix.replace("\\", "/")).removeprefix(below_root).removeprefix("./")
        reason = why_outside(path)
        if reason:
            raise DatasetError(
                f"{table.where(row)}: {tile_col} gives {path!r}, {reason}; paths must stay below {root}, and "
                "path_prefix= names a beginning to leave out"
            )
        path = os.path.normpath(path)
        if path in found:
            raise DatasetError(
                f"{table.where(row)}: {tile_col} names {path} again, as {table.where(found[path])} does; a tile has "
                "one row"
            )
        found[path] = row
    return [os.fsencode(path) for path in found]


def _numbered(texts: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """Number the distinct texts in their order; -1 for an empty one."""
    met: dict[str, int] = {}
    numbers = np.fromiter((met.setdefault(text, len(met)) if text else -1 for text in texts), dtype=np.int32)
    names = sorted(met)
    rank = np.full(len(names) + 1, -1, dtype=np.int32)  # the last place is that of empty texts
    rank[[met[name] for name in names]] = np.arange(len(names))
    return rank[numbers], names


def _splits(table: CsvTable, split_col: str) -> np.ndarray:
    """Place of each row's split in `SPLITS`."""
    texts = table.column(split_col, hint="; split_col= names it")
    splits = texts.str.lower().map(_SPLIT_NAMES)
    wrong = np.flatnonzero(splits.isna().to_numpy())
    if len(wrong):
        raise DatasetError(
            f"{table.where(wrong[0])}: {split_col} is {texts.iloc[wrong[0]]!r}; it must be train, val or test"
        )
    return splits.map(SPLITS.index).to_numpy(dtype=np.int32)


def _require_disjoint(columns: dict[str, Any], attributes: dict[str, Any], group_col: str | None) -> None:
    """Check that no group is in two of the table's splits."""
    if group_col is None:
        return
    names = attributes["groups"]
    groups = {
        split: [names[number] for number in np.unique(columns["group"][columns["split"] == SPLITS.index(split)])]
        for split in ("train", "val", "test")
    }
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        require_disjoint_groups(groups[one], groups[other], names=(one, other), kind=group_col)


def _slides(paths: Iterable[bytes], *, level: int | None, pattern: str | None) -> tuple[np.ndarray, list[str]]:
    """Number and name the slides."""
    expression = None if pattern is None else re.compile(pattern)

    def slide_of(text: str) -> str:
        if expression is not None:
            match = expression.search(text)
            slide = match[1] if match else None
        else:
            parts = text.split("/")
            slide = parts[level - 1] if level is not None and len(parts) > level else None
        if not slide:
            rule = f"slide_level={level}" if expression is None else f"slide_pattern={pattern}"
            raise DatasetError(f"tile {text} has no slide by {rule}; tiles are split by slide, so each needs one")
        return slide

    return _numbered(slide_of(os.fsdecode(path)) for path in paths)
