"""Sharding of modules over ranks (FSDP2) and the checkpoints of sharded training."""

from dinov2.fsdp.checkpointer import FSDPCheckpointer
from dinov2.fsdp.gradients import clip_grad_norm_, grad_norms
from dinov2.fsdp.periodic import PeriodicCheckpointer
from dinov2.fsdp.rng import RngState
from dinov2.fsdp.wrap import (
    copy_local_state,
    full_state_dict,
    gathered,
    load_full_state_dict,
    local_tensor_pairs,
    local_tensors,
    reshard,
    shard,
)

__all__ = [
    "FSDPCheckpointer",
    "PeriodicCheckpointer",
    "RngState",
    "clip_grad_norm_",
    "copy_local_state",
    "full_state_dict",
    "gathered",
    "grad_norms",
    "load_full_state_dict",
    "local_tensor_pairs",
    "local_tensors",
    "reshard",
    "shard",
]
