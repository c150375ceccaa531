"""Metrics of predictions: against scikit-learn, by hand, and where a set lacks classes."""

import numpy as np
import pytest
from sklearn import metrics as sk
from support.eval_predictions import predictions, random_predictions

from dinov2.eval.metrics import classification_metrics
from dinov2.eval.predictions import Measurements, Predictions
from dinov2.eval.weighted_metrics import WeightedMetrics


def test_scores_are_those_of_scikit_learn():
    found = random_predictions(300, 4)
    targets, predicted, shares = found.targets, found.predicted(), found.shares()
    scores = classification_metrics(found).scores
    expected = {
        "top1_pct": sk.accuracy_score(targets, predicted),
        "balanced_accuracy_pct": sk.balanced_accuracy_score(targets, predicted),
        "precision_macro_pct": sk.precision_score(targets, predicted, average="macro"),
        "recall_macro_pct": sk.recall_score(targets, predicted, average="macro"),
        "f1_macro_pct": sk.f1_score(targets, predicted, average="macro"),
        "precision_micro_pct": sk.precision_score(targets, predicted, average="micro"),
        "recall_micro_pct": sk.recall_score(targets, predicted, average="micro"),
        "f1_micro_pct": sk.f1_score(targets, predicted, average="micro"),
        "roc_auc_macro_pct": sk.roc_auc_score(targets, shares, multi_class="ovr"),
        "average_precision_macro_pct": sk.average_precision_score(np.eye(4)[targets], shares),
    }
    assert {name: scores[name] for name in expected} == pytest.approx({k: 100 * v for k, v in expected.items()})
    assert set(scores) == {*expected, "top5_pct"} and scores["top5_pct"] == 100


def test_a_case_by_hand():
    found = predictions([0, 0, 1, -1], [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.2, 0.8]])
    metrics = classification_metrics(found)
    assert metrics.scores["top1_pct"] == 50  # the class that training lacks is wrong
    assert metrics.scores["balanced_accuracy_pct"] == 75  # 1 of 2, 1 of 1
    assert metrics.scores["precision_macro_pct"] == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert metrics.scores["roc_auc_pct"] == pytest.approx(100 * 2 / 3)  # 0.7 beats 0.1 and 0.6, not 0.8
    assert metrics.scores["average_precision_pct"] == 50
    assert metrics.confusion.tolist() == [[1, 1], [0, 1], [0, 1]]
    assert metrics.per_class[0] | {"roc_auc_pct": 0, "average_precision_pct": 0} == {
        "class": "a",
        "num_images": 2,
        "precision_pct": 100,
        "recall_pct": 50,
        "f1_pct": pytest.approx(200 / 3),
        "roc_auc_pct": 0,
        "average_precision_pct": 0,
    }
    assert not metrics.notes


def test_top5_counts_the_first_of_equals_and_only_classes_with_a_score():
    scores = [[1, 1, 1, 1, 1, 1, 0]] * 4
    assert classification_metrics(predictions([0, 4, 5, 6], scores)).scores["top5_pct"] == 50
    assert predictions([0, 4, 5, 6], scores).predicted().tolist() == [0] * 4


def test_absent_classes_are_left_out_of_averages():
    metrics = classification_metrics(predictions([0, 0, 1], [[0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.2, 0.7, 0.1]]))
    assert metrics.scores["balanced_accuracy_pct"] == 75 and metrics.per_class[2]["recall_pct"] is None
    assert metrics.notes == ["val: no image is of 1 of the 3 classes (c); averages over classes leave them out"]


def test_a_set_of_one_class():
    metrics = classification_metrics(predictions([1, 1], [[0.6, 0.4], [0.1, 0.9]]))
    scores = metrics.scores
    assert scores["top1_pct"] == 50 and scores["roc_auc_pct"] is None and scores["average_precision_macro_pct"] is None
    assert metrics.notes[1] == ("val: all images are of one class (b); ROC-AUC and average precision are not defined")


def test_only_unknown_classes():
    scores = classification_metrics(predictions([-1, -1], [[1, 0], [0, 1]])).scores
    assert scores["top1_pct"] == 0 and scores["balanced_accuracy_pct"] is None and scores["f1_macro_pct"] is None


@pytest.mark.parametrize(("num_classes", "unknown"), [(2, 0), (4, 5), (7, 3)])
def test_weighted_scores_are_those_of_repeated_images(num_classes, unknown):
    found = random_predictions(60, num_classes, unknown=unknown)
    weights = np.random.default_rng(1).integers(0, 3, size=(60, 5)).astype(np.int32)
    weighted = WeightedMetrics(found, np.arange(60), with_rankings=True)(weights)
    for column in range(5):
        scores = classification_metrics(found.take(np.repeat(np.arange(60), weights[:, column]))).scores
        assert {name: values[column] for name, values in weighted.items()} == pytest.approx(scores)


def test_groups_are_scored_by_the_mean_of_shares():
    scores = [[9, 1], [1, 3], [1, 4], [0, 1], [3, 1], [1, 1]]
    found = predictions([0, 0, 1, 1, 0, 1], scores, groups=np.array([5, 5, 3, 3, 8, 8]))
    groups = found.by_group()
    assert groups.targets.tolist() == [1, 0] and groups.groups.tolist() == [3, 5] and groups.rows == "groups"
    assert groups.scores == pytest.approx(np.array([[0.1, 0.9], [0.575, 0.425]]))
    assert found.group_notes() == (
        "val: 1 of 3 groups have images of different classes; they are left out of the scores of groups",
    )
    order = np.random.default_rng(0).permutation(6)
    assert (found.take(order).by_group().scores == groups.scores).all()
    assert predictions([0, 1], [[1, 0], [0, 1]], groups=np.array([1, 2])).by_group() is None
    assert predictions([0, 1], [[1, 0], [0, 1]]).by_group() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.array([[0.5, -0.1]])}, "scores must be finite"),
        ({"scores": np.array([[0.5, np.nan]])}, "scores must be finite"),
        ({"scores": np.zeros((1, 2))}, "above 0 for one class of each image"),
        ({"targets": np.array([2])}, "targets must be -1 .. 1"),
        ({"places": np.arange(2)}, "places has shape"),
        ({"class_names": ("a",)}, "1 class names for scores of 2 classes"),
    ],
)
def test_wrong_predictions_are_refused(change, message):
    right = {
        "targets": np.array([0]),
        "scores": np.array([[0.5, 0.5]]),
        "places": np.arange(1),
        "class_names": ("a", "b"),
    }
    with pytest.raises(ValueError, match=message):
        Predictions(name="val", **right | change)


def test_measurements_leave_out_what_does_not_count():
    found = Measurements(name="val", values={"recall": np.array([1, 0, np.nan])}, places=np.arange(3))
    assert found.scores() == {"recall": 50} and found.take(np.array([2])).scores() == {"recall": None}
    with pytest.raises(ValueError, match="recall must lie in 0..1"):
        Measurements(name="val", values={"recall": np.array([50.0])}, places=np.arange(1))
