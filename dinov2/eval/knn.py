"""k-NN: classify each validation image by its most similar training images, with the features as they are.

    python eval/knn.py --config-file F --pretrained-weights W --train-dataset S --val-dataset S --output-dir D

Ties are settled: of equally similar training images the earlier in the dataset is nearer, of classes with equal votes
the first wins. The headline score is at the first configured k that is not larger than the training set, not the best:
so nothing is chosen, and no data need be held out to choose by. Where images come in groups (parts, slides, plates),
each group is also classified as a whole, by the mean of its images' votes: see `dinov2.eval.groups`.

Source: Wu et al. 2018, arXiv:1805.01978; numbers and options of the parents' `eval/knn.py`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict

from dinov2.eval.knn_evaluation import KnnResult, evaluate_sets
from dinov2.eval.knn_scores import FULL
from dinov2.eval.options import add_knn_options, add_pool_option, check_few_shot_options, pool_of
from dinov2.eval.program import Inputs, Outcome, run_evaluation

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_evaluation(
        argv,
        name="knn",
        description="k-NN accuracy of a frozen backbone on labelled images.",
        pool_of=pool_of,
        fit_and_score=_fit_and_score,
        add_options=_add_options,
        check_options=check_few_shot_options,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_knn_options(parser)
    add_pool_option(parser)


def _fit_and_score(inputs: Inputs) -> Outcome:
    knn = inputs.cfg.evaluation.knn
    val = inputs.val if inputs.test is None else inputs.test
    if inputs.test is not None and not inputs.is_reference:
        logger.info("the k of k-NN are given, so nothing is chosen on %s; %s is classified", inputs.val.name, val.name)
    result, predictions = evaluate_sets(
        inputs.train,
        val,
        nb_knn=knn.nb_knn,
        temperature=knn.temperature,
        device=inputs.env.device,
        n_per_class_list=inputs.args.n_per_class_list,
        n_tries=inputs.args.n_tries,
        logs_notes=not inputs.is_reference,
    )
    return Outcome(
        predictions=predictions,
        named_scores=result.named_scores(),
        table=format_table(result),
        details={
            "few_shot": [asdict(score) for score in result.scores if score.n_per_class != FULL],
            "n_train": result.n_train,
            "n_val": result.n_val,
            "n_val_groups": result.n_val_groups,
            "n_classes": result.n_classes,
            "n_features": result.n_features,
            "temperature": knn.temperature,
        },
    )


def format_table(result: KnnResult) -> str:
    """Lay the scores out for the screen, one line for each k; with a column of groups if they are scored."""
    groups = f" in {result.n_val_groups} groups" if result.n_val_groups else ""
    lines = [
        f"k-NN on {result.n_train} training and {result.n_val} validation images{groups}, {result.n_classes} classes, "
        f"{result.n_features} features",
        f"{'images per class':>16}  {'k':>5}  {'top-1 %':>8}  {'top-5 %':>8}  {'mean per class %':>16}"
        + (f"  {'group top-1 %':>13}" if groups else ""),
    ]
    for score in result.scores:
        images = "all" if score.n_per_class == FULL else str(score.n_per_class)
        lines.append(
            f"{images:>16}  {score.k:>5}  {score.top1_pct:>8.2f}  {score.top5_pct:>8.2f}  "
            f"{score.mean_per_class_pct:>16.2f}" + (f"  {score.group_top1_pct:>13.2f}" if groups else "")
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
