"""Turn what an evaluation found into scores with intervals, and two of them into differences; and lay both out.

A part is what was found under one prefix of names: the predictions for images (no prefix), for groups as a whole
(`group_`), further predictions of a program (`nscb_`), measurements.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dinov2.eval.bootstrap import Interval, can_rank, intervals
from dinov2.eval.comparison import Comparison, compare
from dinov2.eval.metrics import GROUP, HEADLINES, Metrics, classification_metrics
from dinov2.eval.predictions import Measurements, Predictions

FEW_UNITS = 20  # below, intervals are too narrow
_ON_SCREEN = (*HEADLINES[:1], "top5_pct", *HEADLINES[1:], "average_precision_macro_pct")


class Part(NamedTuple):
    """What was found under one prefix."""

    prefix: str
    found: Predictions | Measurements
    is_of_groups: bool = False  # groups as a whole, beside their images


@dataclass(frozen=True, kw_only=True)
class ScoredPart:
    """Scores of one part, in percent, by name without the prefix."""

    prefix: str
    found: Predictions | Measurements
    is_of_groups: bool
    scores: Mapping[str, float | None]
    intervals: Mapping[str, Interval]
    metrics: Metrics | None = None  # None of measurements
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def num_units(self) -> int:
        """Number of groups, or of rows that stand alone."""
        return len(self.found) if self.found.groups is None else len(np.unique(self.found.groups))

    @property
    def units(self) -> str:
        """What is drawn for the intervals."""
        return self.found.rows if self.found.groups is None else "groups"

    def shown(self) -> Sequence[str]:
        """Names of the scores for the screen."""
        if self.metrics is None:
            return tuple(self.scores)
        names = [name for name in _ON_SCREEN if self.scores.get(name) is not None]
        names = names if not self.prefix else names[:1]
        return [name for name in names if name != "top5_pct" or self.found.num_classes > 5]


def parts_of(
    predictions: Predictions | None, further: Mapping[str, Predictions], measurements: Measurements | None
) -> list[Part]:
    """List the parts of an outcome; predictions bring those of their groups along."""
    parts: list[Part] = []
    named = {"": predictions} | {f"{prefix}_": found for prefix, found in further.items()}
    for prefix, found in named.items():
        if found is None:
            continue
        parts.append(Part(prefix, found))
        groups = found.by_group()
        if groups is not None:
            parts.append(Part(prefix + GROUP, groups, is_of_groups=True))
    return parts if measurements is None else [*parts, Part("", measurements)]


def score_part(part: Part, *, num_resamples: int) -> ScoredPart:
    """Score one part; without intervals if there are 0 resamples."""
    prefix, found, is_of_groups = part
    metrics = classification_metrics(found) if isinstance(found, Predictions) else None
    scored = ScoredPart(
        prefix=prefix,
        found=found,
        is_of_groups=is_of_groups,
        scores=metrics.scores if metrics is not None else found.scores(),
        intervals=intervals(found, num_resamples=num_resamples) if num_resamples else {},
        metrics=metrics,
    )
    return ScoredPart(**{**vars(scored), "notes": _notes(scored, num_resamples=num_resamples)})


def _notes(scored: ScoredPart, *, num_resamples: int) -> Sequence[str]:
    found, metrics, notes = scored.found, scored.metrics, []
    if isinstance(found, Predictions) and metrics is not None:
        notes += [*metrics.notes, *found.group_notes()]
        if num_resamples and not can_rank(found, num_resamples=num_resamples):
            notes.append(
                f"{found.name}: ROC-AUC and average precision have no interval, for {len(found)} {found.rows} of "
                f"{found.num_classes} classes would take minutes"
            )
    if num_resamples and scored.num_units == 1:
        notes.append(f"{found.name}: all {found.rows} are of one group, so there are no intervals")
    elif num_resamples and scored.num_units < FEW_UNITS:
        notes.append(
            f"{found.name}: intervals from {scored.num_units} {scored.units} are too narrow; take them as a hint"
        )
    return notes


def flat_scores(parts: Sequence[ScoredPart]) -> dict[str, float | None]:
    """Return all scores by their full names."""
    return {part.prefix + name: score for part in parts for name, score in part.scores.items()}


def results_of(parts: Sequence[ScoredPart], *, num_resamples: int) -> dict[str, Any]:
    """Return what the results file says of intervals, classes, sizes and notes; scores themselves are flat."""
    with_classes = [part for part in parts if part.metrics is not None and not part.is_of_groups]
    return {
        "intervals_95_pct": {part.prefix + name: span for part in parts for name, span in part.intervals.items()},
        "intervals_from": {
            part.prefix or "all": f"{num_resamples} resamples of {part.num_units} {part.units}"
            for part in parts
            if part.intervals
        },
        "n_reported": {part.prefix or "all": len(part.found) for part in parts},
        "per_class": {part.prefix or "all": part.metrics.per_class for part in with_classes if part.metrics},
        "notes": list(dict.fromkeys(note for part in parts for note in part.notes)),
    }


def compare_parts(parts: Sequence[Part], references: Sequence[Part], *, num_resamples: int) -> list[tuple[str, Any]]:
    """Compare the parts that both have: pairs of prefix and `Comparison`."""
    compared: list[tuple[str, Comparison]] = []
    for prefix, found, _ in parts:
        same = [other.found for other in references if other.prefix == prefix and type(other.found) is type(found)]
        if same:
            compared.append((prefix, compare(found, same[0], num_resamples=num_resamples)))
    return compared


def differences_of(compared: Sequence[tuple[str, Comparison]]) -> dict[str, Any]:
    """Return what the results file says of a comparison."""
    return {
        prefix + name: {
            "value_pct": found.value_pct,
            "reference_pct": found.reference_pct,
            "difference_pct": found.difference_pct,
            "interval_95_pct": None if found.low_pct is None else [found.low_pct, found.high_pct],
            "p_value": found.p_value,
        }
        for prefix, comparison in compared
        for name, found in comparison.differences.items()
    }


def format_scores(parts: Sequence[ScoredPart], *, num_resamples: int) -> str:
    """Lay scores and intervals out for the screen, one line each."""
    lines = []
    for part in parts:
        if not part.is_of_groups:
            lines.append(_title(part, num_resamples=num_resamples))
        for name in part.shown():
            span = part.intervals.get(name)
            score = part.scores[name]
            shown = f"{part.prefix + name:<30}  {'-' if score is None else f'{score:.2f}':>6}"
            lines.append(shown + ("" if span is None else f"  95 % interval {span[0]:.2f} to {span[1]:.2f}"))
    return "\n".join(lines)


def _title(part: ScoredPart, *, num_resamples: int) -> str:
    groups = f" in {part.num_units} groups" if part.found.groups is not None else ""
    drawn = f"; intervals: {num_resamples} resamples of {part.units}" if part.intervals else ""
    return f"{part.found.name}: {len(part.found)} {part.found.rows}{groups}{drawn}"


def format_comparison(
    compared: Sequence[tuple[str, Comparison]], *, parts: Sequence[ScoredPart], reference: str
) -> str:
    """Say for the screen whether it got better, one line a score."""
    shown = {(part.prefix, type(part.found) is Measurements): part for part in parts}
    lines = []
    for prefix, comparison in compared:
        part = shown.get((prefix, False)) or shown[prefix, True]
        if not part.is_of_groups:
            rows = f"{comparison.num_images} {part.found.rows}"
            left_out = comparison.num_left_out
            missing = f"; {left_out} that only one of the two has are left out" if left_out else ""
            lines.append(f"compared to {reference} on {rows}{missing}")
        lines += [
            prefix + comparison.differences[name].sentence() for name in part.shown() if name in comparison.differences
        ]
    return "\n".join(lines)
