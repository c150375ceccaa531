"""Write all result files of an evaluation program and print its tables.

results_eval_NAME.json     scores in percent, flat; intervals, classes, comparison, settings, versions, digests
predictions_NAME.csv       one line an image; predictions_NAME_groups.csv one line a group
confusion_NAME.csv, .png   images by right and predicted class
"""

import logging
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import sklearn
import torch

from dinov2.configs import config_digest
from dinov2.errors import TrainingError
from dinov2.eval.confusion_picture import draw_confusion
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.metrics import GROUP
from dinov2.eval.outcome import Inputs, Outcome
from dinov2.eval.report import (
    Part,
    ScoredPart,
    compare_parts,
    differences_of,
    flat_scores,
    format_comparison,
    format_scores,
    parts_of,
    results_of,
    score_part,
)
from dinov2.eval.results import write_confusion, write_predictions, write_results

logger = logging.getLogger(__name__)


def write_report(name: str, inputs: Inputs, outcome: Outcome, reference: tuple[Inputs, Outcome] | None) -> None:
    """Write the result files and print the tables; for rank 0.

    Raises:
        TrainingError: a file cannot be written.
    """
    num_resamples = inputs.args.num_bootstrap
    own_parts = parts_of(outcome.predictions, outcome.further, outcome.measurements)
    parts = [score_part(part, num_resamples=num_resamples) for part in own_parts]
    results = {
        **outcome.named_scores,
        **flat_scores(parts),
        **outcome.details,
        **results_of(parts, num_resamples=num_resamples),
        **_settings(inputs),
    }
    tables = [outcome.table, format_scores(parts, num_resamples=num_resamples)]
    if reference is not None:
        found = reference[1]
        reference_parts = parts_of(found.predictions, found.further, found.measurements)
        compared = compare_parts(own_parts, reference_parts, num_resamples=num_resamples)
        results["compare_to"] = _comparison(*reference, parts=reference_parts) | {
            "differences": differences_of(compared)
        }
        tables.append(format_comparison(compared, parts=parts, reference=reference[0].weights))
        if not compared:  # nothing that an interval could be drawn around, as in health: both tables speak
            tables.append(f"compared to {reference[0].weights}\n{found.table}")
    for note in dict.fromkeys(note for part in parts for note in part.notes):
        logger.warning("%s", note)
    path = inputs.output_dir / f"results_eval_{name}.json"
    try:
        for part in parts:
            _write_part(part, name=name, inputs=inputs)
        write_results(path, results)
    except OSError as error:
        raise TrainingError(f"{error.filename or path}: cannot be written ({error.strerror})") from error
    print("\n\n".join(table for table in tables if table))
    logger.info("results=%s", path)


def _write_part(part: ScoredPart, *, name: str, inputs: Inputs) -> None:
    """Write the predictions of one part, and who is taken for whom."""
    if part.metrics is None:
        return
    found = part.found
    stem = (
        f"{name}_{part.prefix.removesuffix(GROUP)}groups" if part.is_of_groups else f"{name}_{part.prefix}".rstrip("_")
    )
    folder = inputs.output_dir
    write_predictions(folder / f"predictions_{stem}.csv", found, with_shares=inputs.args.with_shares)
    if part.is_of_groups:
        return
    write_confusion(folder / f"confusion_{stem}.csv", part.metrics.confusion, class_names=found.class_names)
    title = f"{found.name}: {len(found)} {found.rows}, top-1 {part.scores['top1_pct']:.1f} %"
    picture = folder / f"confusion_{stem}.png"
    draw_confusion(picture, part.metrics.confusion, class_names=found.class_names, title=title)


def _comparison(inputs: Inputs, outcome: Outcome, *, parts: Sequence[Part]) -> dict[str, Any]:
    """Say what the results file says of the other weights."""
    scores = [score_part(part, num_resamples=0) for part in parts]
    return {
        "weights": inputs.weights,
        "checkpoint_key": inputs.checkpoint_key,
        "features": _digests(inputs),
        "scores": {**outcome.named_scores, **flat_scores(scores)},
        "details": outcome.details,
    }


def _settings(inputs: Inputs) -> dict[str, Any]:
    """Say what the results depend on."""
    sets = {f"{part}_dataset": found.name for part, found in _sets(inputs).items()}
    return {
        **sets,
        "weights": inputs.weights,
        "checkpoint_key": inputs.checkpoint_key,
        "pool": inputs.val.pool,
        "features_dtype": inputs.args.features_dtype,
        "features": _digests(inputs),
        "num_bootstrap": inputs.args.num_bootstrap,
        "config_digest": config_digest(inputs.cfg),
        "versions": {
            "dinov2-adapt": version("dinov2-adapt"),
            "torch": torch.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
    }


def _sets(inputs: Inputs) -> dict[str, FeatureSet]:
    sets = {"train": inputs.train, "val": inputs.val, "test": inputs.test}
    return {part: found for part, found in sets.items() if found is not None}


def _digests(inputs: Inputs) -> dict[str, str]:
    """Digest of weights, dataset and preprocessing, by set."""
    return {part: found.digest for part, found in _sets(inputs).items()}
