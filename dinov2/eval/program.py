"""The skeleton of all evaluation programs: from the command line to features, scores, comparison and result files.

A program brings what is its own: options, the pool of features it wants, and how to fit and score.

    python eval/NAME.py --config-file F --pretrained-weights W --train-dataset S --val-dataset S --output-dir D
                        [--test-dataset S] [--compare-to W0] [key=value ...]
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2 import distributed
from dinov2.configs import Config
from dinov2.distributed.environment import Environment
from dinov2.errors import ConfigError
from dinov2.eval.build import build_datasets
from dinov2.eval.feature_cache import cached_features
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.options import config_from_options, get_args_parser, make_output_dir
from dinov2.eval.predictions import Predictions
from dinov2.eval.results import write_results
from dinov2.logging import run_program, setup_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a program fits and scores; called with the same on every rank."""

    cfg: Config
    args: argparse.Namespace
    env: Environment
    train: FeatureSet
    val: FeatureSet  # the same object as `train` where both options name one set
    test: FeatureSet | None  # None without --test-dataset
    weights: str  # those of these features: of --pretrained-weights or --compare-to
    checkpoint_key: str
    output_dir: Path
    is_reference: bool = False  # the weights are those of --compare-to


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a program found; rank 0's is reported."""

    predictions: Predictions | None  # for the reported set; metrics, intervals and the comparison come from them
    further: Mapping[str, Predictions] = field(default_factory=dict)  # the same under a prefix: `nscb_top1_pct`
    named_scores: Mapping[str, float] = field(default_factory=dict)  # the program's own, percent
    table: str = ""  # the program's own lines for the screen
    details: Mapping[str, Any] = field(default_factory=dict)  # settings and findings for the results file, as JSON


def run_evaluation(
    argv: Sequence[str] | None,
    *,
    name: str,
    description: str,
    pool_of: Callable[[Config, argparse.Namespace], str],
    fit_and_score: Callable[[Inputs], Outcome],
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    check_options: Callable[[argparse.Namespace], None] = lambda args: None,
    needs_train: bool = True,
) -> int:
    """Run an evaluation program from its command line to its result files.

    Args:
        argv: arguments without the program's name; None: those of the process.
        name: of the program: `NAME.py`, `results_eval_NAME.json`.
        description: for --help.
        pool_of: pool of the features that the options ask for.
        fit_and_score: called on every rank with the features, once for --pretrained-weights and once for --compare-to;
            raises the same error on all ranks, or any on some of them after its last collective.
        add_options: adds the program's own options.
        check_options: raises a `ConfigError` for a wrong value.
        needs_train: False: without --train-dataset, `Inputs.train` is `Inputs.val`, and that is no reason to warn.

    Returns:
        Exit code: 0 done, 1 failed, 2 bad usage or config.
    """

    def body(argv: Sequence[str] | None) -> int:
        parser = get_args_parser(f"{name}.py", description=description)
        add_program_options(parser)
        add_options(parser)
        args = parser.parse_intermixed_args(argv)
        if not needs_train:
            args.train_dataset = args.train_dataset or args.val_dataset
        _check_program_options(args)
        check_options(args)
        return _run(args, name=name, pool_of=pool_of, fit_and_score=fit_and_score)

    return run_program(body, argv)


def add_program_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the skeleton, which stand for no config key."""
    parser.add_argument(
        "--test-dataset",
        metavar="S",
        help="labelled images to report on, once; --val-dataset then serves to choose; default: none",
    )
    parser.add_argument(
        "--compare-to",
        metavar="W0",
        help="other weights, such as those before training: the differences are reported; default: none",
    )
    parser.add_argument(
        "--compare-to-checkpoint-key",
        metavar="KEY",
        help="network to take from --compare-to where it holds several; default: that of --checkpoint-key",
    )
    parser.add_argument(
        "--features-dir", metavar="D", help="folder where features are kept and found; default: OUTPUT_DIR/features"
    )
    parser.add_argument(
        "--features-dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="numbers of the features that are kept; default: fp32",
    )
    parser.add_argument(
        "--num-bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="resamples behind each interval and p-value; 0: none; default: 1000",
    )


def _check_program_options(args: argparse.Namespace) -> None:
    if args.num_bootstrap != 0 and args.num_bootstrap < 100:
        raise ConfigError(f"--num-bootstrap {args.num_bootstrap}: must be at least 100, or 0 for no intervals")
    if args.compare_to_checkpoint_key and not args.compare_to:
        raise ConfigError("--compare-to-checkpoint-key is given without --compare-to; name the weights to compare to")


def _run(
    args: argparse.Namespace,
    *,
    name: str,
    pool_of: Callable[[Config, argparse.Namespace], str],
    fit_and_score: Callable[[Inputs], Outcome],
) -> int:
    cfg = config_from_options(args)
    pool = pool_of(cfg, args)
    env = distributed.init(cfg.compute_precision.device)
    try:
        output_dir = Path(args.output_dir)
        distributed.on_main_first(make_output_dir, args.output_dir)
        setup_logging(output_dir, rank=env.rank)
        for note in (*cfg.notes, *cfg.refusals):  # what training refuses does not matter here, but may surprise
            logger.info("%s", note)
        distributed.on_every_rank(lambda: build_datasets(cfg))

        def evaluate(weights: str, checkpoint_key: str, *, is_reference: bool) -> tuple[Inputs, Outcome]:
            sets = {
                part: cached_features(
                    cfg,
                    weights=weights,
                    checkpoint_key=checkpoint_key,
                    dataset=dataset,
                    pool=pool,
                    dtype=args.features_dtype,
                    features_dir=args.features_dir or output_dir / "features",
                    device=env.device,
                    show_progress=True,
                )
                for part, dataset in {
                    "train": cfg.evaluation.knn.train_dataset_path,
                    "val": cfg.evaluation.knn.val_dataset_path,
                    "test": args.test_dataset,
                }.items()
                if dataset is not None
            }
            inputs = Inputs(
                cfg=cfg,
                args=args,
                env=env,
                train=sets["train"],
                val=sets["val"],
                test=sets.get("test"),
                weights=weights,
                checkpoint_key=checkpoint_key,
                output_dir=output_dir,
                is_reference=is_reference,
            )
            return inputs, distributed.on_every_rank(lambda: fit_and_score(inputs))

        inputs, outcome = evaluate(args.pretrained_weights, args.checkpoint_key, is_reference=False)
        reference = None
        if args.compare_to:
            key = args.compare_to_checkpoint_key or args.checkpoint_key
            reference = evaluate(args.compare_to, key, is_reference=True)
        distributed.on_main_first(_report, name, inputs, outcome, reference)
        return 0
    finally:
        distributed.shutdown()


def _report(name: str, inputs: Inputs, outcome: Outcome, reference: tuple[Inputs, Outcome] | None) -> None:
    """Write the result files and print the table; for rank 0."""
    path = inputs.output_dir / f"results_eval_{name}.json"
    write_results(path, {**outcome.named_scores, **outcome.details})
    print(outcome.table)
    logger.info("results=%s", path)
