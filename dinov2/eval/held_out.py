"""Which images choose the hyper-parameters of a classifier, so that the images reported on have no say in it.

With a test set, hyper-parameters are chosen on the validation set and the test set is scored once. Without one, they
are chosen on a fifth of the training set that is held out, group by group where there are groups, and the validation
set is scored once. Which groups are held out depends on their names (the images' paths, without groups) alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dinov2.data.splits import in_split
from dinov2.errors import DatasetError
from dinov2.eval.feature_set import FeatureSet

HELD_OUT_SHARE = 0.2  # of the groups, about


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The roles of images; all sets hold labelled images only."""

    fit: FeatureSet  # every hyper-parameter is tried on them
    choose: FeatureSet  # and the best one chosen on these
    final: FeatureSet  # the training set as a whole, for the fit with the chosen hyper-parameters
    report: FeatureSet  # scored once
    chosen_on: str  # for the results file

    def details(self) -> Mapping[str, Any]:
        """Return what the results file says of it."""
        counts = {"n_fit": len(self.fit), "n_choose": len(self.choose), "n_final": len(self.final)}
        return {"chosen_on": self.chosen_on, "reported_on": self.report.name} | counts


def select_sets(train: FeatureSet, val: FeatureSet, test: FeatureSet | None) -> Selection:
    """Give the sets of an evaluation their roles.

    Raises:
        DatasetError: without a test set, the training set is a single image or group.
    """
    train, val = train.labelled(), val.labelled()
    if test is not None:
        return Selection(fit=train, choose=val, final=train, report=test.labelled(), chosen_on=val.name)
    is_held_out = held_out(train)
    unit = "paths" if train.group_numbers() is None else "groups"
    return Selection(
        fit=train.take(~is_held_out),
        choose=train.take(is_held_out),
        final=train,
        report=val,
        chosen_on=f"{is_held_out.sum()} of {len(train)} images of {train.name}, held out by a hash of their {unit}",
    )


def held_out(train: FeatureSet, *, share: float = HELD_OUT_SHARE) -> np.ndarray:
    """Choose the images that are held out, [n] bool: about a share of the groups, at least one, and not all.

    Raises:
        DatasetError: there is a single image or group.
    """
    groups, keys = _units(train)
    if len(set(keys)) < 2:
        unit = "image with a label" if train.group_numbers() is None else "group"
        raise DatasetError(
            f"{train.name}: a single {unit}, so none can be held out to choose hyper-parameters on; "
            "name a --test-dataset, then they are chosen on the validation set"
        )
    # datasets are split by the hash of the bare names, which tells nothing apart within their training split
    salted = [f"held out:{key}" for key in keys]
    is_out = in_split(salted, "val", val_fraction=share)
    low, high = 0.0, 1.0
    while is_out.all() or not is_out.any():  # with a handful of groups: halve until a hash lies apart
        low, high = (low, share) if is_out.all() else (share, high)
        share = (low + high) / 2
        is_out = in_split(salted, "val", val_fraction=share)
    return is_out[groups]


def _units(train: FeatureSet) -> tuple[np.ndarray, list[str]]:
    """Return the unit (group, or image without groups) of each image, [n], and the name of each unit.

    Groups of one name in several parts of a mixture are told apart.
    """
    paths = train.columns.get("path")
    names = np.asarray(train.places if paths is None else paths).astype(str)
    numbers = train.group_numbers()
    if numbers is None:
        return np.arange(len(names)), names.tolist()
    shown = np.asarray(train.columns["group"] if "group" in train.columns else numbers).astype(str)
    part = np.asarray(train.columns["dataset"]).astype(str) if "dataset" in train.columns else np.full(len(shown), "")
    first = np.unique(numbers, return_index=True)[1]
    return numbers, [f"{part[row]}/{shown[row]}" if part[row] else shown[row] for row in first]
