"""Columns of a feature set as texts: labels, and what images are grouped by."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dinov2.errors import DatasetError
from dinov2.eval.feature_set import FeatureSet

TARGET = "target"  # as a column of labels: those of the dataset


def text_column(features: FeatureSet, name: str, *, needed_by: str) -> np.ndarray:
    """Return a column of the metadata as texts, "" where unknown; [n] str.

    Groups of one name in two parts of a mixture get their number behind the name, for they are two.

    Raises:
        DatasetError: there is no such column.
    """
    if name not in features.columns:
        known = ", ".join(sorted(features.columns)) or "none"
        raise DatasetError(f"{features.name} has no column {name!r}, which {needed_by} needs; its columns are {known}")
    column = np.asarray(features.columns[name])
    is_unknown = pd.isna(column)  # None and NaN, in a class of the user's own
    texts = np.where(is_unknown, "", np.char.strip(column.astype(str)))
    if name != "group" or features.groups is None:
        return texts
    of_name = np.unique(texts, return_inverse=True)[1]
    pairs = np.unique(np.stack([of_name, features.groups]), axis=1)[0]
    is_shared = np.bincount(pairs)[of_name] > 1
    return np.where(is_shared, np.char.add(np.char.add(texts, " #"), features.groups.astype(str)), texts)


def label_texts(features: FeatureSet, column: str, *, needed_by: str, with_names: bool = True) -> np.ndarray:
    """Return the label of each image as text, "" without one; [n] str.

    Args:
        features: of the images.
        column: of the metadata, or `TARGET`.
        needed_by: for the sentence about a missing column.
        with_names: classes of `TARGET` by name; else by number, where another set knows no names.
    """
    if column != TARGET:
        return text_column(features, column, needed_by=needed_by)
    numbers = np.unique(features.targets)
    names = features.class_names if with_names else ()
    texts = [_class_name(int(label), names) for label in numbers]
    return np.array(texts, dtype=str)[np.searchsorted(numbers, features.targets)]


def _class_name(label: int, names: Sequence[str]) -> str:
    if label < 0:
        return ""
    return names[label] if label < len(names) else str(label)


def require_texts(texts: np.ndarray, *, name: str, column: str, needed_by: str) -> None:
    """Refuse images without a value in a column that tells what must not be compared.

    Raises:
        DatasetError: a text is empty.
    """
    missing = int((texts == "").sum())
    if missing:
        raise DatasetError(
            f"{name}: {missing} of {len(texts)} images have no {column}, which {needed_by} needs; fill the column in, "
            "or leave these images out"
        )
