"""k-NN accuracy from the features of a training and a validation set."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import all_gather_varlen, all_reduce_sum, get_rank, get_world_size
from dinov2.eval.extraction import Features
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.groups import Groups, match_groups
from dinov2.eval.knn_scores import FULL, KnnScore, few_shot_scores, scores_at, usable_ks
from dinov2.eval.labels import Classes, LabelledSet, match_classes
from dinov2.eval.predictions import Predictions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KnnResult:
    """Scores of one backbone and what they were measured on."""

    scores: tuple[KnnScore, ...]
    n_train: int  # labelled images
    n_val: int
    n_classes: int  # of the training set
    n_features: int
    n_val_groups: int = 0  # that are scored

    def named_scores(self) -> dict[str, float]:
        """Return the accuracies with all training images: `knn_*` at the first k, `knn10_*` at 10, and so on.

        Those of groups, `knn_group_top1_pct` and so on, are there only if groups are scored.
        """
        full = [score for score in self.scores if score.n_per_class == FULL]
        named = {}
        for prefix, score in [("knn", score) for score in full[:1]] + [(f"knn{score.k}", score) for score in full]:
            named[f"{prefix}_top1_pct"] = score.top1_pct
            named[f"{prefix}_top5_pct"] = score.top5_pct
            named[f"{prefix}_mean_per_class_pct"] = score.mean_per_class_pct
            if score.group_top1_pct is not None:
                named[f"{prefix}_group_top1_pct"] = score.group_top1_pct
        return named


def evaluate_sets(
    train: FeatureSet,
    val: FeatureSet,
    *,
    nb_knn: Sequence[int],
    temperature: float,
    device: torch.device,
    n_per_class_list: Sequence[int] = (FULL,),
    n_tries: int = 1,
    logs_notes: bool = True,
) -> tuple[KnnResult, Predictions | None]:
    """Classify the labelled images of one set by those of another; called by all ranks, equal results on all.

    Args:
        train: images that vote.
        val: images that are classified; with groups, also group by group, see `dinov2.eval.groups`.
        nb_knn: numbers of neighbours; those larger than the training set are left out with a warning.
        temperature: of the votes, > 0.
        device: where similarities are computed.
        n_per_class_list: training images used of each class; -1 for all of them.
        n_tries: random choices to average over, where not all are used.
        logs_notes: warn of images and groups that are left out.

    Returns:
        The scores; and the votes for each labelled validation image at the first k, None unless the list holds -1.

    Raises:
        DatasetError: labels are missing or do not fit each other.
        ConfigError: every k is larger than the training set.
    """
    train_labels, val_labels = (
        LabelledSet(name=one.name, targets=one.targets, class_names=one.class_names) for one in (train, val)
    )
    classes = match_classes(train_labels, val_labels)
    groups = match_groups(val_labels, classes=classes.val, groups=val.group_numbers())
    if logs_notes:
        for note in (*classes.notes, *groups.notes):
            logger.warning("%s", note)
    settings: dict[str, Any] = {"classes": classes, "groups": groups, "temperature": temperature, "device": device}
    shares = (_share_of_rank(train), _share_of_rank(val))
    scores: list[KnnScore] = []
    predictions = None
    for n_per_class in n_per_class_list:
        if n_per_class == FULL:
            ks = usable_ks(nb_knn, num_train=train_labels.count(), name=train.name)
            full, votes = scores_at(*shares, ks=ks, votes_at=ks[0], **settings)
            scores += full
            predictions = Predictions.for_images(
                val,
                targets=classes.val[val.targets >= 0],
                scores=_in_order(shares[1], votes),
                class_names=[train_labels.describe([label]) for label in train_labels.labels()],
            )
        else:
            few = {"n_per_class": n_per_class, "n_tries": n_tries}
            scores += few_shot_scores(*shares, nb_knn=nb_knn, **few, **settings)
    return result_of(*shares, scores=scores, classes=classes, groups=groups), predictions


def result_of(
    train: Features, val: Features, *, scores: Sequence[KnnScore], classes: Classes, groups: Groups
) -> KnnResult:
    """Put scores and the sizes of the sets together; called by all ranks with their shares of the features."""
    counts = all_reduce_sum(torch.tensor([(part.targets >= 0).sum() for part in (train, val)]))
    return KnnResult(
        scores=tuple(scores),
        n_train=int(counts[0]),
        n_val=int(counts[1]),
        n_classes=classes.count,
        n_features=train.values.shape[1],
        n_val_groups=groups.count,
    )


def _share_of_rank(features: FeatureSet) -> Features:
    """Every W-th image, numbered by its row."""
    rows = torch.arange(get_rank(), len(features), get_world_size())
    return Features(
        values=features.values[rows].float(), targets=torch.from_numpy(features.targets)[rows], indices=rows
    )


def _in_order(val: Features, votes: Tensor) -> np.ndarray:
    """Gather the votes for the labelled images of all ranks in the order of the set, [M, C]."""
    rows = all_gather_varlen(val.indices[val.targets >= 0])
    return all_gather_varlen(votes)[rows.argsort()].numpy()
