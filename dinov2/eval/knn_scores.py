"""Scores of k-NN from features: accuracies in percent for each k, with all training images or a few of each class."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum
from dinov2.errors import ConfigError
from dinov2.eval.extraction import Features
from dinov2.eval.groups import Groups, GroupVotes
from dinov2.eval.labels import Classes
from dinov2.eval.neighbours import find_neighbours, num_better_classes, vote

logger = logging.getLogger(__name__)

FULL = -1  # in a list of images per class: all of them


@dataclass(frozen=True, kw_only=True)
class KnnScore:
    """Accuracies at one k, in percent of the labelled validation images."""

    k: int
    n_per_class: int  # training images of each class; -1: all
    top1_pct: float
    top5_pct: float  # the right class is among the five with most votes, and has a vote
    mean_per_class_pct: float  # mean over classes of top-1, over the classes that both sets have
    top1_std_pct: float = 0.0  # spread over random choices of the training images
    group_top1_pct: float | None = None  # percent of the groups, see `dinov2.eval.groups`; None without groups


def usable_ks(nb_knn: Sequence[int], *, num_train: int, name: str) -> list[int]:
    """Drop the k that are larger than the training set, with one warning; keeps the order and drops repeats.

    Raises:
        ConfigError: none is left.
    """
    ks = list(dict.fromkeys(nb_knn))
    usable = [k for k in ks if k <= num_train]
    if not usable:
        raise ConfigError(
            f"evaluation.knn.nb_knn={ks}: all are larger than the {num_train} labelled images of {name}; "
            f"use at most {num_train}"
        )
    if len(usable) < len(ks):
        dropped = [k for k in ks if k not in usable]
        logger.warning("k-NN leaves out k=%s: %s has only %d labelled images", dropped, name, num_train)
    return usable


def scores_at(
    train: Features,
    val: Features,
    *,
    classes: Classes,
    groups: Groups,
    ks: Sequence[int],
    temperature: float,
    device: torch.device,
    n_per_class: int = FULL,
    votes_at: int | None = None,
) -> tuple[list[KnnScore], Tensor]:
    """Score with the labelled training images that are given; called by all ranks, equal results on all.

    Args:
        train: features of this rank's training images.
        val: features of this rank's validation images.
        classes: class of every image of both sets, by place in the dataset.
        groups: groups of the validation images.
        ks: numbers of neighbours, at most the labelled training images.
        temperature: of the votes, > 0.
        device: where similarities are computed.
        n_per_class: training images of each class that these are, for the scores.
        votes_at: the k whose votes are wanted as well, one of `ks`; None: of none.

    Returns:
        One score for each k, in the order of `ks`; and the votes [q, C] float64 for this rank's labelled validation
        images, of each image at most 1 in sum.
    """
    rising = sorted(ks)
    counts, of_groups, votes = _count(
        train,
        val,
        classes=classes,
        groups=groups,
        ks=rising,
        temperature=temperature,
        device=device,
        votes_at=votes_at,
    )
    scores = {
        k: _score(of_images, k=k, n_per_class=n_per_class, group_top1_pct=of_group)
        for k, of_images, of_group in zip(rising, counts, of_groups, strict=True)
    }
    return [scores[k] for k in ks], votes


def few_shot_scores(
    train: Features,
    val: Features,
    *,
    classes: Classes,
    groups: Groups,
    nb_knn: Sequence[int],
    n_per_class: int,
    n_tries: int,
    temperature: float,
    device: torch.device,
) -> list[KnnScore]:
    """Score with few training images of each class, chosen at random, as means over several choices.

    The k are those of `nb_knn` and `n_per_class` that are at most `n_per_class`, as in the parents, and at most the
    images chosen.
    """
    num_chosen = len(choose_few(classes.train, n_per_class=n_per_class, seed=0))
    largest = min(n_per_class, num_chosen)
    ks = sorted({k for k in (*nb_knn, largest) if k <= largest})
    settings: dict[str, Any] = {"temperature": temperature, "device": device, "n_per_class": n_per_class}
    tries: list[list[KnnScore]] = []
    for seed in range(n_tries):
        chosen = choose_few(classes.train, n_per_class=n_per_class, seed=seed)
        few = train.take(torch.isin(train.indices, chosen))
        tries.append(scores_at(few, val, classes=classes, groups=groups, ks=ks, **settings)[0])
    return [_mean(scores) for scores in zip(*tries, strict=True)]


def choose_few(classes: np.ndarray, *, n_per_class: int, seed: int) -> Tensor:
    """Choose images of each class at random; fewer where a class has fewer. The choice is the parents' for this seed.

    Args:
        classes: class of each image, below 0 for none.
        n_per_class: images of each class, >= 1.
        seed: of the choice.

    Returns:
        Places of the chosen images.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number in np.unique(classes[classes >= 0]):
        members = torch.from_numpy(np.flatnonzero(classes == number))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:n_per_class]])
    return torch.cat(chosen)


def _count(
    train: Features,
    val: Features,
    *,
    classes: Classes,
    groups: Groups,
    ks: Sequence[int],
    temperature: float,
    device: torch.device,
    votes_at: int | None,
) -> tuple[Tensor, list[float | None], Tensor]:
    """For each k, count validation images, those right at first and those right among five, by class: [3, C + 1].

    The last column is for images whose class the training set lacks. The k rise. Beside the counts, for each k: percent
    of the groups that are right; and the votes of one k.
    """
    train, val = train.take(train.targets >= 0), val.take(val.targets >= 0)
    class_of_train, class_of_val = torch.from_numpy(classes.train), torch.from_numpy(classes.val)
    counts = torch.zeros(len(ks), 3, classes.count + 1, dtype=torch.int64)
    group_votes = GroupVotes(groups, num_ks=len(ks), num_classes=classes.count)
    kept = [torch.empty(0, classes.count, dtype=torch.float64)]
    for rows, similarities, places in find_neighbours(
        val.values, train.values, train_indices=train.indices, num_neighbours=ks[-1], device=device
    ):
        targets = class_of_val[val.indices[rows]]
        column = torch.where(targets < 0, classes.count, targets)
        votes_of = vote(similarities, class_of_train[places], ks=ks, temperature=temperature, num_classes=classes.count)
        for number, (k, votes) in enumerate(votes_of):
            kept += [votes.clone()] * (k == votes_at)
            group_votes.add(votes, images=val.indices[rows], number_of_k=number)
            better = num_better_classes(votes, targets)
            right = (torch.ones_like(better), (better < 1) & (targets >= 0), (better < 5) & (targets >= 0))
            for row, weight in enumerate(right):
                counts[number, row].scatter_add_(0, column, weight.long())
    return all_reduce_sum(counts), group_votes.top1_pct(), torch.cat(kept)


def _score(counts: Tensor, *, k: int, n_per_class: int, group_top1_pct: float | None) -> KnnScore:
    images, top1, top5 = counts.double()
    known = images[:-1] > 0
    return KnnScore(
        k=k,
        n_per_class=n_per_class,
        top1_pct=100 * (top1.sum() / images.sum()).item(),
        top5_pct=100 * (top5.sum() / images.sum()).item(),
        mean_per_class_pct=100 * (top1[:-1][known] / images[:-1][known]).mean().item(),
        group_top1_pct=group_top1_pct,
    )


def _mean(scores: Sequence[KnnScore]) -> KnnScore:
    """Average the tries of one k."""
    top1 = [score.top1_pct for score in scores]
    of_groups = [score.group_top1_pct for score in scores if score.group_top1_pct is not None]
    return KnnScore(
        k=scores[0].k,
        n_per_class=scores[0].n_per_class,
        top1_pct=float(np.mean(top1)),
        top5_pct=float(np.mean([score.top5_pct for score in scores])),
        mean_per_class_pct=float(np.mean([score.mean_per_class_pct for score in scores])),
        top1_std_pct=float(np.std(top1)),
        group_top1_pct=float(np.mean(of_groups)) if of_groups else None,
    )
