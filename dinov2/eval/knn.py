"""k-NN: classify each validation image by its most similar training images, with the features as they are.

    python eval/knn.py --config-file F --pretrained-weights W --train-dataset S --val-dataset S --output-dir D

Ties are settled: of equally similar training images the earlier in the dataset is nearer, of classes with equal votes
the first wins. The headline score is at the first configured k that is not larger than the training set, not the best.
Where validation images come in groups (parts, slides, plates), each group is also classified as a whole, by the mean of
its images' votes: see `dinov2.eval.groups`.

Source: Wu et al. 2018, arXiv:1805.01978; numbers and options of the parents' `eval/knn.py`.
"""

import argparse
import json
import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2 import distributed
from dinov2.configs import Config, config_digest
from dinov2.eval.build import build_datasets, compute_dtype, load_frozen_backbone
from dinov2.eval.knn_evaluation import KnnEvaluation, KnnResult
from dinov2.eval.knn_scores import FULL
from dinov2.eval.options import (
    add_knn_options,
    check_few_shot_options,
    config_from_options,
    get_args_parser,
    make_output_dir,
)
from dinov2.logging import run_program, setup_logging

logger = logging.getLogger(__name__)

RESULTS_NAME = "results_eval_knn.json"


class OnlineKnn:
    """k-NN accuracy of a backbone in training, on the datasets of `evaluation.knn`, which are opened once.

    Args:
        cfg: config of the run.
        device: of this rank.

    Raises:
        ConfigError, DatasetError: a dataset string or its labels are wrong.
    """

    def __init__(self, cfg: Config, *, device: torch.device) -> None:
        self._evaluate = build_evaluation(cfg, device=device)

    def __call__(self, backbone: nn.Module) -> dict[str, float]:
        """Return top-1 accuracies in percent: `knn_top1_pct` at the first k, `knn10_top1_pct` at 10, and so on.

        If the validation set has groups, `knn_group_top1_pct` and so on are theirs.
        """
        scores = self._evaluate(backbone).named_scores()
        return {name: score for name, score in scores.items() if name.endswith("_top1_pct")}


def build_evaluation(cfg: Config, *, device: torch.device) -> KnnEvaluation:
    """Open the datasets of `evaluation.knn` and check them."""
    train, val = build_datasets(cfg)
    return KnnEvaluation(
        train,
        val,
        nb_knn=cfg.evaluation.knn.nb_knn,
        temperature=cfg.evaluation.knn.temperature,
        batch_size=cfg.evaluation.knn.batch_size,
        num_workers=cfg.train.num_workers,
        device=device,
        dtype=compute_dtype(cfg, device=device),
        on_bad_image=cfg.train.on_bad_image,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def _run(argv: Sequence[str] | None) -> int:
    parser = get_args_parser("knn.py", description="k-NN accuracy of a frozen backbone on labelled images.")
    add_knn_options(parser)
    args = parser.parse_intermixed_args(argv)
    check_few_shot_options(args)
    cfg = config_from_options(args)
    env = distributed.init(cfg.compute_precision.device)
    try:
        distributed.on_main_first(make_output_dir, args.output_dir)
        setup_logging(args.output_dir, rank=env.rank)
        for note in (*cfg.notes, *cfg.refusals):  # what training refuses does not matter here, but may surprise
            logger.info("%s", note)
        evaluate = distributed.on_every_rank(lambda: build_evaluation(cfg, device=env.device))
        backbone = distributed.on_every_rank(
            lambda: load_frozen_backbone(
                cfg, args.pretrained_weights, checkpoint_key=args.checkpoint_key, device=env.device
            )
        )
        result = evaluate(backbone, n_per_class_list=args.n_per_class_list, n_tries=args.n_tries, show_progress=True)
        if env.rank == 0:
            path = Path(args.output_dir) / RESULTS_NAME
            path.write_text(json.dumps(_report(result, cfg, args=args), indent=2) + "\n")
            print(format_table(result))
            logger.info("results=%s", path)
        return 0
    finally:
        distributed.shutdown()


def _report(result: KnnResult, cfg: Config, *, args: argparse.Namespace) -> Mapping[str, Any]:
    """Put together what goes into the results file."""
    knn = cfg.evaluation.knn
    return result.named_scores() | {
        "few_shot": [asdict(score) for score in result.scores if score.n_per_class != FULL],
        "n_train": result.n_train,
        "n_val": result.n_val,
        "n_val_groups": result.n_val_groups,
        "n_classes": result.n_classes,
        "n_features": result.n_features,
        "temperature": knn.temperature,
        "train_dataset": knn.train_dataset_path,
        "val_dataset": knn.val_dataset_path,
        "weights": args.pretrained_weights,
        "checkpoint_key": args.checkpoint_key,
        "config_digest": config_digest(cfg),
        "versions": {
            "dinov2-adapt": version("dinov2-adapt"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


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
