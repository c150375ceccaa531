"""The folder of a run: what is in it before the first step, and what `--overwrite` removes."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from dinov2 import checkpoint_format
from dinov2.configs import Config, write_config
from dinov2.errors import ConfigError
from dinov2.train.build import RunPlan

CONFIG_NAME = "config.yaml"
PLAN_NAME = "run_plan.json"
CURVES_NAME = "training_curves.png"
METRICS_NAME = "training_metrics.json"
_MADE_BY_A_RUN = ("model_*.rank_*.pth*", "last_checkpoint.rank_*", METRICS_NAME, PLAN_NAME, CURVES_NAME, CONFIG_NAME)
_FOLDERS_MADE_BY_A_RUN = ("eval", "logs", "tensorboard")


def prepare_output_dir(cfg: Config, *, overwrite: bool) -> None:
    """Make the folder and write the resolved config into it; for rank 0.

    Args:
        cfg: config of the run.
        overwrite: remove the run that is there, where it is not to be resumed.

    Raises:
        ConfigError: the folder cannot be written, or holds a run that is neither resumed nor to be overwritten.
    """
    folder = Path(cfg.train.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not cfg.train.resume and _holds_run(folder):
            if not overwrite:
                raise ConfigError(
                    f"train.output_dir={folder} holds a run and --no-resume (train.resume=false) would start anew; "
                    f"add --overwrite to remove it, or choose another folder"
                )
            _remove_run(folder)
        write_config(cfg, folder / CONFIG_NAME)
    except OSError as error:
        raise ConfigError(
            f"train.output_dir={folder} cannot be written ({error.strerror}); choose another folder"
        ) from error


def write_plan(plan: RunPlan, folder: Path) -> None:
    """Store the numbers that follow from the config beside it; for rank 0."""
    checkpoint_format.write_text(folder / PLAN_NAME, json.dumps(asdict(plan), indent=2) + "\n")


def _holds_run(folder: Path) -> bool:
    return (folder / METRICS_NAME).exists() or bool(checkpoint_format.find_checkpoints(folder))


def _remove_run(folder: Path) -> None:
    """Remove what a run writes, and nothing else; manifests first, so that no broken checkpoint is ever valid."""
    for name in checkpoint_format.find_checkpoints(folder):
        checkpoint_format.remove_checkpoint(folder, name)
    for pattern in _MADE_BY_A_RUN:
        for path in folder.glob(pattern):
            path.unlink()
    for name in _FOLDERS_MADE_BY_A_RUN:
        shutil.rmtree(folder / name, ignore_errors=True)
