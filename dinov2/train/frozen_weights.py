"""Where the frozen networks of a run get their weights that are neither the teacher's nor in its checkpoint."""

import logging

from dinov2.checkpoint_format import StoredCheckpoint
from dinov2.configs import Config
from dinov2.configs.adaptation_sections import START_WEIGHTS
from dinov2.distributed import on_main_first
from dinov2.errors import CheckpointError
from dinov2.fsdp import copy_local_state, load_full_state_dict
from dinov2.hub.stored_tensor import State
from dinov2.hub.weights import plan_weights
from dinov2.train.anchor import GRAM_TEACHER, START
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2.train")


def fill_frozen_networks(cfg: Config, model: SSLMetaArch, *, saved: StoredCheckpoint | None) -> None:
    """Fill what the start of the run has not filled yet; all ranks call it once student and teacher are filled.

    In a new run the frozen networks are copies of the teacher already, and only the file that `gram.ckpt` names is
    read. In one that goes on they come from its checkpoint, where they are bit for bit whatever has become of files;
    those that it lacks, because the run was not anchored so far, are read anew.

    Args:
        cfg: config of the run.
        model: its frozen networks are changed in place.
        saved: the checkpoint that was loaded; None: a new run.

    Raises:
        CheckpointError: a file is missing, damaged, or not a whole backbone of this kind; or a run that goes on would
            have to be held near its start, and no file of the start is named.
    """
    networks = model.anchoring.networks
    for name in networks:
        if saved is not None and any(key.startswith(f"anchoring.networks.{name}.") for key in saved.model):
            continue
        source = cfg.gram.ckpt if name == GRAM_TEACHER else START_WEIGHTS
        if source == START_WEIGHTS and saved is not None:
            source = _weights_of_the_start(cfg, saved)
        if saved is not None:
            copy_local_state(networks[name], model.teacher.backbone)
        if source not in (None, START_WEIGHTS):
            _read(model, name, source)


def _weights_of_the_start(cfg: Config, saved: StoredCheckpoint) -> str:
    """Name the file that a run which goes on once started from."""
    named = cfg.MODEL.WEIGHTS or cfg.student.pretrained_weights
    if not named:
        raise CheckpointError(
            f"{saved.folder / saved.name} was saved by a run that was not held near its start, and does not hold it; "
            f"name the weights of the start by student.pretrained_weights"
        )
    return named


def _read(model: SSLMetaArch, name: str, weights: str) -> None:
    """Fill a frozen network from a file; what files may lack, such as the mask token, stays the teacher's."""
    network = model.anchoring.networks[name]
    state: State = {}

    def plan() -> None:
        planned = plan_weights(network, weights)
        logger.info("%s: %s", {START: "the start", GRAM_TEACHER: "the Gram teacher"}[name], planned.report)
        state.update(planned.state)

    on_main_first(plan)
    load_full_state_dict(network, state or None, read=lambda stored: stored.read(), is_partial=True)
