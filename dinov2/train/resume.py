"""Where a run starts."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2.checkpoint_format import StoredCheckpoint, is_checkpoint_path
from dinov2.configs import Config
from dinov2.configs.student_section import StudentConfig
from dinov2.distributed import on_main_first
from dinov2.errors import CheckpointError, OtherParametersError
from dinov2.fsdp import PeriodicCheckpointer
from dinov2.hub.open_checkpoint import require_own_checkpoint
from dinov2.hub.stored_tensor import State
from dinov2.hub.weights import plan_head, plan_weights
from dinov2.train.frozen_weights import fill_frozen_networks
from dinov2.train.saved_run import open_resume_path
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2.train")


@dataclass(frozen=True)
class Start:
    """First step to run, and the images that all ranks together have seen before it."""

    step: int = 0
    samples_seen: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)  # of the last evaluation before it
    saved: StoredCheckpoint | None = None  # what the run goes on from; None: it is new
    drawn_heads: tuple[str, ...] = ()  # that no file gave and that are random numbers so far


def resume(cfg: Config, saver: PeriodicCheckpointer, model: SSLMetaArch) -> Start:
    """Fill the model from the first of these: the folder's newest complete checkpoint, `train.resume_path`,
    `MODEL.WEIGHTS`, `student.pretrained_weights`, random numbers; what is overruled is not read.

    The first two restore the whole state. `MODEL.WEIGHTS` gives the weights of all networks: of a checkpoint, or of a
    teacher file, from which student and teacher both start. `student.pretrained_weights` gives the backbone to both,
    and those heads that the file has and that fit.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit.
    """
    try:
        start = _fill(cfg, saver, model)
    except OtherParametersError as error:
        raise CheckpointError(
            f"{error}; a run goes on with the settings of student, heads, lora and optim.freeze that it was saved "
            f"with; to start another from its weights, name the checkpoint by student.pretrained_weights"
        ) from error
    fill_frozen_networks(cfg, model, saved=start.saved)
    return start


def _fill(cfg: Config, saver: PeriodicCheckpointer, model: SSLMetaArch) -> Start:
    checkpointer = saver.checkpointer
    if cfg.train.resume and checkpointer.has_checkpoint():
        start = _start_after(checkpointer.resume_or_load(""), checkpointer.loaded)
        if start.saved.folder == Path(checkpointer.save_dir):
            saver.last_saved = start.step - 1
        return start
    if cfg.train.resume_path:
        on_main_first(open_resume_path, cfg.train.resume_path)
        return _start_after(checkpointer.load(cfg.train.resume_path), checkpointer.loaded)
    weights = cfg.MODEL.WEIGHTS
    if weights and is_checkpoint_path(weights):
        on_main_first(require_own_checkpoint, Path(weights))
        checkpointer.load(weights, checkpointables=[])
        model.anchoring.copy_from(model.teacher.backbone)
        logger.info("weights=%s iteration=0", weights)
        return Start()
    given: dict[str, State] = {}
    if weights:
        on_main_first(lambda: given.update(_all_networks(model, weights, cfg.student)))
    elif cfg.student.pretrained_weights:
        on_main_first(lambda: given.update(_backbone_and_fitting_heads(model, cfg.student)))
    model.init_weights(cfg.train.seed, given=given)
    heads = [name for name in model.student if name != "backbone"]
    return Start(drawn_heads=on_main_first(lambda: tuple(name for name in heads if name not in given)))


def require_something_to_evaluate(cfg: Config, start: Start) -> None:
    """Raise CheckpointError where the weights are random, because no starting point was found."""
    if start.step == 0 and not (cfg.MODEL.WEIGHTS or cfg.student.pretrained_weights):
        raise CheckpointError(
            f"train.output_dir={cfg.train.output_dir} holds no complete checkpoint to evaluate; "
            f"name the folder of a run, or weights by MODEL.WEIGHTS"
        )


def _start_after(extra: Mapping[str, Any], saved: StoredCheckpoint) -> Start:
    return Start(
        step=extra["iteration"] + 1,
        samples_seen=extra["samples_seen"],
        scores=extra.get("metrics", {}),
        saved=saved,
    )


def _backbone_and_fitting_heads(model: SSLMetaArch, student: StudentConfig) -> dict[str, State]:
    """Plan `student.pretrained_weights`."""
    given, unfit = _plan(model, student.pretrained_weights, allow_partial=student.allow_partial_weights)
    for name, reason in unfit.items():
        logger.info("%s starts from random numbers: %s", name, reason)
    return given


def _all_networks(model: SSLMetaArch, weights: str, student: StudentConfig) -> dict[str, State]:
    """Plan `MODEL.WEIGHTS`, which must have the backbone and all heads."""
    given, unfit = _plan(model, weights, allow_partial=student.allow_partial_weights)
    for name, reason in unfit.items():
        raise CheckpointError(
            f"MODEL.WEIGHTS={weights}: {name} cannot be loaded, {reason}; "
            f"use student.pretrained_weights to start from the backbone"
        )
    return given


def _plan(model: SSLMetaArch, weights: str, *, allow_partial: bool) -> tuple[dict[str, State], dict[str, str]]:
    """Return tensors for the student's modules by name, and for heads that stay as they are, the reason."""
    # The teacher's backbone has the names and shapes of the student's, without low-rank updates.
    plan = plan_weights(model.teacher["backbone"], weights, allow_partial=allow_partial)
    logger.info("%s", plan.report)
    given, unfit = {"backbone": plan.state}, {}
    for name in [name for name in model.student if name != "backbone"]:
        fit = plan_head(model.student[name], plan.heads[name]) if name in plan.heads else "the file has none"
        (unfit if isinstance(fit, str) else given)[name] = fit
    return given, unfit
