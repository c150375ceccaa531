"""What an evaluation says of each image of one set: scores of all classes beside the right class, or measurements.

Shapes: M images, C classes of the training set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.groups import Groups, match_groups
from dinov2.eval.labels import LabelledSet
from dinov2.eval.neighbours import num_better_classes

_STEPS = 2.0**40  # between no share and all shares: 2^22 images of a group add up in 63 bits


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Scores of the labelled images of one set.

    Raises:
        ValueError: the arrays do not fit each other, or a score is negative or not finite, or an image has no score
            above 0.
    """

    name: str  # of the set, for sentences
    targets: np.ndarray  # [M] int64, right class; -1 if the training set lacks it, which counts as wrong
    scores: np.ndarray  # [M, C] float64, probabilities or votes, >= 0; larger = likelier
    class_names: tuple[str, ...]  # of classes 0 .. C-1
    places: np.ndarray  # [M] int64, place of the image in the dataset
    groups: np.ndarray | None = None  # [M] any numbers for the group of each image; None: every image stands alone
    paths: np.ndarray | None = None  # [M] str; None if the dataset does not tell
    columns: Mapping[str, np.ndarray] = field(
        default_factory=dict
    )  # [M] each: group, plate, ... for the table of files
    rows: str = "images"  # what the rows are

    def __post_init__(self) -> None:
        num_images, num_classes = self.scores.shape
        arrays = {name: getattr(self, name) for name in ("targets", "places", "groups", "paths")}
        for name, values in (arrays | dict(self.columns)).items():
            if values is not None and values.shape != (num_images,):
                raise ValueError(f"{name} has shape {values.shape} but there are scores of {num_images} images")
        if len(self.class_names) != num_classes:
            raise ValueError(f"{len(self.class_names)} class names for scores of {num_classes} classes")
        if num_images and not (self.targets.min() >= -1 and self.targets.max() < num_classes):
            raise ValueError(f"targets must be -1 .. {num_classes - 1}")
        if not np.isfinite(self.scores).all() or (self.scores < 0).any() or not (self.scores.sum(axis=1) > 0).all():
            raise ValueError("scores must be finite, at least 0 and above 0 for one class of each image")

    @classmethod
    def for_images(
        cls, images: FeatureSet, *, targets: np.ndarray, scores: np.ndarray, class_names: Sequence[str]
    ) -> "Predictions":
        """Wrap scores for the labelled images of a set.

        Args:
            images: of the set; those without a label are left out here.
            targets: class of each labelled image, [M], -1 if the training set lacks it.
            scores: [M, C].
            class_names: of classes 0 .. C-1.
        """
        rows = np.flatnonzero(images.targets >= 0)
        labels, groups, columns = images.targets[rows], images.group_numbers(), dict(images.columns)
        paths = columns.pop("path", None)
        beyond = range(len(images.class_names), int(labels.max(initial=-1)) + 1)  # labels without a name
        names = np.array([*images.class_names, *map(str, beyond)], dtype=object)[labels]
        return cls(
            name=images.name,
            targets=targets,
            scores=scores,
            class_names=tuple(class_names),
            places=images.places[rows],
            groups=None if groups is None else groups[rows],
            paths=None if paths is None else np.asarray(paths)[rows],
            columns={name: np.asarray(values)[rows] for name, values in columns.items()} | {"target": names},
        )

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def num_classes(self) -> int:
        """Number of classes that can be predicted."""
        return self.scores.shape[1]

    def predicted(self) -> np.ndarray:
        """Return the class with the largest score of each image, the first of equals, [M] int64."""
        return self.scores.argmax(axis=1)

    def shares(self) -> np.ndarray:
        """Return the scores of each image scaled to sum to 1, [M, C] float64."""
        return self.scores / self.scores.sum(axis=1, keepdims=True)

    def is_right(self, *, among: int) -> np.ndarray:
        """Tell for each image whether the right class is among the first few, and has a score above 0; [M] bool."""
        better = num_better_classes(torch.from_numpy(self.scores), torch.from_numpy(self.targets)).numpy()
        return (better < among) & (self.targets >= 0)

    def take(self, rows: np.ndarray) -> "Predictions":
        """Keep some images, given as a mask or as row numbers."""
        kept = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in ("targets", "scores", "places", "groups", "paths")
        }
        return replace(self, **kept, columns={name: values[rows] for name, values in self.columns.items()})

    def by_group(self) -> "Predictions | None":
        """Score each group as a whole, by the mean of its images' scores scaled to sum to 1.

        Groups whose images have different classes are left out; `group_notes` counts them. Shares are rounded and added
        as integers, so that the order of the images does not show. `places` and `paths` are those of each group's first
        image.

        Returns:
            One row a group, by rising group; None without a group of several images of one class.
        """
        groups = self._matched_groups
        if not groups.count:
            return None
        rows = np.flatnonzero(groups.of_images >= 0)
        numbers = groups.of_images[rows]
        sums = np.zeros((groups.count, self.num_classes), dtype=np.int64)
        np.add.at(sums, numbers, np.rint(self.shares()[rows] * _STEPS).astype(np.int64))
        first = rows[np.unique(numbers, return_index=True)[1]]
        sizes = np.bincount(numbers)[:, None]
        return replace(self.take(first), targets=groups.classes, scores=sums / (sizes * _STEPS), rows="groups")

    def group_notes(self) -> Sequence[str]:
        """Say which groups `by_group` leaves out, one sentence each."""
        return self._matched_groups.notes

    @cached_property
    def _matched_groups(self) -> Groups:
        labels = LabelledSet(name=self.name, targets=self.targets + 1)  # unknown classes are labels there, too
        return match_groups(labels, classes=self.targets, groups=self.groups)


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Numbers of 0..1 for each image of one set, whose means are the scores: whether a query was answered, and so on.

    Raises:
        ValueError: the arrays do not fit each other, or a number is none of 0..1.
    """

    name: str  # of the set, for sentences
    values: Mapping[str, np.ndarray]  # [M] float64 each, 0..1, by the name of the score; nan: the image does not count
    places: np.ndarray  # [M] int64, place of the image in the dataset
    groups: np.ndarray | None = None  # [M] any numbers for the group of each image; None: every image stands alone
    paths: np.ndarray | None = None  # [M] str; None if the dataset does not tell
    rows: str = "images"  # what the rows are

    def __post_init__(self) -> None:
        arrays = {"groups": self.groups, "paths": self.paths, **self.values}
        for name, values in arrays.items():
            if values is not None and values.shape != self.places.shape:
                raise ValueError(f"{name} has shape {values.shape} but there are {len(self)} places")
        for name, values in self.values.items():
            if not (np.isnan(values) | ((values >= 0) & (values <= 1))).all():
                raise ValueError(f"{name} must lie in 0..1, or be nan")

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: np.ndarray) -> "Measurements":
        """Keep some images, given as a mask or as row numbers."""
        kept = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in ("places", "groups", "paths")
        }
        return replace(self, values={name: values[rows] for name, values in self.values.items()}, **kept)

    def scores(self) -> Mapping[str, float | None]:
        """Return the mean of each, in percent; None where no image counts."""
        known = {name: values[~np.isnan(values)] for name, values in self.values.items()}
        return {name: 100 * float(values.mean()) if len(values) else None for name, values in known.items()}
