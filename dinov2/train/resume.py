"""Where a run starts."""

import logging
from dataclasses import dataclass

from torch import Tensor

from dinov2.checkpoint_format import is_checkpoint_path
from dinov2.configs import Config
from dinov2.distributed import on_every_rank
from dinov2.errors import CheckpointError
from dinov2.fsdp import FSDPCheckpointer, load_full_state_dict
from dinov2.hub.open_weights import open_weights
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2.train")


@dataclass(frozen=True)
class Start:
    """First step to run, and the images that all ranks together have seen before it."""

    step: int = 0
    samples_seen: int = 0


def resume(cfg: Config, checkpointer: FSDPCheckpointer, model: SSLMetaArch) -> Start:
    """Load, in this order: the folder's newest complete checkpoint, `train.resume_path`, `MODEL.WEIGHTS`.

    The first two restore the whole state. `MODEL.WEIGHTS` gives the weights only: of a checkpoint, or a teacher file,
    which student and teacher both start from. What `student.pretrained_weights` names was loaded when the model was
    built, and is overruled by all three.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit.
    """
    if cfg.train.resume and checkpointer.has_checkpoint():
        return _start_after(checkpointer.resume_or_load(""))
    if cfg.train.resume_path:
        return _start_after(checkpointer.load(cfg.train.resume_path))
    if cfg.MODEL.WEIGHTS:
        if is_checkpoint_path(cfg.MODEL.WEIGHTS):
            checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[])
        else:
            _load_teacher_file(cfg.MODEL.WEIGHTS, model)
        logger.info("weights=%s iteration=0", cfg.MODEL.WEIGHTS)
    return Start()


def require_something_to_evaluate(cfg: Config, start: Start) -> None:
    """Raise CheckpointError where the weights are random, because no starting point was found."""
    if start.step == 0 and not (cfg.MODEL.WEIGHTS or cfg.student.pretrained_weights):
        raise CheckpointError(
            f"train.output_dir={cfg.train.output_dir} holds no complete checkpoint to evaluate; "
            f"name the folder of a run, or weights by MODEL.WEIGHTS"
        )


def _start_after(saved: dict) -> Start:
    return Start(step=saved["iteration"] + 1, samples_seen=saved["samples_seen"])


def _load_teacher_file(path: str, model: SSLMetaArch) -> None:
    state = on_every_rank(lambda: _read_teacher_file(path))
    try:
        for networks in (model.student, model.teacher):
            load_full_state_dict(networks, state)
    except CheckpointError as error:
        raise CheckpointError(f"MODEL.WEIGHTS={path}: {error}") from error


def _read_teacher_file(path: str) -> dict[str, Tensor]:
    state = open_weights(path).states.get("teacher")
    if state is None:
        raise CheckpointError(
            f"MODEL.WEIGHTS={path}: has no 'teacher' with tensors of backbone and heads; "
            f"use student.pretrained_weights for a file that holds a backbone only"
        )
    return {name: stored.read() for name, stored in state.items()}
