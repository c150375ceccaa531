"""Scores for many weightings of the images at once: resamples, or swaps of two backbones.

Images come in units (groups, or the images themselves), and all images of a unit have the unit's weight.

Shapes: M images, U units, R weightings, C classes. Weights lie as [U, R], so that one row serves all weightings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from dinov2.eval.predictions import Measurements, Predictions

_AT_ONCE = 4_000_000  # weights of images in one block: 16 MB as int32
Weighted = Mapping[str, np.ndarray]  # percent by name, [R] float64; nan where it is not defined


@dataclass(frozen=True, kw_only=True)
class _Ranking:
    """Where images of one class stand among all, the likeliest first: blocks of equal scores, and pieces between."""

    counts: sparse.csc_array  # [S + B, U], images of each unit: in each of the S pieces; of the class, in B blocks
    start: np.ndarray  # [B] pieces before each block
    end: np.ndarray  # [B] pieces up to its end


class WeightedMetrics:
    """The scores of `dinov2.eval.metrics` under weights.

    A class counts in an average only where it has images of weight above 0.

    Args:
        predictions: of the images.
        units: unit of each image, [M] int64 of 0 .. U-1.
        with_rankings: ROC-AUC and average precision too, which take time proportional to M, C and R.
    """

    def __init__(self, predictions: Predictions, units: np.ndarray, *, with_rankings: bool) -> None:
        self._num_classes = predictions.num_classes
        self._num_units = int(units.max()) + 1
        self._counts = self._counts_of_units(predictions, units)
        self._rankings: dict[int, _Ranking] = {}
        if with_rankings:
            shares = predictions.shares()
            present = np.unique(predictions.targets[predictions.targets >= 0])
            self._rankings = {
                int(number): _rank(shares[:, number], predictions.targets == number, units, num_units=self._num_units)
                for number in present
            }

    def __call__(self, weights: np.ndarray) -> Weighted:
        """Return the metrics, in percent, for weights [U, R] of whole numbers >= 0."""
        weights = weights.astype(np.float64, order="C")  # whole numbers up to 2^53 stay exact
        found = self._from_counts(weights)
        if self._rankings:
            found |= self._from_rankings(weights)
        return {name: 100 * values for name, values in found.items()}

    def _counts_of_units(self, predictions: Predictions, units: np.ndarray) -> sparse.csc_array:
        """Count images of each unit: by class, by predicted class, right ones by class; right among five only."""
        C, targets, predicted = self._num_classes, predictions.targets, predictions.predicted()
        known, right = targets >= 0, predictions.is_right(among=1)
        later = predictions.is_right(among=5) & ~right
        rows = [targets[known], C + predicted, 2 * C + targets[right], np.full(later.sum(), 3 * C)]
        columns = [units[known], units, units[right], units[later]]
        return _count(np.concatenate(rows), np.concatenate(columns), shape=(3 * C + 1, self._num_units))

    def _from_counts(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        sums = self._counts @ weights  # [3 C + 1, R]
        support, predicted, right = sums[:-1].reshape(3, self._num_classes, -1)  # [C, R] each
        num_right, total = right.sum(axis=0), predicted.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            top1 = num_right / total
            recall = right / support  # nan for a class without images
            precision = np.where(support > 0, right / np.maximum(predicted, 1), np.nan)
            f1 = np.where(support > 0, 2 * right / (support + predicted), np.nan)
            return {
                "top1_pct": top1,
                "top5_pct": (num_right + sums[-1]) / total,
                "balanced_accuracy_pct": _mean(recall),
                "precision_macro_pct": _mean(precision),
                "recall_macro_pct": _mean(recall),
                "f1_macro_pct": _mean(f1),
                **dict.fromkeys(("precision_micro_pct", "recall_micro_pct", "f1_micro_pct"), top1),
            }

    def _from_rankings(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        per_class = {number: _rank_metrics(ranking, weights) for number, ranking in self._rankings.items()}
        areas, precisions = (np.stack([found[i] for found in per_class.values()]) for i in range(2))  # [classes, R]
        found = {"roc_auc_macro_pct": _mean(areas), "average_precision_macro_pct": _mean(precisions)}
        if self._num_classes == 2 and 1 in per_class:
            found |= {"roc_auc_pct": per_class[1][0], "average_precision_pct": per_class[1][1]}
        return found


class WeightedMeans:
    """The means of measurements under weights.

    Args:
        measurements: of the images.
        units: unit of each image, [M] int64 of 0 .. U-1.
    """

    def __init__(self, measurements: Measurements, units: np.ndarray) -> None:
        self._names = tuple(measurements.values)
        is_known = [~np.isnan(values) for values in measurements.values.values()]
        sums = [np.bincount(units, weights=np.nan_to_num(values)) for values in measurements.values.values()]
        counts = [np.bincount(units, weights=known) for known in is_known]
        self._sums, self._counts = np.stack(sums), np.stack(counts)  # [names, U] each

    def __call__(self, weights: np.ndarray) -> Weighted:
        """Return the means, in percent, for weights [U, R] of whole numbers >= 0."""
        with np.errstate(invalid="ignore"):
            means = (self._sums @ weights) / (self._counts @ weights)
        return {name: 100 * values for name, values in zip(self._names, means, strict=True)}


def _count(rows: np.ndarray, columns: np.ndarray, *, shape: tuple[int, int]) -> sparse.csc_array:
    """Count how often each pair of row and column occurs; by columns, so that weights are read in their order."""
    return sparse.coo_array((np.ones(len(rows)), (rows, columns)), shape=shape).tocsc()


def _rank(shares: np.ndarray, is_positive: np.ndarray, units: np.ndarray, *, num_units: int) -> _Ranking:
    order = np.argsort(-shares, kind="stable")
    falling, is_positive, units = -shares[order], is_positive[order], units[order]
    blocks, block_of_positive = np.unique(falling[is_positive], return_inverse=True)
    start, end = (np.searchsorted(falling, blocks, side=side) for side in ("left", "right"))  # images before
    cuts = np.unique(np.concatenate([start, end]))
    piece = np.searchsorted(cuts, np.arange(len(falling)), side="right")
    num_pieces = len(cuts) + 1
    counts = _count(
        np.concatenate([piece, num_pieces + block_of_positive]),
        np.concatenate([units, units[is_positive]]),
        shape=(num_pieces + len(blocks), num_units),
    )
    return _Ranking(counts=counts, start=np.searchsorted(cuts, start) + 1, end=np.searchsorted(cuts, end) + 1)


def _rank_metrics(ranking: _Ranking, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ROC-AUC and average precision of one class, 0..1, [R] each; nan without a positive or a negative."""
    sums = ranking.counts @ weights
    pieces, positives = np.split(sums, [len(sums) - len(ranking.start)])
    before = np.concatenate([np.zeros((1, pieces.shape[1])), np.cumsum(pieces, axis=0)])  # of each piece
    positives_up_to = np.cumsum(positives, axis=0)  # [B, R]
    total, num_positives = before[-1], positives_up_to[-1]
    negatives = total - num_positives
    above, up_to = before[ranking.start], before[ranking.end]
    # a positive beats the negatives below its block, and half of those in it
    beaten = negatives - 0.5 * ((above - positives_up_to + positives) + (up_to - positives_up_to))
    with np.errstate(divide="ignore", invalid="ignore"):
        area = (positives * beaten).sum(axis=0) / (num_positives * negatives)
        average_precision = (positives * positives_up_to / np.maximum(up_to, 1)).sum(axis=0) / num_positives
    return area, np.where(negatives > 0, average_precision, np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Average over the classes that are defined, [C, R] to [R]; nan where none is."""
    is_known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(is_known, values, 0).sum(axis=0) / is_known.sum(axis=0)


def blocks_of_weightings(num_weightings: int, *, num_images: int) -> Iterator[int]:
    """Cut weightings into blocks that fit into memory: yields how many are in each."""
    size = max(1, _AT_ONCE // max(num_images, 1))
    for start in range(0, num_weightings, size):
        yield min(size, num_weightings - start)
