"""Measures that compare every image with every other: uniformity, near-duplicates, nearest neighbours within a set.

Cosines are those of `dinov2.eval.neighbours`: exact sums of rounded features, so that neither the size of the tiles nor
the number of ranks shows in a result.

n images, D features, k neighbours, W ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import all_gather_objects, all_gather_varlen, get_rank, get_world_size
from dinov2.eval.neighbours import find_neighbours, to_grid

_TILE = 2048  # images by images; 32 MiB of cosines
_UNIFORMITY_T = 2.0  # of the paper


@dataclass(frozen=True, kw_only=True)
class PairMeasures:
    """What all pairs of different images say."""

    uniformity: float  # log of the mean of exp(-2 d^2) over pairs, -8 to 0: the lower, the more even
    num_duplicates: int  # pairs at least as similar as the threshold
    duplicates: np.ndarray  # [P, 2] int64, rows of the most similar of these, first < second; at most `max_pairs`
    cosines: np.ndarray  # [P] float64, falling


def compare_pairs(
    values: Tensor, *, device: torch.device, duplicate_cosine: float = 2.0, max_pairs: int = 0
) -> PairMeasures:
    """Compare all pairs of images; called by all ranks with the same features, equal results on all.

    Args:
        values: [n, D], n >= 2, any float dtype; left unchanged.
        device: where cosines are computed; takes 0.2 GiB there.
        duplicate_cosine: pairs with at least this cosine are listed; above 1: none.
        max_pairs: most pairs to list; of equally similar ones the first in order.

    Source: uniformity with t = 2, Wang and Isola 2020, arXiv:2005.10242.
    Cost: n^2 / 2 products of D features in float64, shared by the ranks.
    """
    sums, found = {}, [_Found(0, np.empty((0, 2), dtype=np.int64), np.empty(0))]
    for number, (first, second) in enumerate(_tiles(len(values))):
        if number % get_world_size() != get_rank():
            continue
        cosines = _cosines(values[first].to(device), values[second].to(device))
        is_pair = torch.ones_like(cosines, dtype=torch.bool).triu_(diagonal=1 + first.start - second.start)
        # d^2 = 2 - 2 cos
        weights = (cosines - 1).mul_(2 * _UNIFORMITY_T).exp_()
        sums[number] = weights.mul_(is_pair).sum().item()
        if duplicate_cosine <= 1:
            hits = is_pair & (cosines >= duplicate_cosine)
            here = _take_most_similar(hits, cosines, first=first.start, second=second.start, max_pairs=max_pairs)
            found = [_merge([*found, here], max_pairs=max_pairs)]
    of_all = [total for part in all_gather_objects(sums) for total in part.values()]
    pairs = _merge([one for part in all_gather_objects(found) for one in part], max_pairs=max_pairs)
    return PairMeasures(
        uniformity=math.log(math.fsum(of_all) / (len(values) * (len(values) - 1) / 2)),
        num_duplicates=pairs.count,
        duplicates=pairs.rows,
        cosines=pairs.cosines,
    )


def neighbours_within(values: Tensor, *, num_neighbours: int, device: torch.device) -> Tensor:
    """Find the nearest other images of each image; called by all ranks with the same features, equal results on all.

    Args:
        values: [n, D], any float dtype; left unchanged.
        num_neighbours: k, at most n - 1.
        device: where cosines are computed.

    Returns:
        Rows of the neighbours, [n, k] int64, on the CPU, nearest first; of equals the earlier is nearer.
    """
    mine = torch.arange(get_rank(), len(values), get_world_size())
    own = values[mine]
    blocks = find_neighbours(own, own, train_indices=mine, num_neighbours=num_neighbours + 1, device=device)
    places = torch.cat([found for _, _, found in blocks])  # [q, k + 1]
    is_other = places != mine[:, None]
    is_other[is_other.all(dim=1), -1] = False  # k others are as similar as the image is to itself, and come before it
    places = places[is_other].view(len(mine), num_neighbours)
    return all_gather_varlen(places)[all_gather_varlen(mine).argsort()]


def _tiles(num: int) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles that hold the pairs (row, larger row)."""
    for first in range(0, num, _TILE):
        for second in range(first, num, _TILE):
            yield slice(first, min(first + _TILE, num)), slice(second, min(second + _TILE, num))


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """[a, D] and [b, D] to [a, b], float64."""
    (gridded, norms), (others, other_norms) = to_grid(first), to_grid(second)
    return (gridded @ others.T).div_(norms[:, None] * other_norms)


@dataclass(frozen=True)
class _Found:
    """Pairs above the threshold: how many, and the most similar of them."""

    count: int
    rows: np.ndarray  # [P, 2]
    cosines: np.ndarray  # [P], falling


def _take_most_similar(hits: Tensor, cosines: Tensor, *, first: int, second: int, max_pairs: int) -> _Found:
    rows = hits.nonzero()  # in rising order
    found = cosines[hits]
    order = found.sort(descending=True, stable=True).indices[:max_pairs]
    places = rows[order].cpu().numpy() + np.array([first, second])
    return _Found(len(rows), places, found[order].cpu().numpy())


def _merge(parts: list[_Found], *, max_pairs: int) -> _Found:
    rows, cosines = np.concatenate([part.rows for part in parts]), np.concatenate([part.cosines for part in parts])
    order = np.lexsort((rows[:, 1], rows[:, 0], -cosines))[:max_pairs]
    return _Found(sum(part.count for part in parts), rows[order], cosines[order])
