"""Groups of validation images that are classified together: shots of one part, tiles of one slide, fields of one plate.

The class of a group is the one with the largest mean of its images' votes, each image's votes scaled to sum to 1; of
equal means the first class wins. Votes are rounded to multiples of 2^-40 and added as integers, so that neither the
order of the images nor the number of ranks shows in the result.

An image that is alone in its group counts as a group. Images without a label are left out. A group whose images have
different labels has no right answer, as a slide with tumour and normal tiles, and is left out with a warning.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum
from dinov2.eval.labels import LabelledSet
from dinov2.eval.neighbours import num_better_classes

_STEPS = 2.0**40  # between no vote and all votes: 2^22 images of a group add up in 63 bits


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups 0, 1, ... of a validation set that are scored; none, if there is none of several images."""

    of_images: np.ndarray  # group of each image, [m] int64, -1 for an image that is left out
    classes: np.ndarray  # class of each group, [groups] int64, -1 if the training set lacks it
    notes: tuple[str, ...] = ()  # what the user should know, one sentence each

    @property
    def count(self) -> int:
        """Number of groups that are scored."""
        return len(self.classes)


def match_groups(val: LabelledSet, *, classes: np.ndarray, groups: np.ndarray | None) -> Groups:
    """Choose the groups that can be scored: those whose images have one label.

    Args:
        val: labels of the validation images.
        classes: class of each of them, [m], -1 if the training set lacks it.
        groups: any number for the group of each of them, [m]; None if the dataset knows no groups.
    """
    of_images = np.full(len(val.targets), -1, dtype=np.int64)
    rows = np.flatnonzero(val.targets >= 0)
    if groups is None or not len(rows):
        return Groups(of_images=of_images, classes=of_images[:0])
    _, first, numbers, sizes = np.unique(groups[rows], return_index=True, return_inverse=True, return_counts=True)
    is_mixed = np.zeros(len(sizes), dtype=bool)
    is_mixed[numbers[val.targets[rows] != val.targets[rows][first][numbers]]] = True
    is_scored = ~is_mixed & bool((sizes[~is_mixed] > 1).any())
    new_numbers = np.where(is_scored, is_scored.cumsum() - 1, -1)
    of_images[rows] = new_numbers[numbers]
    notes = [
        f"{val.name}: {is_mixed.sum()} of {len(sizes)} groups have images of different classes; they are left out of "
        f"the scores of groups{'' if is_scored.any() else ', and so there are none'}"
    ] * bool(is_mixed.any())
    return Groups(of_images=of_images, classes=classes[rows][first][is_scored], notes=tuple(notes))


class GroupVotes:
    """Sums of the votes of the images of each group, for several k.

    Takes 8 bytes for each k, group and class.

    Args:
        groups: those of the validation set.
        num_ks: how many k there are.
        num_classes: C.
    """

    def __init__(self, groups: Groups, *, num_ks: int, num_classes: int) -> None:
        self._of_images = torch.from_numpy(groups.of_images)
        self._classes = torch.from_numpy(groups.classes)
        self._sums = torch.zeros(num_ks, groups.count, num_classes, dtype=torch.int64)

    def add(self, votes: Tensor, *, images: Tensor, number_of_k: int) -> None:
        """Add the votes [Q, C] for some of this rank's images, given by place in the dataset [Q]."""
        groups = self._of_images[images]
        votes, groups = votes[groups >= 0], groups[groups >= 0]
        shares = votes.div(votes.sum(dim=1, keepdim=True)).mul_(_STEPS).round_().long()
        self._sums[number_of_k].index_add_(0, groups, shares)

    def top1_pct(self) -> list[float | None]:
        """Return the percentage of groups of all ranks that are right, for each k; None without groups."""
        if not len(self._classes):
            return [None] * len(self._sums)
        is_right = [num_better_classes(sums, self._classes) < 1 for sums in all_reduce_sum(self._sums)]
        return [100 * right.double().mean().item() for right in is_right]
