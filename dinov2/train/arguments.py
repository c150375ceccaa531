"""The command line of training."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from dinov2.configs.run_sections import TrainConfig
from dinov2.errors import ConfigError


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for, the options that stand for config keys being among the overrides."""

    config_file: str | None
    overrides: tuple[str, ...]
    eval_only: bool
    overwrite: bool
    retry: bool


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        allow_abbrev=False,  # the launcher knows some of the options
        description="Train DINOv2 on your own images. Start it with python for one process, torchrun for several.",
        epilog="Without flags a run goes on from the newest complete checkpoint in its folder, if there is one. "
        "Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 end the step, save and exit with 0. torchrun passes Ctrl-C and SIGTERM "
        "on (the others with its --signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGUSR2), itself exits with 1, and kills "
        "what has not ended after 30 s: give large models more with its --shutdown-timeout, in seconds. "
        "All keys with defaults and units: configs/ssl_default_config.yaml.",
    )
    parser.add_argument("--config-file", "--config", metavar="F", help="YAML file over the defaults; default: none")
    parser.add_argument(
        "--output-dir",
        metavar="D",
        help=f"folder of the run; stands for train.output_dir (default {TrainConfig.output_dir}, this folder)",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="start anew; refused where the folder holds a run; default: resume"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --no-resume: remove the run that the folder holds, once the new one is ready to start; default: no",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the newest checkpoint into eval/manual_<iteration> and end; default: train",
    )
    parser.add_argument(
        "--retry",
        action="store_true",
        help="start although the last three starts failed at the same step with the same settings; default: refuse",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="key=value", help="config keys over the file, e.g. optim.epochs=10; default: none"
    )
    return parser


def parse_arguments(argv: Sequence[str] | None) -> Arguments:
    """Read the command line.

    Raises:
        ConfigError: options contradict each other.
    """
    args = get_args_parser().parse_intermixed_args(argv)
    if args.overwrite and not args.no_resume:
        raise ConfigError("--overwrite removes a run and is only for --no-resume")
    if args.eval_only and args.no_resume:
        raise ConfigError("--eval-only evaluates the run that --no-resume would leave aside; give one of them")
    overrides = list(args.opts)
    if args.output_dir is not None:
        overrides.append(f"train.output_dir={args.output_dir}")
    if args.no_resume:
        overrides.append("train.resume=false")
    return Arguments(
        args.config_file, tuple(overrides), eval_only=args.eval_only, overwrite=args.overwrite, retry=args.retry
    )
