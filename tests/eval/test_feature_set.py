"""The set of features that evaluations read: rows, labels and groups stay together."""

import numpy as np
import pytest
import torch

from dinov2.errors import ConfigError
from dinov2.eval.feature_set import FeatureSet


def features(**changes):
    known = {
        "name": "Some:set=1",
        "values": torch.arange(12.0).reshape(4, 3),
        "targets": np.array([1, -1, 0, 1]),
        "places": np.array([0, 2, 3, 7]),
        "class_names": ("a", "b"),
        "columns": {"group": np.array(["y", "x", "y", "z"]), "path": np.array(list("pqrs"))},
    }
    return FeatureSet(**known | changes)


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0]), torch.tensor([2, 0])])
def test_rows_are_taken_of_everything(rows):
    found = features(groups=np.array([5, 6, 5, 9])).take(rows)
    assert found.values.tolist() == [[6, 7, 8], [0, 1, 2]] and len(found) == 2
    assert (found.targets.tolist(), found.places.tolist(), found.groups.tolist()) == ([0, 1], [3, 0], [5, 5])
    assert found.columns["path"].tolist() == ["r", "p"] and found.class_names == ("a", "b")


def test_labelled_images():
    assert features().labelled().places.tolist() == [0, 3, 7]
    whole = features(targets=np.zeros(4, dtype=np.int64))
    assert whole.labelled() is whole
    assert len(features(targets=np.full(4, -1)).labelled()) == 0


def test_groups_are_numbered():
    assert features().group_numbers().tolist() == [1, 0, 1, 2]
    assert features(groups=np.array([30, 7, 7, 7])).group_numbers().tolist() == [1, 0, 0, 0]
    assert features(columns={}).group_numbers() is None


def test_a_pool_is_cut_out_of_a_larger_one():
    found = features(values=torch.arange(16.0).reshape(4, 4), pool="cls+mean").select("mean")
    assert found.values[0].tolist() == [2, 3] and found.pool == "mean" and found.targets.tolist() == [1, -1, 0, 1]
    with pytest.raises(ConfigError, match="features of the pool cls do not hold those of last2"):
        features().select("last2")
