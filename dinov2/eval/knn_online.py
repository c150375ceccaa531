"""k-NN accuracy of a backbone in training, on datasets that stay open from one evaluation to the next."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.configs import Config
from dinov2.distributed import all_gather_varlen
from dinov2.eval.build import NamedDataset, build_datasets, extraction_settings
from dinov2.eval.extraction import ExtractionSettings, Features, extract_local_features
from dinov2.eval.feature_set import NO_LABEL
from dinov2.eval.groups import Groups, match_groups
from dinov2.eval.knn_evaluation import KnnResult, result_of
from dinov2.eval.knn_scores import scores_at, usable_ks
from dinov2.eval.labels import Classes, LabelledSet, match_classes
from dinov2.eval.neighbours import num_better_classes
from dinov2.eval.predictions import Measurements

logger = logging.getLogger(__name__)

SCORE_NAME = "knn_top1_pct"  # at the first k: the score by which evaluations of a run are compared


class OnlineKnn:
    """Evaluate backbones by k-NN; each rank keeps the features of its share of the images.

    Labels and numbers of neighbours are checked at construction as far as the datasets know their labels; what the user
    should know is then logged once.

    Args:
        train: labelled images that vote, as tensors of one size.
        val: labelled images that are classified; with a column "group" in `metadata()`, also group by group, see
            `dinov2.eval.groups`.
        nb_knn: numbers of neighbours; those larger than the training set are left out with a warning.
        temperature: of the votes, > 0.
        extraction: how features are computed; similarities are, too, on its device.

    Raises:
        DatasetError: labels are missing or do not fit each other.
        ConfigError: every k is larger than the training set.
    """

    def __init__(
        self,
        train: NamedDataset,
        val: NamedDataset,
        *,
        nb_knn: Sequence[int],
        temperature: float,
        extraction: ExtractionSettings,
    ) -> None:
        self.train, self.val = train, val
        self._scoring: dict[str, Any] = {"temperature": temperature, "device": extraction.device}
        self._extraction = extraction
        self._val_groups = _group_numbers(val)
        self._has_noted = False
        num_train = len(train.dataset)
        known_train, known_val = _known_labels(train), _known_labels(val)
        if known_train is not None and known_val is not None:
            self._match(known_train, known_val)
            num_train = known_train.count()
        self.nb_knn = usable_ks(nb_knn, num_train=num_train, name=train.name)

    @classmethod
    def from_config(cls, cfg: Config, *, device: torch.device) -> "OnlineKnn":
        """Open the datasets of `evaluation.knn`.

        Raises:
            ConfigError, DatasetError: a dataset string or its labels are wrong.
        """
        train, val = build_datasets(cfg)
        return cls(
            train,
            val,
            nb_knn=cfg.evaluation.knn.nb_knn,
            temperature=cfg.evaluation.knn.temperature,
            extraction=extraction_settings(cfg, device=device),
        )

    def extract(self, backbone: nn.Module) -> tuple[Features, Features]:
        """Compute this rank's features of both sets; called by all ranks. Global random states stay as they are.

        Args:
            backbone: images [B, C, height, width] to features [B, D]; left in the mode it is in.

        Raises:
            DatasetError: an image cannot be read.
            CheckpointError: features are not finite.
        """
        train, val = (
            extract_local_features(backbone, named.dataset, **vars(self._extraction))
            for named in (self.train, self.val)
        )
        return train, val

    def score(self, train: Features, val: Features) -> tuple[KnnResult, Measurements]:
        """Score extracted features; called by all ranks, equal results on all.

        Returns:
            The scores; and for each labelled validation image whether it is right at the first k.

        Raises:
            DatasetError: labels are missing or do not fit each other.
            ConfigError: every k is larger than the training set.
        """
        train_labels, val_labels = _gather_labels(self.train, train), _gather_labels(self.val, val)
        classes, groups = self._match(train_labels, val_labels)
        ks = usable_ks(self.nb_knn, num_train=train_labels.count(), name=self.train.name)
        scores, votes = scores_at(train, val, ks=ks, classes=classes, groups=groups, votes_at=ks[0], **self._scoring)
        result = result_of(train, val, scores=scores, classes=classes, groups=groups)
        return result, self._right_images(val, votes, classes=classes)

    def _right_images(self, val: Features, votes: Tensor, *, classes: Classes) -> Measurements:
        """Say of the labelled images of all ranks whether their class has most votes, in the dataset's order."""
        places = val.indices[val.targets >= 0]
        targets = torch.from_numpy(classes.val)[places]
        is_right = (num_better_classes(votes, targets) < 1) & (targets >= 0)
        places, is_right = all_gather_varlen(places), all_gather_varlen(is_right.double())
        order = places.argsort()
        rows = places[order].numpy()
        groups = None if self._val_groups is None else self._val_groups[rows]
        return Measurements(
            name=self.val.name, values={SCORE_NAME: is_right[order].numpy()}, places=rows, groups=groups
        )

    def _match(self, train: LabelledSet, val: LabelledSet) -> tuple[Classes, Groups]:
        """Bring the labels to one numbering; what the user should know of them is logged the first time."""
        classes = match_classes(train, val)
        groups = match_groups(val, classes=classes.val, groups=self._val_groups)
        if not self._has_noted:
            for note in (*classes.notes, *groups.notes):
                logger.warning("%s", note)
        self._has_noted = True
        return classes, groups


def _gather_labels(named: NamedDataset, features: Features) -> LabelledSet:
    """Gather the labels of all images, by place; -1 for images left out."""
    targets = np.full(len(named.dataset), NO_LABEL, dtype=np.int64)
    targets[all_gather_varlen(features.indices).numpy()] = all_gather_varlen(features.targets).numpy()
    return LabelledSet(name=named.name, targets=targets, class_names=_class_names(named))


def _known_labels(named: NamedDataset) -> LabelledSet | None:
    """Ask the dataset for its labels; None if it is a class of the user's own that cannot tell without its images."""
    if not hasattr(named.dataset, "get_targets"):
        return None
    targets = named.dataset.get_targets()
    if targets is None:
        targets = np.empty(0, dtype=np.int64)
    return LabelledSet(name=named.name, targets=np.asarray(targets), class_names=_class_names(named))


def _group_numbers(named: NamedDataset) -> np.ndarray | None:
    """Group of each image, as any numbers; None without a column of groups."""
    columns = named.dataset.metadata() if hasattr(named.dataset, "metadata") else {}
    if "group" not in columns:
        return None
    # numbers where there are some: parts of a mixture may have groups of one name
    groups = named.dataset.groups() if hasattr(named.dataset, "groups") else columns["group"]
    return np.unique(np.asarray(groups), return_inverse=True)[1]


def _class_names(named: NamedDataset) -> Sequence[str]:
    return getattr(named.dataset, "class_names", None) or ()
