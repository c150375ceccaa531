"""The folder of a run: what is in it before the first step, and what `--overwrite` removes."""

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from dinov2 import checkpoint_format
from dinov2.configs import Config, write_config
from dinov2.errors import ConfigError
from dinov2.logging.metric_logger import METRICS_NAME
from dinov2.train.build import RunPlan

CONFIG_NAME = "config.yaml"
PLAN_NAME = "run_plan.json"
CURVES_NAME = "training_curves.png"
_MADE_BY_A_RUN = (
    "model_*.rank_*.pth*",
    "last_checkpoint.rank_*",
    METRICS_NAME,
    PLAN_NAME,
    CURVES_NAME,
    CONFIG_NAME,
    "eval/*/teacher_checkpoint.pth",
    "eval/*/results_eval_knn.json",
    "eval/*/results_eval_health.json",
    "eval/start/health_features.safetensors",
    "logs/skipped_images.rank*.txt",
    "tensorboard/events.out.tfevents.*",
    "wandb_run_id.txt",
)
_FOLDERS_MADE_BY_A_RUN = ("eval/*", "eval", "tensorboard")


def prepare_output_dir(cfg: Config, *, overwrite: bool) -> None:
    """Make the folder; for rank 0.

    Args:
        cfg: config of the run.
        overwrite: a run that is there and not to be resumed may be removed, by `begin_run`.

    Raises:
        ConfigError: the folder cannot be made, or holds a run that is neither resumed nor to be overwritten.
    """
    folder = Path(cfg.train.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        holds_run = _holds_run(folder)
    except OSError as error:
        raise _not_writable(folder, error) from error
    if holds_run and not cfg.train.resume and not overwrite:
        raise ConfigError(
            f"train.output_dir={folder} holds a run and --no-resume (train.resume=false) would start anew; "
            f"add --overwrite to remove it, or choose another folder"
        )


def begin_run(cfg: Config, plan: RunPlan, folder: Path, *, overwrite: bool) -> None:
    """Write the resolved config and the numbers that follow from it; for rank 0, once nothing else can fail.

    Args:
        cfg: config of the run.
        plan: stored beside it.
        folder: of the run.
        overwrite: first remove the run that is there.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        if overwrite:
            _remove_run(folder)
        # Starting anew is said for one start; the file, given to a later one, must not refuse to go on.
        write_config(replace(cfg, train=replace(cfg.train, resume=True)), folder / CONFIG_NAME)
        checkpoint_format.write_text(folder / PLAN_NAME, json.dumps(asdict(plan), indent=2) + "\n")
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"train.output_dir={folder} cannot be written ({error.strerror}); choose another folder")


def _holds_run(folder: Path) -> bool:
    return (folder / METRICS_NAME).exists() or bool(checkpoint_format.find_checkpoints(folder))


def _remove_run(folder: Path) -> None:
    """Remove what a run writes, but its text logs; manifests first, so that no broken checkpoint is ever valid."""
    for name in checkpoint_format.find_checkpoints(folder):
        checkpoint_format.remove_checkpoint(folder, name)
    for pattern in _MADE_BY_A_RUN:
        for path in folder.glob(pattern):
            path.unlink()
    for pattern in _FOLDERS_MADE_BY_A_RUN:
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # it holds files of the user's own
                path.rmdir()
