"""Several datasets one after the other, as `A:...+B:...` in a dataset string; weights are their shares in training."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.data.datasets.extended import LazyColumns, image_path

logger = logging.getLogger(__name__)

_FILLING = {"U": "", "i": -1, "u": -1, "f": np.nan, "b": False}  # of a column that a part lacks, by kind of values


class MixedDataset(Dataset[tuple[Any, Any]]):
    """The images of all parts, in their order.

    Labels are matched by class name: a name that several parts know is one class. If several parts have labels and
    one of them does not name its classes, no image has a label, and a warning says so.

    Args:
        parts: datasets with items (image, target).
        names: of the parts, for the column `dataset`.
        weights: > 0; shares of the training samples, of any sum; None: each image is drawn equally often.
    """

    def __init__(self, parts: Sequence[Any], names: Sequence[str], *, weights: Sequence[float] | None = None) -> None:
        self.parts = list(parts)
        self.names = list(names)
        self.weights = None if weights is None else [weight / sum(weights) for weight in weights]
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])  # [parts + 1]
        self.class_names, self._class_numbers = _match_labels(self.parts, self.names)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Part that holds an image, and the image's index in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} images")
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        part, inner = self.place(index)
        image, target = self.parts[part][inner]
        numbers = self._class_numbers[part]
        return image, None if target is None or numbers is None else int(numbers[target])

    def encoded_image(self, index: int) -> Any:
        """Image of an item before it is decoded, or as the part gives it, if that is a class of the user's own."""
        part, inner = self.place(index)
        dataset = self.parts[part]
        return dataset.encoded_image(inner) if hasattr(dataset, "encoded_image") else dataset[inner][0]

    def path(self, index: int) -> str:
        """Where an image comes from, for messages."""
        part, inner = self.place(index)
        return image_path(self.parts[part], inner)

    def get_targets(self) -> np.ndarray | None:
        """Labels of all images, int64, -1 for an image without one; None if no image has one."""
        if all(numbers is None for numbers in self._class_numbers):
            return None
        return np.concatenate(
            [
                np.full(len(part), -1) if numbers is None else np.append(numbers, -1)[part.get_targets()]
                for part, numbers in zip(self.parts, self._class_numbers, strict=True)
            ]
        ).astype(np.int64)

    def groups(self) -> np.ndarray | None:
        """Number of the group of each image, int64; an image of a part without groups is one; None without groups."""
        return _join_groups([len(part) for part in self.parts], [_call(part, "groups") for part in self.parts])

    def pass_groups(self) -> np.ndarray | None:
        """Group of each image, of which a pass over the data draws one image each; None: a pass draws every image."""
        return _join_groups([len(part) for part in self.parts], [_call(part, "pass_groups") for part in self.parts])

    def metadata(self) -> Mapping[str, np.ndarray]:
        """Columns that any part has, and `dataset`, the part's name; a part that lacks a column has "", -1 or nan."""
        tables = [part.metadata() if hasattr(part, "metadata") else {} for part in self.parts]
        names = dict.fromkeys(name for table in tables for name in table if name not in ("path", "target"))
        columns: dict[str, Callable[[], np.ndarray]] = {
            "path": lambda: np.array([self.path(index) for index in range(len(self))])
        }
        if self.get_targets() is not None:
            columns["target"] = lambda: self.get_targets()
        columns["dataset"] = lambda: np.repeat(np.array(self.names), np.diff(self.starts))
        for name in names:
            columns[name] = lambda name=name: self._join_column(name, tables)
        return LazyColumns(columns)

    def _join_column(self, name: str, tables: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
        known = [np.asarray(table[name]) if name in table else None for table in tables]
        kinds = {column.dtype.kind for column in known if column is not None}
        kind = next(iter(kinds)) if len(kinds) == 1 else "U"
        filling = _FILLING.get(kind, "")
        return np.concatenate(
            [
                np.full(len(part), filling) if column is None else column if len(kinds) == 1 else column.astype(str)
                for part, column in zip(self.parts, known, strict=True)
            ]
        )


def _call(part: Any, method: str) -> np.ndarray | None:
    return getattr(part, method)() if hasattr(part, method) else None


def _join_groups(lengths: Sequence[int], groups: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Number the groups of all parts anew."""
    if all(part is None for part in groups):
        return None
    joined, first = [], 0
    for length, part in zip(lengths, groups, strict=True):
        numbers = np.arange(length) if part is None else np.unique(part, return_inverse=True)[1]
        joined.append(numbers + first)
        first += int(numbers.max()) + 1 if length else 0
    return np.concatenate(joined).astype(np.int64)


def _match_labels(parts: Sequence[Any], names: Sequence[str]) -> tuple[list[str], list[np.ndarray | None]]:
    """Class names of all parts together, and for each part the number of each of its own; None without labels."""
    targets = [_call(part, "get_targets") for part in parts]
    labelled = [number for number, known in enumerate(targets) if known is not None]
    own_names = [list(getattr(part, "class_names", None) or []) for part in parts]
    numbers: list[np.ndarray | None] = [None] * len(parts)
    if len(labelled) == 1:
        (only,) = labelled
        numbers[only] = np.arange(max(len(own_names[only]), int(np.max(targets[only], initial=-1)) + 1))
        return own_names[only], numbers
    nameless = [names[number] for number in labelled if not own_names[number]]
    if nameless:
        logger.warning(
            "the labels of this mixture of datasets are left out: %s has labels but no class names, so that they "
            "cannot be matched with those of the other parts",
            nameless[0],
        )
        return [], numbers
    together = list(dict.fromkeys(name for number in labelled for name in own_names[number]))
    place = {name: number for number, name in enumerate(together)}
    for number in labelled:
        numbers[number] = np.array([place[name] for name in own_names[number]], dtype=np.int64)
    return together, numbers
