"""Labels of a training and a validation set, brought to one numbering of classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinov2.errors import DatasetError

_SHOWN = 3  # classes named in a sentence


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Labels of one dataset."""

    name: str  # for sentences
    targets: np.ndarray  # [n], int64; below 0 for an image without a label
    class_names: Sequence[str] = ()  # names of the classes 0, 1, ...; empty if unknown

    def count(self) -> int:
        """Count the images that have a label."""
        return int((self.targets >= 0).sum())

    def labels(self) -> np.ndarray:
        """Return the labels that occur, in rising order."""
        return np.unique(self.targets[self.targets >= 0])

    def describe(self, labels: Sequence[int] | np.ndarray) -> str:
        """Name some classes."""
        names = [self.class_names[label] if label < len(self.class_names) else str(label) for label in labels]
        return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Classes 0, 1, ... = those of the training set, by rising label."""

    train: np.ndarray  # class of each training image, [n], -1 without a label
    val: np.ndarray  # class of each validation image, [m], -1 without a label or if the training set lacks its class
    count: int
    notes: tuple[str, ...]  # what the user should know, one sentence each


def match_classes(train: LabelledSet, val: LabelledSet) -> Classes:
    """Number the classes of both sets alike: by class name where both know names, else by label.

    Raises:
        DatasetError: a set has no labels, the training set one class only, or the sets have no class in common.
    """
    for labelled in (train, val):
        if not len(labelled.labels()):
            raise DatasetError(
                f"{labelled.name}: no image has a label, and labels are needed here; ImageFolder takes the names of "
                "the folders below its root, a class of your own gives them by get_targets()"
            )
    labels = train.labels()
    if len(labels) == 1:
        raise DatasetError(f"{train.name}: all images are of one class ({train.describe(labels)}); two are needed")
    class_of_train = {int(label): number for number, label in enumerate(labels)}
    if train.class_names and val.class_names:
        by_name = {train.class_names[label]: number for label, number in class_of_train.items()}
        class_of_val = {int(label): by_name.get(val.class_names[label], -1) for label in val.labels()}
    else:
        class_of_val = {int(label): class_of_train.get(int(label), -1) for label in val.labels()}
    unknown = [label for label, number in class_of_val.items() if number < 0]
    if len(unknown) == len(class_of_val):
        raise DatasetError(
            f"{val.name}: none of its classes ({val.describe(unknown)}) is one of {train.name} "
            f"({train.describe(labels)})"
        )
    return Classes(
        train=_translate(train.targets, class_of_train),
        val=_translate(val.targets, class_of_val),
        count=len(labels),
        notes=(*_unlabelled(train), *_unlabelled(val), *_unknown(train, val, unknown)),
    )


def _translate(targets: np.ndarray, table: dict[int, int]) -> np.ndarray:
    labels, inverse = np.unique(targets, return_inverse=True)
    return np.array([table.get(int(label), -1) for label in labels], dtype=np.int64)[inverse]


def _unlabelled(labelled: LabelledSet) -> list[str]:
    missing = int((labelled.targets < 0).sum())
    return [f"{labelled.name}: {missing} of {len(labelled.targets)} images have no label and are left out"] * bool(
        missing
    )


def _unknown(train: LabelledSet, val: LabelledSet, unknown: Sequence[int]) -> list[str]:
    if not unknown:
        return []
    count = int(np.isin(val.targets, unknown).sum())
    return [
        f"{val.name}: {count} images are of classes that {train.name} does not have ({val.describe(unknown)}); "
        "they count as wrong"
    ]
