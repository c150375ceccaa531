"""What a run that goes on takes over from the one that was saved, and what is no longer as it was."""

import json
import logging
from pathlib import Path

from dinov2.checkpoint_format import (
    DamagedCheckpointError,
    Manifest,
    StoredCheckpoint,
    find_checkpoints,
    open_checkpoint,
    split_path,
)
from dinov2.configs import Config, to_dict
from dinov2.configs.changes import changed_settings
from dinov2.distributed import on_main_first
from dinov2.errors import CheckpointError
from dinov2.fsdp import FSDPCheckpointer
from dinov2.hub.open_checkpoint import require_own_checkpoint
from dinov2.train.build import RunPlan
from dinov2.train.run_folder import PLAN_NAME
from dinov2.train.stages import SavedBatch

logger = logging.getLogger("dinov2.train")


def saved_batch(cfg: Config, checkpointer: FSDPCheckpointer) -> SavedBatch | None:
    """Look up where the run stands that `resume` will continue, and its images of one step; called by all ranks.

    Returns:
        None where nothing is continued.

    Raises:
        CheckpointError: `train.resume_path` names no complete checkpoint.
    """
    manifest = checkpointer.newest_manifest() if cfg.train.resume else None
    folder = Path(cfg.train.output_dir)
    if manifest is None and cfg.train.resume_path:
        folder = split_path(cfg.train.resume_path)[0]
        manifest = on_main_first(open_resume_path, cfg.train.resume_path)
    if manifest is None:
        return None
    return SavedBatch(manifest.iteration, on_main_first(_global_batch, manifest, folder))


def open_resume_path(path: str) -> Manifest:
    """Read the manifest of the checkpoint that `train.resume_path` names; for rank 0.

    Raises:
        CheckpointError: it is no complete checkpoint of a run.
    """
    require_own_checkpoint(Path(path))
    folder, name = split_path(path)
    try:
        return open_checkpoint(folder, name)
    except DamagedCheckpointError as error:
        others = [other for other in find_checkpoints(folder) if other != name]
        instead = f"{folder} also has {others[-1]}" if others else "name another, such as outputs/run1/model_0003749"
        raise CheckpointError(f"train.resume_path={path}: {error}; {instead}") from error


def has_same_evaluations(cfg: Config, saved: StoredCheckpoint | None) -> bool:
    """Say whether the run that was saved was evaluated as this one is going to be, so that it has the same scores."""
    try:
        return saved is not None and json.loads(saved.config)["evaluation"] == to_dict(cfg)["evaluation"]
    except (ValueError, KeyError, TypeError):  # saved by other code than ours, without its settings
        return False


def report_changes(cfg: Config, plan: RunPlan, saved: StoredCheckpoint | None, *, world_size: int) -> None:
    """Warn of each setting that alters results and is not the one that the checkpoint was saved with.

    Args:
        cfg: config of this run.
        plan: its numbers.
        saved: what it goes on from; None: it is new.
        world_size: processes of this run.
    """
    if saved is None:
        return
    manifest = saved.manifest
    try:
        lines = changed_settings(json.loads(saved.config), to_dict(cfg))
    except ValueError:  # saved by other code than ours, without its settings
        lines = []
    if manifest.global_batch_size not in (None, plan.global_batch_size):
        lines.append(f"train.global_batch_size {manifest.global_batch_size} -> {plan.global_batch_size}")
    for line in lines:
        logger.warning("changed since %s was saved: %s", saved.name, line)
    if manifest.world_size == world_size:
        return
    logger.info("%s was saved by %d processes, %d go on", saved.name, manifest.world_size, world_size)
    if cfg.dino.koleo_loss_weight and not cfg.dino.koleo_loss_distributed:
        logger.warning(
            "dino.koleo_loss_distributed=false: each process compares its own images, now %d instead of %d at once, so "
            "that KoLeo's loss goes on at another height",
            plan.batch_size_per_rank,
            plan.images_per_pass // manifest.world_size,
        )


def _global_batch(manifest: Manifest, folder: Path) -> int | None:
    """Read the global batch from the manifest, or from the plan beside a checkpoint of format version 1."""
    if manifest.global_batch_size is not None:
        return manifest.global_batch_size
    try:
        return int(json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))["global_batch_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
