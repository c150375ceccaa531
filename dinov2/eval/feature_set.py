"""Features of one dataset as evaluations take them: values, labels, groups and columns, row by row.

Shapes: n images, D features, N patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dinov2.eval.pooling import parse_pool, select_pool

NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of a dataset's images, in the dataset's order; the same on every rank."""

    name: str  # dataset string
    values: Tensor  # [n, D], [n, N, D] of the pool `patches`; on the CPU, may be a read-only map of the cache's file
    targets: np.ndarray  # [n], int64; NO_LABEL without a label
    places: np.ndarray  # [n], int64, rising: place of the image in the dataset; unreadable images may be left out
    class_names: tuple[str, ...] = ()  # of the labels 0, 1, ...; empty if unknown
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # [n] each: path, group, plate, well, ...
    groups: np.ndarray | None = None  # [n], int64, any numbers: the group of each image; None: none are known
    pool: str = "cls"
    weights: str = ""  # as the user named them
    checkpoint_key: str = "teacher"
    digest: str = ""  # of weights, dataset, preprocessing, pool and type of number

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: np.ndarray | Tensor | Sequence[int]) -> "FeatureSet":
        """Keep some rows, given as a mask or as row numbers; in that order, copied."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return replace(
            self,
            values=self.values[torch.from_numpy(rows)],
            targets=self.targets[rows],
            places=self.places[rows],
            columns={name: np.asarray(column)[rows] for name, column in self.columns.items()},
            groups=None if self.groups is None else self.groups[rows],
        )

    def select(self, pool: str) -> "FeatureSet":
        """Return the features of a smaller pool, cut out of this larger one: `cls` out of `last4+mean`.

        Raises:
            ConfigError: there is no such pool, or this one does not hold it.
        """
        values = select_pool(self.values, pool=self.pool, wanted=pool)
        return replace(self, values=values, pool=parse_pool(pool).name)

    def labelled(self) -> "FeatureSet":
        """Keep the images with a label; itself, if all have one."""
        has_label = self.targets >= 0
        return self if has_label.all() else self.take(has_label)

    def group_numbers(self) -> np.ndarray | None:
        """Number the groups 0, 1, ...: the group of each image, [n] int64; None if the dataset knows no groups."""
        groups = self.columns.get("group") if self.groups is None else self.groups
        return None if groups is None else np.unique(groups, return_inverse=True)[1].astype(np.int64)
