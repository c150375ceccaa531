"""Train: self-supervised training of student and EMA teacher, as library module and as program.

torchrun --nproc_per_node=4 dinov2/train/train.py --config-file F --output-dir D [key=value ...]
"""

import argparse
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov2 import distributed
from dinov2.configs import Config, config_digest, load_config, require_train_dataset, write_config
from dinov2.data import make_data_loader, make_dataset
from dinov2.distributed import Environment, on_main_first
from dinov2.errors import ConfigError
from dinov2.fsdp import FSDPCheckpointer, PeriodicCheckpointer, RngState
from dinov2.logging import MetricLogger, plot_training_curves, run_program, setup_logging
from dinov2.train.build import (
    RunPlan,
    build_augmentation,
    build_grad_scaler,
    build_model,
    build_optimizer,
    plan_run,
)
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.param_groups import apply_schedules
from dinov2.train.schedules import Schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.stop_signal import StopSignal
from dinov2.train.update import CancelledSteps, agree, clip_gradients

logger = logging.getLogger("dinov2.train")


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train DINOv2 on your own images. Start it with python for one process, torchrun for several.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config-file", "--config", metavar="F", help="YAML file over the defaults")
    parser.add_argument("--output-dir", metavar="D", help="folder of the run; stands for train.output_dir")
    parser.add_argument("--no-resume", action="store_true", help="start anew instead of from the newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="with --no-resume: remove the run in the folder")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the newest checkpoint and end")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config keys over the file, e.g. optim.epochs=10")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code (0 done or stopped on request, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_args(argv)
    if args.overwrite and not args.no_resume:
        raise ConfigError("--overwrite removes a run and is only for --no-resume")
    overrides = list(args.opts)
    if args.output_dir is not None:
        overrides.append(f"train.output_dir={args.output_dir}")
    if args.no_resume:
        overrides.append("train.resume=false")
    cfg = load_config(args.config_file, overrides)
    require_train_dataset(cfg)
    env = distributed.init(cfg.compute_precision.device)
    try:
        output_dir = Path(cfg.train.output_dir)
        on_main_first(prepare_output_dir, cfg, args.overwrite)
        setup_logging(output_dir, rank=env.rank)
        for note in cfg.notes:
            logger.info("%s", note)
        return do_train(cfg, env, output_dir=output_dir, eval_only=args.eval_only)
    finally:
        distributed.shutdown()


def do_train(cfg: Config, env: Environment, *, output_dir: Path, eval_only: bool = False) -> int:
    """Build, resume, loop."""
    run = Run(cfg, env, output_dir=output_dir)
    start = run.resume()
    if eval_only:
        run.evaluate(run.model, f"manual_{start - 1}")
        return 0
    if start == 0 and cfg.evaluation.at_start:
        run.evaluate(run.model, "start")
    ...


if __name__ == "__main__":
    sys.exit(main())
