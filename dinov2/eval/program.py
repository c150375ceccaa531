"""The skeleton of all evaluation programs: from the command line to features, scores, comparison and result files.

A program brings what is its own: options, the pool of features it wants, and how to fit and score.

    python eval/NAME.py --config-file F --pretrained-weights W --train-dataset S --val-dataset S --output-dir D
                        [--test-dataset S] [--compare-to W0] [key=value ...]
"""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from dinov2 import distributed
from dinov2.configs import Config
from dinov2.errors import ConfigError
from dinov2.eval.build import (
    build_datasets,
    load_frozen_backbone,
    open_eval_dataset,
    require_separate,
    warn_of_common_images,
)
from dinov2.eval.feature_cache import cached_features
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.options import (
    add_features_options,
    config_from_options,
    get_args_parser,
    make_output_dir,
    parse_options,
)
from dinov2.eval.outcome import Inputs, Outcome
from dinov2.eval.write_report import write_report
from dinov2.logging import run_program, setup_logging

__all__ = ["Inputs", "Outcome", "add_program_options", "run_evaluation"]

logger = logging.getLogger(__name__)

_TIMEOUT_S = 24 * 3600  # other ranks wait while rank 0 fits, or for the features that another program computes


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
        needs_train: False: without --train-dataset, `Inputs.train` is `Inputs.val`, whatever the config names for
            k-NN, and that is no reason to warn.

    Returns:
        Exit code: 0 done, 1 failed, 2 bad usage or config.
    """

    def body(argv: Sequence[str] | None) -> int:
        parser = get_args_parser(f"{name}.py", description=description)
        add_program_options(parser)
        add_options(parser)
        args = parse_options(parser, argv)
        if not needs_train:  # the config takes both or neither
            args.train_dataset = args.train_dataset or args.val_dataset
        _check_program_options(args)
        check_options(args)
        return _run(args, name=name, pool_of=pool_of, fit_and_score=fit_and_score, needs_train=needs_train)

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
    add_features_options(parser)
    parser.add_argument(
        "--num-bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="resamples behind each interval and p-value; 0: none; default: 1000",
    )
    parser.add_argument(
        "--with-shares",
        action="store_true",
        help="write the shares of all classes into predictions_*.csv, not only the largest; default: no",
    )


def _check_program_options(args: argparse.Namespace) -> None:
    if args.num_bootstrap != 0 and args.num_bootstrap < 100:
        raise ConfigError(f"--num-bootstrap {args.num_bootstrap}: must be at least 100, or 0 for no intervals")
    if args.compare_to and not args.num_bootstrap:
        raise ConfigError("--num-bootstrap 0: --compare-to needs resamples for its intervals; use at least 100")
    if args.compare_to_checkpoint_key and not args.compare_to:
        raise ConfigError("--compare-to-checkpoint-key is given without --compare-to; name the weights to compare to")


def _run(
    args: argparse.Namespace,
    *,
    name: str,
    pool_of: Callable[[Config, argparse.Namespace], str],
    fit_and_score: Callable[[Inputs], Outcome],
    needs_train: bool,
) -> int:
    cfg = config_from_options(args)
    pool = pool_of(cfg, args)
    env = distributed.init(cfg.compute_precision.device, timeout_s=_TIMEOUT_S)
    try:
        distributed.on_main_first(make_output_dir, args.output_dir)
        setup_logging(args.output_dir, rank=env.rank)
        for note in (*cfg.notes, *cfg.refusals):  # what training refuses does not matter here, but may surprise
            logger.info("%s", note)
        knn = cfg.evaluation.knn
        own_train = knn.train_dataset_path if needs_train or args.train_dataset else knn.val_dataset_path
        names = {"train": own_train, "val": knn.val_dataset_path, "test": args.test_dataset}
        distributed.on_every_rank(lambda: _check_sets(cfg, names, needs_train=needs_train))
        distributed.on_main_first(_check_other_weights, cfg, args)

        def evaluate(weights: str, checkpoint_key: str, *, is_reference: bool) -> tuple[Inputs, Outcome]:
            settings = {"weights": weights, "checkpoint_key": checkpoint_key, "pool": pool, "device": env.device}
            inputs = Inputs(
                cfg=cfg,
                args=args,
                env=env,
                **_features_of(cfg, names, args=args, **settings),
                weights=weights,
                checkpoint_key=checkpoint_key,
                output_dir=Path(args.output_dir),
                is_reference=is_reference,
            )
            return inputs, distributed.on_every_rank(lambda: fit_and_score(inputs))

        inputs, outcome = evaluate(args.pretrained_weights, args.checkpoint_key, is_reference=False)
        reference = None
        if args.compare_to:
            key = args.compare_to_checkpoint_key or args.checkpoint_key
            reference = evaluate(args.compare_to, key, is_reference=True)
        distributed.on_main_first(write_report, name, inputs, outcome, reference)
        return 0
    finally:
        distributed.shutdown()


def _check_sets(cfg: Config, names: Mapping[str, str | None], *, needs_train: bool) -> None:
    """Open the sets, to find out what is wrong with them before features are computed."""
    if needs_train:
        train, val = build_datasets(cfg)
    elif not names["val"]:
        raise ConfigError(
            "evaluation.knn.val_dataset_path (--val-dataset) is not set; name images, e.g. ImageFolder:root=photos"
        )
    else:
        train, val = (open_eval_dataset(cfg, names[part]) for part in ("train", "val"))
        if train.name != val.name:
            warn_of_common_images(train, val)
    if names["test"]:
        test = open_eval_dataset(cfg, names["test"])
        for other in {one.name: one for one in (train, val)}.values():
            require_separate(other, test)


def _check_other_weights(cfg: Config, args: argparse.Namespace) -> None:
    """Load the weights of --compare-to, which are needed last, before features are computed; for rank 0.

    Raises:
        CheckpointError: they cannot be read, or do not fit.
    """
    if args.compare_to:
        key = args.compare_to_checkpoint_key or args.checkpoint_key
        load_frozen_backbone(cfg, args.compare_to, checkpoint_key=key, device=torch.device("cpu"))


def _features_of(
    cfg: Config,
    names: Mapping[str, str | None],
    *,
    args: argparse.Namespace,
    weights: str,
    checkpoint_key: str,
    pool: str,
    device: torch.device,
) -> dict[str, FeatureSet | None]:
    """Find or compute the features of the named sets; sets of one name are one object."""
    found = {
        name: cached_features(
            cfg,
            weights=weights,
            checkpoint_key=checkpoint_key,
            dataset=name,
            pool=pool,
            dtype=args.features_dtype,
            features_dir=args.features_dir or Path(args.output_dir) / "features",
            device=device,
            show_progress=True,
        )
        for name in dict.fromkeys(names.values())
        if name
    }
    return {part: found[name] if name else None for part, name in names.items()}
