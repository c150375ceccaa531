"""The teacher of a student with low-rank updates: a plain network that follows the student's merged weights."""

import torch
from torch import nn

from dinov2.fsdp import gathered, local_tensor_pairs, local_tensors
from dinov2.layers.lora import low_rank_updates, update_parameters


@torch.no_grad()
def move_towards(teacher: nn.Module, student: nn.Module, *, share: float) -> None:
    """Move a network's parameters a part of the way to those of another, in place, low-rank updates merged.

    With an update, the student's weight is W + scale * B A. Each rank moves the rows it holds, for which it needs its
    rows of B and the whole of A; no merged weight is ever formed.

    Args:
        teacher: plain network, sharded as the student is, or both not sharded.
        student: network of the same parameters, and those of its low-rank updates.
        share: of the way, 0..1.

    Cost: one all-gather of r * inputs floats for each layer with an update, if the networks are sharded.
    """
    targets, sources = local_tensor_pairs(teacher, student, source_only=update_parameters(student))
    torch._foreach_lerp_(targets, sources, share)
    for name, layer in low_rank_updates(student):
        (weight,) = local_tensors([teacher.get_parameter(f"{name}.weight")])
        (rows,) = local_tensors([layer.lora_b])
        weight.addmm_(rows, gathered(layer.lora_a), alpha=share * layer.lora_scale)
