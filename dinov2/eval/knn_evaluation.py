"""k-NN accuracy of backbones on one pair of datasets, which stay open from one evaluation to the next."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from dinov2.distributed import all_gather_varlen
from dinov2.eval.build import NamedDataset
from dinov2.eval.extraction import NO_LABEL, Features, extract_local_features
from dinov2.eval.groups import Groups, match_groups
from dinov2.eval.knn_scores import FULL, KnnScore, few_shot_scores, scores_at, usable_ks
from dinov2.eval.labels import Classes, LabelledSet, match_classes

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


class KnnEvaluation:
    """Evaluate backbones by k-NN.

    Labels and numbers of neighbours are checked at construction as far as the datasets know their labels; what the user
    should know is then logged once.

    Args:
        train: labelled images that vote, as tensors of one size.
        val: labelled images that are classified; with a column "group" in `metadata()`, also group by group, see
            `dinov2.eval.groups`.
        nb_knn: numbers of neighbours; those larger than the training set are left out with a warning.
        temperature: of the votes, > 0.
        batch_size: images of one rank in one forward pass.
        num_workers: loader processes of one rank.
        device: where features and similarities are computed.
        dtype: of the forward pass.
        on_bad_image: error or skip, see `extract_local_features`.

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
        batch_size: int,
        num_workers: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        self.train, self.val = train, val
        self._scoring: dict[str, Any] = {"temperature": temperature, "device": device}
        self._extraction: dict[str, Any] = {
            "batch_size": batch_size,
            "num_workers": num_workers,
            "device": device,
            "dtype": dtype,
            "on_bad_image": on_bad_image,
        }
        self._val_groups = _group_numbers(val)
        self._has_noted = False
        num_train = len(train.dataset)
        known_train, known_val = _known_labels(train), _known_labels(val)
        if known_train is not None and known_val is not None:
            self._match(known_train, known_val)
            num_train = known_train.count()
        self.nb_knn = usable_ks(nb_knn, num_train=num_train, name=train.name)

    def __call__(
        self,
        model: nn.Module,
        *,
        n_per_class_list: Sequence[int] = (FULL,),
        n_tries: int = 1,
        show_progress: bool = False,
    ) -> KnnResult:
        """Evaluate one backbone; called by all ranks, equal results on all. Global random states stay as they are.

        Args:
            model: images [B, C, height, width] to features [B, D]; left in the mode it is in.
            n_per_class_list: training images used of each class; -1 for all of them.
            n_tries: random choices to average over, where not all are used.
            show_progress: on the console.

        Raises:
            DatasetError: an image cannot be read.
            CheckpointError: features are not finite.
        """
        train, train_labels = self._extract(model, self.train, show_progress=show_progress)
        val, val_labels = self._extract(model, self.val, show_progress=show_progress)
        classes, groups = self._match(train_labels, val_labels)
        settings = self._scoring | {"classes": classes, "groups": groups}
        scores: list[KnnScore] = []
        for n_per_class in n_per_class_list:
            if n_per_class == FULL:
                ks = usable_ks(self.nb_knn, num_train=train_labels.count(), name=self.train.name)
                scores += scores_at(train, val, ks=ks, **settings)
            else:
                settings_of_few = settings | {"n_per_class": n_per_class, "n_tries": n_tries}
                scores += few_shot_scores(train, val, nb_knn=self.nb_knn, **settings_of_few)
        return KnnResult(
            scores=tuple(scores),
            n_train=train_labels.count(),
            n_val=val_labels.count(),
            n_classes=classes.count,
            n_features=train.values.shape[1],
            n_val_groups=groups.count,
        )

    def _extract(self, model: nn.Module, named: NamedDataset, *, show_progress: bool) -> tuple[Features, LabelledSet]:
        """Compute this rank's features and gather the labels of all images, by place; -1 for images left out."""
        description = f"features of {named.name}" if show_progress else None
        features = extract_local_features(model, named.dataset, description=description, **self._extraction)
        targets = np.full(len(named.dataset), NO_LABEL, dtype=np.int64)
        targets[all_gather_varlen(features.indices).numpy()] = all_gather_varlen(features.targets).numpy()
        return features, LabelledSet(name=named.name, targets=targets, class_names=_class_names(named))

    def _match(self, train: LabelledSet, val: LabelledSet) -> tuple[Classes, Groups]:
        """Bring the labels to one numbering; what the user should know of them is logged the first time."""
        classes = match_classes(train, val)
        groups = match_groups(val, classes=classes.val, groups=self._val_groups)
        if not self._has_noted:
            for note in (*classes.notes, *groups.notes):
                logger.warning("%s", note)
        self._has_noted = True
        return classes, groups


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
