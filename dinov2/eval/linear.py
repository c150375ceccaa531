"""Linear classifiers on frozen features: a grid of learning rates, blocks and pooling, trained all at once.

    python eval/linear.py --config-file F --pretrained-weights W --train-dataset S --val-dataset S --output-dir D
                          [--features augmented] [--test-dataset S] [key=value ...]

`--features cached`, the default, trains on the features that all evaluations share: seconds to minutes on a CPU.
`--features augmented` is the parents' protocol: random crops and flips through the backbone in every step, with its own
saved state, from which an interrupted run goes on. Numbers of the parents: 13 learning rates, the last 1 and 4 blocks,
with and without the patch mean, 10 epochs of 1250 steps of 128 images, SGD with momentum 0.9, cosine to 0.

Different from them: the classifier is chosen on images that are not reported, see `dinov2.eval.classifier_sets`; the
batch is that of all processes, so that their number does not change the result; an epoch on cached features is one
pass, from 125 to 1250 steps. On cached features without a test set, the chosen classifier is trained again with the
part of the training set that was held out.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from dinov2.configs import Config
from dinov2.data import make_dataset
from dinov2.distributed import on_every_rank, on_main_first
from dinov2.errors import ConfigError, TrainingError
from dinov2.eval.build import compute_dtype, describe_preprocessing, load_frozen_backbone
from dinov2.eval.classifier_sets import METRICS, ClassifierSets, Part, make_classifier_sets, predict, right_pct
from dinov2.eval.linear_grid import LEARNING_RATES, NUM_BLOCKS, Candidate, LinearGrid, make_grid
from dinov2.eval.linear_head import HeadDescription, from_fit
from dinov2.eval.linear_training import (
    AugmentedImages,
    BatchPlan,
    load_state,
    save_state,
    train_on_features,
    train_on_images,
)
from dinov2.eval.pooling import Pool, PooledBackbone
from dinov2.eval.program import Inputs, Outcome, run_evaluation

logger = logging.getLogger(__name__)

NAME = "linear"
EPOCHS = 10
EPOCH_LENGTH = 1250  # steps, as the parents'
LEAST_EPOCH_LENGTH = 125  # on cached features of few images
BATCH_SIZE = 128
_SEED = 0
_ROWS = 8192  # of features that are scored at a time


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_evaluation(
        argv,
        name=NAME,
        description="Linear classifiers on the features of a frozen backbone.",
        pool_of=_pool_of,
        fit_and_score=_fit_and_score,
        add_options=_add_options,
        check_options=_check_options,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    counts = (
        ("--epochs", EPOCHS, "passes, in the parents' count", str(EPOCHS)),
        (
            "--epoch-length",
            None,
            "steps of an epoch",
            f"{EPOCH_LENGTH}; on cached features one pass over the images, from {LEAST_EPOCH_LENGTH} to {EPOCH_LENGTH}",
        ),
        ("--train-batch-size", BATCH_SIZE, "images of a step, over all processes", str(BATCH_SIZE)),
        ("--save-period-iterations", 100, "steps between saved states; augmented only", "100"),
        ("--eval-period-iterations", EPOCH_LENGTH, "steps between lines with the best score; augmented only", "1250"),
    )
    parser.add_argument(
        "--features",
        choices=("cached", "augmented"),
        default="cached",
        help="train on features computed once, or on images augmented in every step; default: cached",
    )
    for option, default, what, shown in counts:
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{what}; default: {shown}")
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=list(LEARNING_RATES),
        metavar="LR",
        help="for batches of 256 images; default: 13 from 1e-5 to 0.1",
    )
    parser.add_argument(
        "--n-last-blocks",
        nargs="+",
        type=int,
        default=list(NUM_BLOCKS),
        metavar="N",
        help="numbers of last blocks whose class tokens are taken; default: 1 4",
    )
    parser.add_argument(
        "--val-metric-type",
        choices=METRICS,
        default=METRICS[0],
        help="what chooses the classifier; the second counts each class alike; default: mean_accuracy",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="start anew where a saved state is found; default: go on from it"
    )


def _check_options(args: argparse.Namespace) -> None:
    names = ("epochs", "epoch_length", "train_batch_size", "save_period_iterations", "eval_period_iterations")
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not all(0 < rate < math.inf for rate in args.learning_rates):
        shown = " ".join(f"{rate:g}" for rate in args.learning_rates)
        raise ConfigError(f"--learning-rates {shown}: each must be above 0 and finite")
    if min(args.n_last_blocks) < 1:
        raise ConfigError(f"--n-last-blocks {' '.join(map(str, args.n_last_blocks))}: each must be at least 1")


def _pool_of(cfg: Config, args: argparse.Namespace) -> str:
    if cfg.student.is_resnet:
        return "cls"
    return Pool(num_blocks=max(args.n_last_blocks), has_mean=True).name


def _fit_and_score(inputs: Inputs) -> Outcome:
    args, env = inputs.args, inputs.env
    sets = make_classifier_sets(inputs.train, inputs.val, inputs.test, logs_notes=not inputs.is_reference)
    is_augmented = args.features == "augmented"
    if not is_augmented and env.rank != 0:
        return Outcome(predictions=None)  # every rank would compute the same, and rank 0's is reported
    grid, plan = _make_grid(inputs, sets.fit, num_classes=sets.num_classes)
    if is_augmented:
        _train_on_images(inputs, sets, grid, plan)
        if env.rank != 0:
            return Outcome(predictions=None)
    else:
        train_on_features(grid, sets.fit, plan, shows_progress=True)
    scores = _scores(grid, sets.choose, metric=args.val_metric_type)
    best = scores.index(max(scores))
    candidate, classifier = grid.candidates[best], grid.classifier(best)
    if not is_augmented and not sets.has_test:
        final, plan = _make_grid(inputs, sets.train, num_classes=sets.num_classes, only=candidate)
        train_on_features(final, sets.train, plan)
        classifier = final.classifier(0)
    description = HeadDescription(
        class_names=sets.class_names,
        pool=candidate.pool,
        weights=inputs.weights,
        checkpoint_key=inputs.checkpoint_key,
        train_dataset=inputs.train.name,
    )
    head = from_fit(*classifier, description)
    logits = head.logits(sets.report.values(candidate.pool))
    if not logits.isfinite().all():
        raise TrainingError(
            f"linear: the best classifier of the grid, {candidate.name}, has grown beyond all numbers; give smaller "
            "--learning-rates"
        )
    if not inputs.is_reference:
        head.save(inputs.output_dir / f"classifier_{NAME}.safetensors")
    return Outcome(
        predictions=sets.predictions(logits),
        table=f"linear classifiers on {len(sets.fit)} training images ({args.features} features), {sets.num_classes} "
        f"classes, {grid.total_steps} steps\n{candidate.name} chosen of {len(scores)} by {scores[best]:.2f} % on "
        f"{sets.description}",
        details={
            "best_classifier": candidate.name,
            "best_pool": candidate.pool,
            "chosen_on": sets.description,
            "val_metric_type": args.val_metric_type,
            "trained_on": f"{args.features} features",
            "total_steps": grid.total_steps,
            "train_batch_size": args.train_batch_size,
            "sweep": [
                {"classifier": one.name, "choosing_pct": score}
                for one, score in zip(grid.candidates, scores, strict=True)
            ],
        },
    )


def _make_grid(
    inputs: Inputs, part: Part, *, num_classes: int, only: Candidate | None = None
) -> tuple[LinearGrid, BatchPlan]:
    """Make the classifiers, untrained, and the plan of their batches."""
    args, pool = inputs.args, part.source.pool
    blocks = [1] if pool == "cls" else sorted(set(args.n_last_blocks))
    candidates = make_grid(
        pool, num_blocks=blocks, learning_rates=sorted(set(args.learning_rates)), batch_size=args.train_batch_size
    )
    length = args.epoch_length or EPOCH_LENGTH
    if args.epoch_length is None and args.features == "cached":
        length = min(max(math.ceil(len(part) / args.train_batch_size), LEAST_EPOCH_LENGTH), EPOCH_LENGTH)
    grid = LinearGrid(
        candidates if only is None else [only],
        pool=pool,
        num_features=part.source.values.shape[1],
        num_classes=num_classes,
        total_steps=args.epochs * length,
        device=inputs.env.device,
        seed=_SEED,
    )
    return grid, BatchPlan(len(part), batch_size=args.train_batch_size, seed=_SEED)


def _train_on_images(inputs: Inputs, sets: ClassifierSets, grid: LinearGrid, plan: BatchPlan) -> None:
    """Train on augmented images, from a saved state on if there is one that fits."""
    cfg, args, env = inputs.cfg, inputs.args, inputs.env
    path = inputs.output_dir / f"linear_state_{_digest(inputs, sets, grid)}.pth"
    state = None if args.no_resume else on_main_first(load_state, path)
    if state is not None:
        grid.load_state_dict(state)
        logger.info("goes on from step=%d of=%d state=%s", grid.step, grid.total_steps, path)
    model = on_every_rank(
        lambda: load_frozen_backbone(cfg, inputs.weights, checkpoint_key=inputs.checkpoint_key, device=env.device)
    )
    images = AugmentedImages(_open_images(cfg, inputs.train.name), sets.fit, plan, **_preprocessing(cfg))

    def after_step() -> None:
        if grid.step % args.save_period_iterations == 0 or grid.step == grid.total_steps:
            on_main_first(save_state, path, grid)
        if env.rank == 0 and grid.step % args.eval_period_iterations == 0:
            score = max(_scores(grid, sets.choose, metric=args.val_metric_type))
            logger.info("step=%d best_choosing_pct=%.2f", grid.step, score)

    train_on_images(
        grid,
        PooledBackbone(model, inputs.train.pool),
        images,
        num_features=inputs.train.values.shape[1],
        num_workers=cfg.train.num_workers,
        device=env.device,
        dtype=compute_dtype(cfg, device=env.device),
        after_step=after_step,
    )


def _open_images(cfg: Config, dataset_str: str) -> Any:
    return make_dataset(
        dataset_str,
        channels=cfg.student.in_chans,
        cache_dir=cfg.data.cache_dir or str(Path(cfg.train.output_dir) / "cache"),
        max_image_pixels=cfg.data.max_image_pixels,
    )


def _preprocessing(cfg: Config) -> dict[str, Any]:
    settings = describe_preprocessing(cfg)
    return {"size_px": settings["crop_size"], "mean": settings["mean"], "std": settings["std"]}


def _digest(inputs: Inputs, sets: ClassifierSets, grid: LinearGrid) -> str:
    """Short digest of all that a saved state depends on; not of how many processes compute."""
    facts = (
        inputs.train.digest,
        [candidate.name for candidate in grid.candidates],
        [candidate.learning_rate for candidate in grid.candidates],
        (grid.total_steps, grid.num_classes, inputs.args.train_batch_size),
    )
    rows = sets.fit.source.places[sets.fit.rows].tobytes() + sets.fit.classes.tobytes()
    return blake2b(repr(facts).encode() + rows, digest_size=8).hexdigest()


def _scores(grid: LinearGrid, part: Part, *, metric: str) -> list[float]:
    """Accuracy of each classifier in percent."""
    predicted = [
        torch.stack([predict(logits) for logits in grid.logits(rows.to(grid.device))]).cpu()
        for rows in part.values().split(_ROWS)
    ]
    return [right_pct(of_one, part.targets, metric=metric) for of_one in torch.cat(predicted, dim=1)]


if __name__ == "__main__":
    sys.exit(main())
