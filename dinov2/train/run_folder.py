"""The folder of a run: what is in it before the first step, and what `--overwrite` removes."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

from dinov2 import checkpoint_format
from dinov2.configs import Config, write_config
from dinov2.errors import CheckpointError, ConfigError
from dinov2.fsdp.periodic import BEST_NAME
from dinov2.logging.metric_logger import METRICS_NAME
from dinov2.train.stages import Stages

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
    "eval/start/knn_right_images.safetensors",
    "best_teacher.pth",
    "best.json",
    "logs/skipped_images.rank*.txt",
    "tensorboard/events.out.tfevents.*",
    "wandb_run_id.txt",
)
_FOLDERS_MADE_BY_A_RUN = ("eval/*", "eval", "tensorboard")


def make_output_dir(folder: Path) -> None:
    """Make the folder of a run; for rank 0.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error


def require_no_other_run(cfg: Config, *, overwrite: bool) -> None:
    """Check that what the folder and that of the copies hold may be continued or removed; for rank 0.

    Args:
        cfg: config of the run.
        overwrite: a run that is there and not to be resumed may be removed, by `begin_run`.

    Raises:
        ConfigError: a folder cannot be read, holds a run that is neither resumed nor to be overwritten, a run of the
            official code, or copies of another run.
    """
    folder = Path(cfg.train.output_dir)
    copies = _copies_of(cfg)
    try:
        if foreign := checkpoint_format.foreign_rank_files(folder):
            raise ConfigError(
                f"train.output_dir={folder} holds checkpoints of another program ({foreign[0].name}), and a run here "
                f"would replace what it has written; choose another folder"
            )
        filled = {"train.output_dir": folder} if _holds_run(folder) else {}
        if copies is not None and checkpoint_format.find_checkpoints(copies):
            _require_own_copies(cfg, copies)
            filled["checkpointing.copy_to"] = copies
    except OSError as error:
        raise _not_writable(folder, error) from error
    if filled and not cfg.train.resume and not overwrite:
        key, path = next(iter(filled.items()))
        raise ConfigError(
            f"{key}={path} holds a run and --no-resume (train.resume=false) would start anew; "
            f"add --overwrite to remove it, or choose another folder"
        )


def begin_run(cfg: Config, stages: Stages, folder: Path, *, overwrite: bool) -> None:
    """Write the resolved config and the numbers that follow from it; for rank 0, once nothing else can fail.

    Args:
        cfg: config of the run.
        stages: their plans are stored beside it.
        folder: of the run.
        overwrite: first remove the run that is there.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        if overwrite:
            _remove_run(folder, copies=_copies_of(cfg))
        # Starting anew is said for one start; the file, given to a later one, must not refuse to go on.
        write_config(replace(cfg, train=replace(cfg.train, resume=True)), folder / CONFIG_NAME)
        checkpoint_format.write_text(folder / PLAN_NAME, json.dumps(stages.as_plain(), indent=2) + "\n")
    except OSError as error:
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"train.output_dir={folder} cannot be written ({error.strerror}); choose another folder")


def _holds_run(folder: Path) -> bool:
    return (folder / METRICS_NAME).exists() or bool(checkpoint_format.find_checkpoints(folder))


def _copies_of(cfg: Config) -> Path | None:
    return None if cfg.checkpointing.copy_to is None else Path(cfg.checkpointing.copy_to)


def _require_own_copies(cfg: Config, copies: Path) -> None:
    """Raise ConfigError if the newest checkpoint among the copies is one of a run in another folder."""
    name = checkpoint_format.find_checkpoints(copies)[-1]
    try:
        owner = json.loads(checkpoint_format.StoredCheckpoint.open(copies, name).config)["train"]["output_dir"]
    except (CheckpointError, ValueError, KeyError, TypeError):  # damaged, which is said where it is read
        return
    if os.path.realpath(owner) != os.path.realpath(cfg.train.output_dir):
        raise ConfigError(
            f"checkpointing.copy_to={copies} holds copies of the run in {owner}, not of "
            f"train.output_dir={cfg.train.output_dir}; name another folder (to go on from one of them: "
            f"train.resume_path={copies / name})"
        )


def _remove_run(folder: Path, *, copies: Path | None) -> None:
    """Remove what a run writes, but its text logs; manifests first, so that no broken checkpoint is ever valid."""
    for place in filter(None, (folder, copies)):
        for name in checkpoint_format.find_checkpoints(place):
            checkpoint_format.remove_checkpoint(place, name)
        (place / BEST_NAME).unlink(missing_ok=True)
    for pattern in _MADE_BY_A_RUN:
        for path in folder.glob(pattern):
            path.unlink()
    for pattern in _FOLDERS_MADE_BY_A_RUN:
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # it holds files of the user's own
                path.rmdir()
