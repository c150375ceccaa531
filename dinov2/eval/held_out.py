"""Which images choose the hyper-parameters of a classifier, so that the images reported on have no say in it.

With a test set, hyper-parameters are chosen on the validation set and the test set is scored once. Without one, they
are chosen on a fifth of the training set that is held out, group by group where there are groups, and the validation
set is scored once. Which groups are held out depends on their names (without groups, on the images' paths below the
folder that holds all of them) alone, not on where that folder lies. The division is made in
`dinov2.eval.classifier_sets`.
"""

import os

import numpy as np

from dinov2.data.splits import in_split
from dinov2.errors import DatasetError
from dinov2.eval.feature_set import FeatureSet

HELD_OUT_SHARE = 0.2  # of the groups, about


def held_out(train: FeatureSet) -> np.ndarray:
    """Choose the images that are held out: a fifth of the groups, about, at least one, and not the last of a class.

    Images without a label are not held out.

    Returns:
        [n] bool.

    Raises:
        DatasetError: none can be spared.
    """
    is_labelled = train.targets >= 0
    units, names = _units(train)
    kinds = np.unique(np.stack([units, train.targets])[:, is_labelled], axis=1)  # pairs of unit and class
    # datasets are split by the hash of the bare names, which tells nothing apart within their training split
    salted = np.array([f"held out:{name}" for name in names], dtype=object)
    is_out = _spare(in_split(salted, "val", val_fraction=HELD_OUT_SHARE), kinds)
    for unit in salted.argsort():
        if is_out[kinds[0]].any():
            break
        is_out = _spare(np.arange(len(names)) == unit, kinds)
    if not is_out[kinds[0]].any():
        what = "images" if train.group_numbers() is None else "groups"
        raise DatasetError(
            f"{train.name}: its {what} with labels, {len(np.unique(kinds[0]))}, are too few to hold some of them out "
            "and keep all classes; name a --test-dataset, then hyper-parameters are chosen on the validation set"
        )
    return is_out[units] & is_labelled


def _spare(is_out: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Take back the units that have images of a class of which no others are left."""
    units, classes = kinds
    left = classes[~is_out[units]]
    spared = is_out.copy()
    spared[units[~np.isin(classes, left)]] = False
    return spared


def _units(train: FeatureSet) -> tuple[np.ndarray, list[str]]:
    """Return the unit (group, or image without groups) of each image, [n], and the name of each unit.

    Groups of one name in several parts of a mixture are told apart.
    """
    paths = train.columns.get("path")
    names = np.asarray(train.places).astype(str) if paths is None else _below_common_folder(paths)
    numbers = train.group_numbers()
    if numbers is None:
        return np.arange(len(names)), names.tolist()
    shown = np.asarray(train.columns["group"] if "group" in train.columns else numbers).astype(str)
    part = np.asarray(train.columns["dataset"]).astype(str) if "dataset" in train.columns else np.full(len(shown), "")
    first = np.unique(numbers, return_index=True)[1]
    return numbers, [f"{part[row]}/{shown[row]}" if part[row] else shown[row] for row in first]


def _below_common_folder(paths: np.ndarray) -> np.ndarray:
    """Paths from the folder on that holds all images, [n] str."""
    texts = np.asarray(paths).astype(str).tolist()
    folder = os.path.commonprefix(texts).rpartition("/")[0]
    return np.array([text[len(folder) :] for text in texts], dtype=str)
