"""Annotation files of `GroupedJSON`: read, checked, and turned into flat columns; see that module for the layout.

A mistake in a file is one sentence with the file and the entry, counted from 0 as in `data_list[0]`.
"""

import json
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_adapters.contained_paths import why_outside
from dinov2.data.index import counted
from dinov2.errors import DatasetError

_KEYS = ("img_path", "gt_label", "group_id")
NO_LABEL = -1


@dataclass(frozen=True)
class Annotations:
    """What the files of one dataset say, entry by entry in their order, file after file."""

    files: Sequence[Path]
    starts: Sequence[int]  # number of the first entry of each file
    classes: Sequence[str]
    paths: Sequence[bytes]  # relative to the dataset's root
    labels: np.ndarray  # [n] int32, -1 without a label
    groups: np.ndarray  # [n] int32, number in group_names
    group_names: Sequence[str]
    splits: np.ndarray  # [n] int8, number of the file

    def place(self, image: int) -> str:
        """Name the file and entry of an image."""
        split = self.splits[image]
        return f"{self.files[split]}: data_list[{image - self.starts[split]}]"

    def require_disjoint(self) -> None:
        """Refuse a group with images in two files.

        Raises:
            DatasetError: names the first.
        """
        first_split = np.full(len(self.group_names), len(self.files), dtype=np.int8)
        np.minimum.at(first_split, self.groups, self.splits)
        shared = np.flatnonzero(self.splits != first_split[self.groups])
        if len(shared):
            group = self.groups[shared[0]]
            others = np.flatnonzero(self.groups == group)
            raise DatasetError(
                f"{self.place(int(shared[0]))} is of group {self.group_names[group]!r}, as is "
                f"{self.place(int(others[0]))}; all images of a group belong to one split"
            )


def read_annotations(root: str, files: Sequence[Path]) -> Annotations:
    """Read the annotation files of a dataset.

    Args:
        root: of the dataset.
        files: e.g. annotations/train.json; the name of a file is its split.

    Raises:
        DatasetError: a file cannot be read or says something impossible, or two of them share an image or a group.
    """
    columns = _Columns(files)
    classes: tuple[str, ...] = ()
    for number, file in enumerate(files):
        content = _load(file)
        found = _classes(content, file)
        if number and found != classes:
            raise DatasetError(
                f"{file}: metainfo.classes is {_shown(found)}, but in {files[0].name} it is {_shown(classes)}; "
                "all splits need the same classes in the same order"
            )
        classes = found
        entries = _entries(content, file)
        _EntryReader(file, entries, len(classes), _folder_of_paths(root, file, entries)).read_into(columns, number)
    annotations = Annotations(
        files=files,
        starts=columns.starts,
        classes=classes,
        paths=list(columns.paths),
        labels=np.frombuffer(columns.labels, dtype=np.int32),
        groups=np.frombuffer(columns.groups, dtype=np.int32),
        group_names=list(columns.group_numbers),
        splits=np.frombuffer(columns.splits, dtype=np.int8),
    )
    annotations.require_disjoint()
    return annotations


def _load(file: Path) -> dict[str, Any]:
    """Parse a file; its top level is an object."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{file}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); correct the file there"
        ) from error
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number in it is too long"
        raise DatasetError(f"{file} is not an annotation file: {reason}") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{file} holds {_kind(content)}; it must be an object with metainfo and data_list")
    return content


def _classes(content: dict[str, Any], file: Path) -> tuple[str, ...]:
    """Names of the classes."""
    metainfo = content.get("metainfo")
    if not isinstance(metainfo, dict) or "classes" not in metainfo:
        raise DatasetError(f'{file} has no metainfo.classes; it must name the classes, as {{"classes": ["ok", "bad"]}}')
    classes = metainfo["classes"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise DatasetError(f"{file}: metainfo.classes is {_shown(classes)}; it must be a list of names")
    twice = next((name for name in classes if classes.count(name) > 1), None)
    if twice is not None:
        raise DatasetError(f"{file}: metainfo.classes names {twice!r} twice; each class needs its own name")
    return tuple(classes)


def _entries(content: dict[str, Any], file: Path) -> list[Any]:
    """Return the list of images."""
    if "data_list" not in content:
        raise DatasetError(f"{file} has no data_list; it must list the images, each with {', '.join(_KEYS)}")
    entries = content["data_list"]
    if not isinstance(entries, list):
        raise DatasetError(f"{file}: data_list holds {_kind(entries)}; it must be a list of images")
    if not entries:
        raise DatasetError(f"{file}: data_list is empty; list at least one image or remove the file")
    return entries


def _folder_of_paths(root: str, file: Path, entries: list[Any]) -> str:
    """Return what the paths of a file stand below: "" for the root, "train/" for the folder of its split.

    The first entry decides for all: the root, unless its image is only found in the folder of the split.
    """
    path = entries[0].get("img_path") if isinstance(entries[0], dict) else None
    if not isinstance(path, str) or why_outside(path):
        return ""  # reported with its entry
    path, prefix = path.replace("\\", "/"), f"{file.stem}/"
    is_in_root = os.path.lexists(os.path.join(root, path))
    return prefix if not is_in_root and os.path.lexists(os.path.join(root, prefix, path)) else ""


@dataclass
class _Columns:
    """Columns in the making."""

    files: Sequence[Path]
    paths: dict[bytes, int] = field(default_factory=dict)  # image: its number
    labels: array = field(default_factory=lambda: array("i"))
    groups: array = field(default_factory=lambda: array("i"))
    splits: array = field(default_factory=lambda: array("b"))
    group_numbers: dict[str, int] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)  # number of the first image of each file

    def place(self, image: int) -> str:
        """Name the file and entry of an image."""
        split = self.splits[image]
        return f"data_list[{image - self.starts[split]}] of {self.files[split].name}"


class _EntryReader:
    """Entries of one file, checked one by one."""

    def __init__(self, file: Path, entries: list[Any], num_classes: int, prefix: str) -> None:
        self.file = file
        self.entries = entries
        self.num_classes = num_classes
        self.prefix = prefix

    def read_into(self, columns: _Columns, split: int) -> None:
        """Append all entries."""
        columns.starts.append(len(columns.paths))
        for number, entry in enumerate(counted(self.entries, description=self.file.name, unit="images")):
            if not isinstance(entry, dict):
                raise self.error(number, f"is {_kind(entry)}; it must be an object with {', '.join(_KEYS)}")
            missing = [key for key in _KEYS if key not in entry]
            if missing:
                raise self.error(number, f"has no key {missing[0]}; an image needs {', '.join(_KEYS)}")
            path = self.path(number, entry["img_path"])
            first = columns.paths.setdefault(path, len(columns.labels))
            if first != len(columns.labels):
                raise self.error(
                    number,
                    f"names the image {os.fsdecode(path)} again, after {columns.place(first)}; "
                    "an image belongs to one entry of one split",
                )
            columns.labels.append(self.label(number, entry["gt_label"]))
            group = self.group(number, entry["group_id"])
            columns.groups.append(columns.group_numbers.setdefault(group, len(columns.group_numbers)))
            columns.splits.append(split)

    def path(self, number: int, value: Any) -> bytes:
        """Path of an image, relative to the root."""
        if not isinstance(value, str) or not value:
            raise self.error(number, f"has img_path={_shown(value)}; it must be the path of an image file")
        reason = why_outside(value)
        if reason:
            raise self.error(
                number, f"has img_path={_shown(value)}, {reason}; paths must stay below the dataset's folder"
            )
        path = self.prefix + value.replace("\\", "/")
        if "//" in path or "./" in path:
            path = os.path.normpath(path)
        try:
            return os.fsencode(path)
        except UnicodeEncodeError as error:
            raise self.error(number, f"has img_path={_shown(value)}, which no file can be called") from error

    def label(self, number: int, value: Any) -> int:
        """Label of an image; -1 for null."""
        if value is None:
            return NO_LABEL
        last = self.num_classes - 1
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= last:
            raise self.error(
                number,
                f"has gt_label={_shown(value)}; metainfo.classes has {self.num_classes} classes, so it must be a "
                f"whole number from 0 to {last}, or null without a label",
            )
        return value

    def group(self, number: int, value: Any) -> str:
        """Name of a group."""
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise self.error(number, f"has group_id={_shown(value)}; it must be a name or a whole number")
        return str(value)

    def error(self, number: int, problem: str) -> DatasetError:
        """Error about one entry."""
        return DatasetError(f"{self.file}: data_list[{number}] {problem}")


def _kind(value: Any) -> str:
    """Name the JSON type of a value."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names[type(value)]


def _shown(value: Any, *, limit: int = 60) -> str:
    """Value as JSON, shortened."""
    text = json.dumps(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= limit else f"{text[:limit]}..."
