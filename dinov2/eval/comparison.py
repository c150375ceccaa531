"""Did it get better? The difference between two backbones on the same images, with interval and p-value.

The interval is that of the paired bootstrap: each resample of groups (`dinov2.eval.bootstrap`) scores both backbones,
and the differences span it. The p-value answers another question: how often would so large a difference come about if
the two were equally good? Then it would not matter whose answers are whose, so the answers of each group are swapped at
random between the two, and the p-value is the share of swaps whose difference is at least as large, either way. This
test needs no assumption on how a score is made up (accuracy, F1, ROC-AUC), keeps its level with few groups, and for
accuracy is the sign test on the groups' differences. All swaps are tried where there are few enough.

Source: approximate randomisation, Noreen 1989 and Yeh 2000, arXiv:cs/0008005; p-value of drawn swaps as in Phipson and
Smyth 2010, arXiv:1603.05766. Paired bootstrap: Efron and Tibshirani 1993.

Shapes: M images, U units (groups, or images without groups), R resamples or swaps.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from dinov2.eval.bootstrap import can_rank, interval, joined, resamples, resampling_units, weighted_scores
from dinov2.eval.predictions import Measurements, Predictions
from dinov2.eval.weighted_metrics import Weighted, blocks_of_weightings

Found = TypeVar("Found", Predictions, Measurements)

_ROUNDING = 1e-9  # percent: equal differences may differ in their last digits


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One score of two backbones on the same images, in percent."""

    name: str
    value_pct: float
    reference_pct: float
    difference_pct: float  # value - reference
    low_pct: float | None  # 95 % interval of the difference; None with one group
    high_pct: float | None
    p_value: float  # two-sided

    def sentence(self) -> str:
        """Say it in a line: `top1_pct 83.1 vs 81.0: +2.1, 95 % interval 0.6 to 3.6, p=0.006`."""
        values = f"{self.value_pct:.1f} vs {self.reference_pct:.1f}: {self.difference_pct:+.1f}"
        span = "no interval" if self.low_pct is None else f"95 % interval {self.low_pct:.1f} to {self.high_pct:.1f}"
        p_value = f"p={self.p_value:.3f}" if self.p_value >= 0.001 else "p<0.001"
        return f"{self.name} {values}, {span}, {p_value}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All differences between two backbones, and what they were measured on."""

    differences: Mapping[str, Difference]  # by the name of the score
    num_images: int  # that both have
    num_units: int  # groups, or images without groups
    num_left_out: int  # images that only one of the two has


def compare(value: Found, reference: Found, *, num_resamples: int, seed: int = 0) -> Comparison:
    """Compare two backbones on the images that both have.

    Args:
        value: what was found with one backbone: predictions for images or groups, or measurements.
        reference: the same with the other backbone.
        num_resamples: R, at least 100.
        seed: of resamples and swaps.

    Raises:
        ValueError: they have no image in common, or not the same right classes.
    """
    value, reference, num_left_out = pair(value, reference)
    units = resampling_units(value)
    num_units = int(units.max()) + 1
    both_units = np.concatenate([units, units + num_units])
    scores, of_reference, of_both = (
        weighted_scores(found, numbers, with_rankings=can_rank(value, num_resamples=num_resamples))
        for found, numbers in ((value, units), (reference, units), (_stack(value, reference), both_units))
    )

    def swapped_difference(swaps: np.ndarray) -> Weighted:
        keeps = 1 - swaps
        return _subtract(of_both(np.concatenate([keeps, swaps])), of_both(np.concatenate([swaps, keeps])))

    draws = resamples(num_units, num_images=len(units), num_resamples=num_resamples, seed=seed)
    spread = joined(lambda weights: _subtract(scores(weights), of_reference(weights)), draws)
    by_chance = joined(
        swapped_difference, _swaps(num_units, num_images=2 * len(units), num_swaps=num_resamples, seed=seed)
    )
    everything = np.ones((num_units, 1), dtype=np.int32)
    values, of_other = scores(everything), of_reference(everything)
    differences = {
        name: _difference(
            name,
            values=(float(values[name][0]), float(of_other[name][0])),
            spread=spread[name] if num_units > 1 else None,
            by_chance=by_chance[name],
            is_exact=_has_few_swaps(num_units, num_resamples),
        )
        for name in values
        if not np.isnan(values[name] - of_other[name]).any()
    }
    return Comparison(differences=differences, num_images=len(value), num_units=num_units, num_left_out=num_left_out)


def _subtract(values: Weighted, others: Weighted) -> Weighted:
    return {name: values[name] - others[name] for name in values}


def _difference(
    name: str,
    *,
    values: tuple[float, float],
    spread: np.ndarray | None,
    by_chance: np.ndarray,
    is_exact: bool,
) -> Difference:
    """Put one difference together from those of resamples [R] and of swaps [R]."""
    value, reference = values
    low, high = (None, None) if spread is None else interval(spread)
    is_as_large = np.abs(by_chance) >= abs(value - reference) - _ROUNDING
    # of drawn swaps, the one that was seen is one more
    p_value = is_as_large.mean() if is_exact else (1 + is_as_large.sum()) / (1 + len(is_as_large))
    return Difference(
        name=name,
        value_pct=value,
        reference_pct=reference,
        difference_pct=value - reference,
        low_pct=low,
        high_pct=high,
        p_value=float(p_value),
    )


def pair(value: Found, reference: Found) -> tuple[Found, Found, int]:
    """Keep the images that both have, in the order of their places, and count those that only one has.

    Raises:
        ValueError: as `compare` does.
    """
    common, rows, other_rows = np.intersect1d(value.places, reference.places, assume_unique=True, return_indices=True)
    if not len(common):
        raise ValueError(f"{value.name} and {reference.name} have no image in common")
    num_left_out = len(value) + len(reference) - 2 * len(common)
    value, reference = value.take(rows), reference.take(other_rows)
    if isinstance(value, Predictions):
        if value.class_names != reference.class_names or (value.targets != reference.targets).any():
            raise ValueError(f"{value.name}: the two backbones were scored against other classes")
        return value, reference, num_left_out
    is_known = {name: ~np.isnan(value.values[name] + reference.values[name]) for name in value.values}
    return _only(value, is_known), _only(reference, is_known), num_left_out


def _only(measurements: Measurements, is_known: Mapping[str, np.ndarray]) -> Measurements:
    """Let an image count only where it counts for both."""
    values = {name: np.where(is_known[name], measurements.values[name], np.nan) for name in is_known}
    return replace(measurements, values=values)


def _stack(value: Found, reference: Found) -> Found:
    """Put the images of one below those of the other."""
    if isinstance(value, Predictions):
        fields = ("targets", "scores", "places")
        stacked = {field: np.concatenate([getattr(value, field), getattr(reference, field)]) for field in fields}
        return replace(value, **stacked, groups=None, paths=None, columns={})
    values = {name: np.concatenate([value.values[name], reference.values[name]]) for name in value.values}
    places = np.concatenate([value.places, reference.places])
    return replace(value, values=values, places=places, groups=None, paths=None)


def _has_few_swaps(num_units: int, num_swaps: int) -> bool:
    """Tell whether all swaps of units are not more than those that would be drawn."""
    return num_units < 40 and 2**num_units <= num_swaps


def _swaps(num_units: int, *, num_images: int, num_swaps: int, seed: int) -> Iterator[np.ndarray]:
    """Choose units whose answers are swapped: 0 or 1, blocks [U, r] int32; all choices where they are few."""
    if _has_few_swaps(num_units, num_swaps):
        yield (np.arange(2**num_units)[None] >> np.arange(num_units)[:, None] & 1).astype(np.int32)
        return
    generator = np.random.default_rng([seed, 1])  # not the stream of the resamples
    for size in blocks_of_weightings(num_swaps, num_images=max(num_images, num_units)):
        yield generator.integers(2, size=(size, num_units), dtype=np.int32).T
