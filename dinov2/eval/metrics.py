"""Metrics of a classifier on one set of images: accuracies, precision, recall, F1, ROC-AUC, average precision.

What is defined how, where sets are small and unbalanced:

- An image whose class the training set lacks counts as wrong, and as a negative of every class.
- Averages over classes ("macro", balanced accuracy) go over the classes that the set has images of. A class that is
  never predicted has precision 0.
- Every image has one label, so precision, recall and F1 over all images ("micro") are the accuracy.
- ROC-AUC and average precision are one class against the rest, by the class's share of the image's scores. With images
  of one class only they are not defined: None, and a note.

Source: definitions of scikit-learn, which computes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_fscore_support, roc_auc_score

from dinov2.eval.labels import LabelledSet
from dinov2.eval.predictions import Predictions

GROUP = "group_"  # before the name of a metric: of groups as a whole
HEADLINES = ("top1_pct", "balanced_accuracy_pct", "f1_macro_pct", "roc_auc_macro_pct")  # those on the screen


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of one set, in percent."""

    scores: Mapping[str, float | None]  # by name; None: not defined on this set
    per_class: Sequence[Mapping[str, Any]]  # one entry a class
    confusion: (
        np.ndarray
    )  # [C + 1, C] int64, images by right and predicted class; last row: classes unknown to training
    notes: Sequence[str] = ()  # what the user should know, one sentence each


def classification_metrics(predictions: Predictions) -> Metrics:
    """Compute the metrics of one set of images, or of groups: see `Predictions.by_group`.

    Raises:
        ValueError: there are no images.
    """
    if not len(predictions):
        raise ValueError(f"{predictions.name}: there are no images to compute metrics of")
    targets, predicted, C = predictions.targets, predictions.predicted(), predictions.num_classes
    precision, recall, f1, support = precision_recall_fscore_support(
        targets, predicted, labels=np.arange(C), zero_division=0
    )
    is_present = support > 0
    areas, average_precisions = _rankings(predictions)
    top1 = _percent((targets == predicted).mean())
    scores = {
        "top1_pct": top1,
        "top5_pct": _percent(predictions.is_right(among=5).mean()),
        "balanced_accuracy_pct": _mean(recall[is_present]),
        "precision_macro_pct": _mean(precision[is_present]),
        "recall_macro_pct": _mean(recall[is_present]),
        "f1_macro_pct": _mean(f1[is_present]),
        **dict.fromkeys(("precision_micro_pct", "recall_micro_pct", "f1_micro_pct"), top1),
        "roc_auc_macro_pct": _mean(areas),
        "average_precision_macro_pct": _mean(average_precisions),
    }
    if C == 2:  # of the second class, which is the positive one
        scores |= {"roc_auc_pct": _percent(areas[1]), "average_precision_pct": _percent(average_precisions[1])}
    columns = {
        "precision_pct": precision,
        "recall_pct": np.where(is_present, recall, np.nan),
        "f1_pct": np.where(is_present, f1, np.nan),
        "roc_auc_pct": areas,
        "average_precision_pct": average_precisions,
    }
    per_class = [
        {"class": name, "num_images": int(support[number])}
        | {column: _percent(values[number]) for column, values in columns.items()}
        for number, name in enumerate(predictions.class_names)
    ]
    confusion = confusion_matrix(np.where(targets < 0, C, targets), predicted, labels=np.arange(C + 1))[:, :C]
    return Metrics(scores=scores, per_class=per_class, confusion=confusion, notes=_notes(predictions, support))


def _rankings(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return ROC-AUC and average precision of each class against the rest, 0..1, [C] each; nan if not defined."""
    areas, average_precisions = np.full((2, predictions.num_classes), np.nan)
    shares = predictions.shares()
    for number in np.unique(predictions.targets[predictions.targets >= 0]):
        is_positive = predictions.targets == number
        if not is_positive.all():
            areas[number] = roc_auc_score(is_positive, shares[:, number])
            average_precisions[number] = average_precision_score(is_positive, shares[:, number])
    return areas, average_precisions


def _notes(predictions: Predictions, support: np.ndarray) -> Sequence[str]:
    present = np.flatnonzero(support)
    labels = LabelledSet(name=predictions.name, targets=predictions.targets, class_names=predictions.class_names)
    notes = []
    if len(present) < predictions.num_classes:
        absent = np.flatnonzero(support == 0)
        notes.append(
            f"{predictions.name}: no image is of {len(absent)} of the {predictions.num_classes} classes "
            f"({labels.describe(absent)}); averages over classes leave them out"
        )
    if len(present) == 1 and support.sum() == len(predictions):
        notes.append(
            f"{predictions.name}: all images are of one class ({labels.describe(present)}); ROC-AUC and average "
            "precision are not defined"
        )
    return notes


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * float(share)


def _mean(shares: np.ndarray) -> float | None:
    """Average in percent; None where nothing is defined."""
    known = shares[~np.isnan(shares)]
    return _percent(known.mean()) if len(known) else None
