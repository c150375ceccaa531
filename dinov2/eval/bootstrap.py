"""How far a score could be off by chance: 95 % intervals from resampled groups of images.

Images of one group (a part, a slide, a plate) are right or wrong together, so groups are drawn with replacement, as
many as there are, and all images of a drawn group count; images without groups are drawn one by one. The interval
spans the middle 95 % of the scores of the resamples. It tells of other groups of the same kind, classified by the same
training images, and is too narrow with fewer than about 20 groups.

The draws depend on the seed and on the order of the images' paths (places, without paths), not on the order of files,
on labels or on the number of processes.

Source: percentile interval of Efron and Tibshirani 1993, chapter 13; resampling of whole groups as in Field and Welsh
2007, doi:10.1111/j.1467-9868.2007.00593.x.

Shapes: M images, U units (groups, or images without groups), R resamples.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from dinov2.eval.predictions import Measurements, Predictions
from dinov2.eval.weighted_metrics import Weighted, WeightedMeans, WeightedMetrics, blocks_of_weightings

Interval = tuple[float, float]  # percent

_MOST_RANKED = 5e8  # images x classes x resamples: about five seconds


def intervals(found: Predictions | Measurements, *, num_resamples: int, seed: int = 0) -> Mapping[str, Interval]:
    """Return the 95 % interval of every score that has one.

    Args:
        found: predictions for images, or for groups as a whole; or measurements.
        num_resamples: R, at least 100.
        seed: of the draws.

    Returns:
        (low, high) in percent, by the name of the score; empty with fewer than two units.
    """
    units = resampling_units(found)
    num_units = int(units.max()) + 1
    if num_units < 2:
        return {}
    scores = weighted_scores(found, units, with_rankings=can_rank(found, num_resamples=num_resamples))
    draws = resamples(num_units, num_images=len(units), num_resamples=num_resamples, seed=seed)
    return {name: interval(values) for name, values in joined(scores, draws).items() if not np.isnan(values).all()}


def weighted_scores(
    found: Predictions | Measurements, units: np.ndarray, *, with_rankings: bool
) -> Callable[[np.ndarray], Weighted]:
    """Return what computes the scores under weights of the units."""
    if isinstance(found, Measurements):
        return WeightedMeans(found, units)
    return WeightedMetrics(found, units, with_rankings=with_rankings)


def interval(values: np.ndarray) -> Interval:
    """Return the middle 95 % of values of resamples [R]; those that are not defined are left out."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def can_rank(found: Predictions | Measurements, *, num_resamples: int) -> bool:
    """Tell whether ROC-AUC and average precision of all resamples take seconds, not minutes."""
    return isinstance(found, Predictions) and found.scores.size * num_resamples <= _MOST_RANKED


def resampling_units(found: Predictions | Measurements) -> np.ndarray:
    """Number the units 0, 1, ... by the first path (place, without paths) in each; the unit of each image, [M]."""
    keys = found.places if found.paths is None else found.paths
    order = np.lexsort([found.places, np.unique(keys, return_inverse=True)[1]])
    groups = np.arange(len(order)) if found.groups is None else found.groups[order]
    _, first, numbers = np.unique(groups, return_index=True, return_inverse=True)
    units = np.empty(len(order), dtype=np.int64)
    units[order] = first.argsort().argsort()[numbers]
    return units


def resamples(num_units: int, *, num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Draw units with replacement: how often each is in each resample, blocks [U, r] int32 with R columns in all."""
    generator = np.random.default_rng(seed)
    for size in blocks_of_weightings(num_resamples, num_images=max(num_images, num_units)):
        drawn = generator.integers(num_units, size=(size, num_units))
        places = drawn * size + np.arange(size)[:, None]
        counts = np.bincount(places.ravel(), minlength=num_units * size)
        yield counts.reshape(num_units, size).astype(np.int32)


def joined(metrics: Callable[[np.ndarray], Weighted], blocks: Iterator[np.ndarray]) -> Weighted:
    """Compute metrics under blocks of weights and join them: [R] by name."""
    parts = [metrics(weights) for weights in blocks]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
