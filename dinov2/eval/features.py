"""Compute the features of datasets once and keep them, for evaluations and for use elsewhere.

    python eval/features.py --config-file F --pretrained-weights W --dataset S [S ...] --output-dir D
                            [--pool cls+mean] [--output F.npz] [key=value ...]

Evaluation programs with the same `--features-dir` take them from there. Labels are kept where there are some.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dinov2 import distributed
from dinov2.configs import Config
from dinov2.errors import ConfigError
from dinov2.eval.feature_cache import cached_features
from dinov2.eval.feature_export import check_export_path, save_features
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.options import (
    add_features_options,
    config_from_options,
    get_backbone_parser,
    make_output_dir,
    parse_options,
)
from dinov2.eval.pooling import POOLS, parse_pool
from dinov2.logging import run_program, setup_logging

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Compute features as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = get_backbone_parser("features.py", description="Features of images by a frozen backbone, kept in a file.")
    parser.add_argument("--dataset", nargs="+", metavar="S", help="images, one dataset string or several")
    parser.add_argument("--pool", default="cls", metavar="P", help=f"{POOLS}; default: cls")
    parser.add_argument(
        "--output",
        metavar="F",
        help="also write the features of the one dataset to this file: .npz, .safetensors or .csv; default: none",
    )
    add_features_options(parser)
    args = parse_options(parser, argv)
    if not args.dataset:
        raise ConfigError("--dataset is not given; name the images, e.g. ImageFolder:root=photos")
    parse_pool(args.pool)
    if args.output:
        if len(args.dataset) > 1:
            raise ConfigError(f"--output {args.output}: takes one --dataset, and {len(args.dataset)} are given")
        check_export_path(args.output, pool=args.pool)
    return args, config_from_options(args)


def _run(argv: Sequence[str] | None) -> int:
    args, cfg = _parse(argv)
    env = distributed.init(cfg.compute_precision.device)
    try:
        distributed.on_main_first(make_output_dir, args.output_dir)
        setup_logging(args.output_dir, rank=env.rank)
        folder = Path(args.features_dir or Path(args.output_dir) / "features")
        for dataset in args.dataset:
            started_s = time.monotonic()
            features = cached_features(
                cfg,
                weights=args.pretrained_weights,
                checkpoint_key=args.checkpoint_key,
                dataset=dataset,
                pool=args.pool,
                dtype=args.features_dtype,
                features_dir=folder,
                device=env.device,
                show_progress=True,
            )
            if env.rank == 0:
                print(_describe(features, folder=folder, seconds=time.monotonic() - started_s))
        if args.output:
            distributed.on_main_first(_export, args.output, features)
        return 0
    finally:
        distributed.shutdown()


def _export(path: str, features: FeatureSet) -> None:
    save_features(path, features)
    print(f"written: {path} ({Path(path).stat().st_size / 2**20:.1f} MiB)")


def _describe(features: FeatureSet, *, folder: Path, seconds: float) -> str:
    """Say in a line what is there now."""
    shape = " x ".join(map(str, features.values.shape))
    mib = features.values.nbytes / 2**20
    labelled = int((features.targets >= 0).sum())
    number_format = str(features.values.dtype).removeprefix("torch.")
    return (
        f"{features.name}: {shape} {number_format} ({features.pool}, {mib:.1f} MiB), {labelled} with a label, "
        f"in {folder}, {seconds:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
