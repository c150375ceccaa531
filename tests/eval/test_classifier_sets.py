"""What classifiers are fitted on, chosen by and reported on."""

import numpy as np
import pytest
import torch

from dinov2.errors import DatasetError
from dinov2.eval.classifier_sets import join, make_classifier_sets, predict, right_pct
from dinov2.eval.feature_set import FeatureSet


def features(name, targets, *, seed=0, groups=None, order=None, class_names=("a", "b", "c")):
    targets = np.asarray(targets)
    order = np.arange(len(targets)) if order is None else order
    values = torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(seed))
    columns = {"path": np.array([f"{name}{number}.png" for number in range(len(targets))])[order]}
    if groups is not None:
        columns["group"] = np.asarray(groups)[order]
    return FeatureSet(
        name=name,
        values=values[torch.from_numpy(order)],
        targets=targets[order],
        places=np.arange(len(targets)),
        class_names=class_names,
        columns=columns,
    )


def paths(part):
    return set(part.source.columns["path"][part.rows])


def test_without_a_test_set_a_part_of_train_chooses_and_val_is_reported():
    train, val = features("t", [0, 1, 2, -1] * 25), features("v", [0, 1, -1, 2])
    sets = make_classifier_sets(train, val, None)
    assert len(sets.train) == 75 and paths(sets.fit) | paths(sets.choose) == paths(sets.train)
    assert not paths(sets.fit) & paths(sets.choose) and 5 <= len(sets.choose) <= 30
    assert paths(sets.report) == {"v0.png", "v1.png", "v3.png"} and not sets.has_test
    assert sets.description == f"{len(sets.choose)} of the 75 training images, held out"
    assert sets.class_names == ("a", "b", "c")


def test_with_a_test_set_val_chooses_and_nothing_is_held_out():
    sets = make_classifier_sets(features("t", [0, 1] * 9), features("v", [0, 1]), features("x", [1, 1, 0]))
    assert paths(sets.fit) == paths(sets.train) and len(sets.fit) == 18
    assert paths(sets.choose) == {"v0.png", "v1.png"} and paths(sets.report) == {"x0.png", "x1.png", "x2.png"}
    assert sets.has_test and sets.description == "2 images of v"


def test_one_candidate_holds_nothing_out():
    sets = make_classifier_sets(features("t", [0, 1]), features("v", [0, 1]), None, has_choice=False)
    assert len(sets.fit) == 2 and len(sets.choose) == 0


def test_groups_are_not_torn_apart():
    groups = [f"g{number // 4}" for number in range(80)]
    train = features("t", [0, 1] * 40, groups=groups)
    sets = make_classifier_sets(train, features("v", [0, 1]), None)
    fit, choose = (set(train.columns["group"][part.rows]) for part in (sets.fit, sets.choose))
    assert not fit & choose and len(fit | choose) == 20


def test_the_order_of_the_files_does_not_show():
    targets = [0, 1, 2] * 30
    order = np.random.default_rng(0).permutation(90)
    first, second = (
        make_classifier_sets(features("t", targets, order=places), features("v", [0, 1, 2]), None)
        for places in (None, order)
    )
    assert torch.equal(first.fit.values(), second.fit.values())
    assert torch.equal(first.fit.targets, second.fit.targets)
    for one, other in zip(join([first.train, first.choose]), join([second.train, second.choose]), strict=True):
        assert torch.equal(one, other)


def test_classes_that_only_val_has_count_as_wrong_and_are_not_fitted(caplog):
    val = features("v", [0, 2, 1])
    sets = make_classifier_sets(features("t", [0, 1] * 20), val, features("x", [0, 1]))
    assert sorted(sets.choose.classes) == [-1, 0, 1]
    _, targets = join([sets.train, sets.choose])
    assert len(targets) == 42 and targets.min() == 0
    assert "v: 1 images are of classes that t does not have (c); they count as wrong" in caplog.text


def test_too_few_images_to_hold_any_out_are_refused():
    with pytest.raises(DatasetError, match="t: its images with labels, 2, are too few to hold some of them out"):
        make_classifier_sets(features("t", [0, 1]), features("v", [0, 1]), None)


def test_missing_labels_and_single_classes_are_refused():
    with pytest.raises(DatasetError, match="t: no image has a label"):
        make_classifier_sets(features("t", [-1, -1]), features("v", [0, 1]), None)
    with pytest.raises(DatasetError, match="t: all images are of one class"):
        make_classifier_sets(features("t", [1, 1]), features("v", [0, 1]), None)


def test_accuracy_of_images_and_of_classes():
    predicted = predict(torch.eye(3)[torch.tensor([0, 0, 0, 1])])
    targets = torch.tensor([0, 0, 1, 1])
    assert right_pct(predicted, targets, metric="mean_accuracy") == 75
    assert right_pct(predicted[:3], targets[:3], metric="mean_per_class_accuracy") == 50
    assert right_pct(predicted, torch.tensor([0, 0, -1, -1]), metric="mean_accuracy") == 50
    assert right_pct(predict(torch.full((4, 3), torch.nan)), targets, metric="mean_accuracy") == 0


def test_predictions_are_probabilities_of_the_reported_images():
    val = features("v", [0, -1, 1, 2], groups=["p", "p", "q", "q"])
    sets = make_classifier_sets(features("t", [0, 1, 2] * 20), val, None)
    found = sets.predictions(torch.randn(3, 3))
    np.testing.assert_allclose(found.scores.sum(axis=1), 1)
    assert found.paths.tolist() == ["v0.png", "v2.png", "v3.png"] and found.places.tolist() == [0, 2, 3]
    assert found.targets.tolist() == [0, 1, 2] and found.groups.tolist() == [0, 1, 1]
    assert found.columns["target"].tolist() == ["a", "b", "c"] and found.columns["group"].tolist() == ["p", "q", "q"]
