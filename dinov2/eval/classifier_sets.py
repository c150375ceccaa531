"""What trained classifiers are fitted on, chosen by and reported on, so that no reported image chose anything.

    with a test set      fitted on train, chosen on val, reported on test, once
    without              a fifth of the training set is held out to choose by; reported on val

See `dinov2.eval.held_out` for how it is drawn. What is fitted on is put into an order of its own contents; so the
order of the files does not show in the result.

Shapes: n images of a part, D features.
"""

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.held_out import held_out
from dinov2.eval.labels import LabelledSet, match_classes
from dinov2.eval.predictions import Predictions

logger = logging.getLogger(__name__)

METRICS = ("mean_accuracy", "mean_per_class_accuracy")  # what may choose; the parents' names
_ORDERING_FEATURES = 8  # enough to tell images apart


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some labelled images of one set."""

    source: FeatureSet
    rows: np.ndarray  # of the source, [n] int64
    classes: np.ndarray  # of these images, [n] int64, -1 if the training set lacks it

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> Tensor:
        """Class of each image, [n] int64."""
        return torch.from_numpy(self.classes)

    def values(self, pool: str | None = None) -> Tensor:
        """Return the features [n, D], copied, float32; those of a smaller pool, if one is named."""
        source = self.source if pool is None else self.source.select(pool)
        return source.values[torch.from_numpy(self.rows)].float()

    def take(self, kept: np.ndarray) -> "Part":
        """Keep some images, given as a mask or as row numbers of this part."""
        return Part(source=self.source, rows=self.rows[kept], classes=self.classes[kept])

    def in_own_order(self) -> "Part":
        """Put the images into an order that their classes and features alone decide."""
        first = self.source.values[torch.from_numpy(self.rows), :_ORDERING_FEATURES].float().numpy()
        return self.take(np.lexsort([*first.T, self.classes]))


@dataclass(frozen=True, kw_only=True)
class ClassifierSets:
    """The parts; the same on every rank."""

    train: Part  # all labelled training images
    fit: Part  # those that candidates are fitted on
    choose: Part  # images that choose among the candidates
    report: Part
    class_names: tuple[str, ...]  # of classes 0, 1, ...
    has_test: bool  # whether `report` is a test set, and `choose` the validation set

    @property
    def num_classes(self) -> int:
        """Classes of the training set."""
        return len(self.class_names)

    @cached_property
    def description(self) -> str:
        """What served to choose, for tables."""
        if self.has_test:
            return f"{len(self.choose)} images of {self.choose.source.name}"
        return f"{len(self.choose)} of the {len(self.train)} training images, held out"

    def predictions(self, logits: Tensor) -> Predictions:
        """Wrap a classifier's answers for the reported part, [n, classes]."""
        scores = logits.double().softmax(dim=1).numpy()
        return Predictions.for_images(
            self.report.source, targets=self.report.classes, scores=scores, class_names=self.class_names
        )


def make_classifier_sets(
    train: FeatureSet, val: FeatureSet, test: FeatureSet | None, *, has_choice: bool = True, logs_notes: bool = True
) -> ClassifierSets:
    """Divide labelled images into what is fitted on, what chooses and what is reported.

    Args:
        train: the training set.
        val: reported on, or, with a test set, chosen on.
        test: reported on.
        has_choice: False: there is one candidate, so that nothing is held out.
        logs_notes: log what the user should know.

    Raises:
        DatasetError: labels are missing or do not fit each other, or nothing can be held out.
    """
    labelled = [_labels(part) for part in (train, val, *[test] * (test is not None))]
    matched = [match_classes(labelled[0], other) for other in labelled[1:]]
    if logs_notes:
        for note in dict.fromkeys(note for classes in matched for note in classes.notes):
            logger.warning("%s", note)
    names = [labelled[0].describe([label]) for label in labelled[0].labels()]
    whole = _part(train, matched[0].train).in_own_order()
    reported = _part(val if test is None else test, matched[-1].val)
    fit, choose = whole, whole.take(np.zeros(0, dtype=np.int64))
    if test is not None:
        choose = _part(val, matched[0].val)
    elif has_choice:
        is_held_out = held_out(train)[whole.rows]
        fit, choose = whole.take(~is_held_out), whole.take(is_held_out)
    return ClassifierSets(
        train=whole, fit=fit, choose=choose, report=reported, class_names=tuple(names), has_test=test is not None
    )


def join(parts: list[Part]) -> tuple[Tensor, Tensor]:
    """Features [n, D] and classes [n] of all images of some parts whose class the training set has."""
    known = [part.take(part.classes >= 0).in_own_order() for part in parts]
    return torch.cat([part.values() for part in known]), torch.cat([part.targets for part in known])


def predict(logits: Tensor) -> Tensor:
    """Return the likeliest class of each image, [n, C] to [n] int64; none (-2) for logits that are not finite."""
    return logits.argmax(dim=1).masked_fill_(~logits.isfinite().all(dim=1), -2)


def right_pct(predicted: Tensor, targets: Tensor, *, metric: str) -> float:
    """Accuracy in percent: of all images, or the mean over the classes that occur.

    Args:
        predicted: class of each image, as of `predict`, [n].
        targets: right class of each image, -1 for one that counts as wrong, [n].
        metric: one of `METRICS`.
    """
    is_right = (predicted == targets).double()
    if metric == METRICS[1]:
        classes, counts = torch.unique(targets, return_inverse=True)[1], torch.unique(targets, return_counts=True)[1]
        return (
            100
            * (torch.zeros(len(counts), dtype=torch.float64).index_add_(0, classes, is_right) / counts).mean().item()
        )
    return 100 * is_right.mean().item()


def _labels(features: FeatureSet) -> LabelledSet:
    return LabelledSet(name=features.name, targets=features.targets, class_names=features.class_names)


def _part(source: FeatureSet, classes: np.ndarray) -> Part:
    rows = np.flatnonzero(source.targets >= 0)
    return Part(source=source, rows=rows, classes=classes[rows])
