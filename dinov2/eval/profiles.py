"""Profiles: features of images averaged, level by level, to wells, plates and treatments, or slides and patients.

Images are brought into the order of their paths first and groups into the order of their names, so the profiles do not
depend on the order of the dataset. All arithmetic is float64.

Shapes: n images, p profiles, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2.errors import CheckpointError, DatasetError
from dinov2.eval.columns import label_texts, require_texts, text_column
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.protocol_forms import Level, Protocol

_SHOWN = 3  # values named in a sentence
_BETWEEN = " + "  # several values of a profile in one text


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a protocol takes of a feature set: features and texts of each image, in the order of the paths."""

    name: str  # of the dataset, for sentences
    values: Tensor  # [n, D]
    names: np.ndarray  # [n] str: paths, or places where the dataset tells no paths
    labels: np.ndarray  # [n] str, "" without a label
    columns: Mapping[str, np.ndarray]  # [n] str each: those that the protocol names
    is_control: np.ndarray  # [n] bool
    places: np.ndarray  # [n] int64, in the dataset

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Images":
        """Keep some images, given as a mask or as row numbers."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        return Images(
            name=self.name,
            values=self.values[torch.from_numpy(rows)],
            names=self.names[rows],
            labels=self.labels[rows],
            columns={name: column[rows] for name, column in self.columns.items()},
            is_control=self.is_control[rows],
            places=self.places[rows],
        )


def take_images(features: FeatureSet, protocol: Protocol, *, also: Mapping[str, str] | None = None) -> Images:
    """Take what a protocol needs, and leave out images with neither a label nor the role of a control.

    Args:
        features: of all images, pool with one vector an image.
        protocol: it names the columns.
        also: further columns, each with what needs it, for sentences.

    Raises:
        DatasetError: a column is missing, an image that is classified lacks a value in one, or no image has a label.
        CheckpointError: features are not finite.
    """
    needed = protocol.columns() | dict(also or {})
    needed = {name: f"protocol {protocol.name} ({key})" for name, key in needed.items()}
    columns = {name: text_column(features, name, needed_by=what) for name, what in needed.items()}
    labels = label_texts(features, protocol.label, needed_by=f"protocol {protocol.name}")
    is_control = np.zeros(len(features), dtype=bool)
    if protocol.controls is not None:
        column, wanted = protocol.controls
        is_control = np.char.upper(columns[column]) == wanted.upper()
    has_label = (labels != "") & ~is_control
    if not has_label.any():
        raise DatasetError(
            f"{features.name}: no image has a label ({protocol.label}) that protocol {protocol.name} could predict"
        )
    order = _order(features)
    rows = order[(has_label | is_control)[order]]
    images = Images(
        name=features.name,
        values=features.values,
        names=np.asarray(features.columns.get("path", features.places)).astype(str),
        labels=labels,
        columns=columns,
        is_control=is_control,
        places=features.places,
    )
    images = images if np.array_equal(rows, np.arange(len(images))) else images.take(rows)
    for column, what in needed.items():
        texts = images.columns[column][~images.is_control]
        require_texts(texts, name=images.name, column=column, needed_by=what)
    _require_finite(images.values, name=features.name)
    return images


def _order(features: FeatureSet) -> np.ndarray:
    """Return the rows in the order of the paths; as they are if the dataset tells no paths."""
    paths = features.columns.get("path")
    return np.arange(len(features)) if paths is None else np.argsort(np.asarray(paths), kind="stable")


def _require_finite(values: Tensor, *, name: str) -> None:
    bad = int((~torch.isfinite(values).all(dim=1)).sum())
    if bad:
        raise CheckpointError(
            f"{name}: {bad} of {len(values)} feature vectors hold NaN or infinity; the weights are damaged, or too "
            "large for this precision: try compute_precision.param_dtype=fp32"
        )


@dataclass(frozen=True, kw_only=True)
class Profiles:
    """Profiles of one kind, in the order of their names."""

    values: Tensor  # [p, D]; float64 unless each is one image
    names: np.ndarray  # [p] str: values of the columns of its level; of an image, its path
    members: Sequence[np.ndarray]  # rows of the images of each profile

    def __len__(self) -> int:
        return len(self.names)


def build_profiles(images: Images, levels: Sequence[Level], *, values: Tensor | None = None) -> Profiles:
    """Average images, level by level.

    Args:
        images: one row an image.
        levels: the columns and the statistic of each step; without any, each image is a profile.
        values: their features, if not as they are in `images`: [n, D].

    Raises:
        DatasetError: members of a profile fall into different profiles of the next level, as two treatments in a well.
    """
    profiles = Profiles(
        values=images.values if values is None else values,
        names=images.names,
        members=np.arange(len(images))[:, None],
    )
    for level in levels:
        profiles = _next_level(profiles, level, images=images)
    return profiles


def _next_level(profiles: Profiles, level: Level, *, images: Images) -> Profiles:
    texts = [values_of(profiles, images.columns[column]) for column in level.columns]
    for column, of_column in zip(level.columns, texts, strict=True):
        several = np.flatnonzero([len(values) > 1 for values in of_column])
        if len(several):
            shown = ", ".join(of_column[several[0]][:_SHOWN])
            raise DatasetError(
                f"{images.name}: the images of {profiles.names[several[0]]} have several values of {column} ({shown}), "
                f"which {level} needs to be one"
            )
    keys = np.array(["\x1f".join(values[0] for values in row) for row in zip(*texts, strict=True)], dtype=str)
    names, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    parts = np.split(np.argsort(inverse, kind="stable"), np.cumsum(sizes)[:-1])
    average = _AVERAGES[level.statistic]
    return Profiles(
        values=torch.stack([average(profiles.values[torch.from_numpy(rows)].double()) for rows in parts]),
        names=np.char.replace(names, "\x1f", " "),
        members=[np.sort(np.concatenate([profiles.members[row] for row in rows])) for rows in parts],
    )


def _median(values: Tensor) -> Tensor:
    """Median of each feature; of an even number of members the mean of the middle two."""
    return torch.from_numpy(np.median(values.numpy(), axis=0))


_AVERAGES = {"mean": lambda values: values.mean(dim=0), "median": _median}


def values_of(profiles: Profiles, column: np.ndarray) -> list[list[str]]:
    """Return the values that the images of each profile have in a column, without repeats, sorted."""
    return [sorted(set(column[rows].tolist())) for rows in profiles.members]


def text_of(values: Sequence[str]) -> str:
    """Write the values of a profile as one text, equal for equal sets."""
    return _BETWEEN.join(values)
