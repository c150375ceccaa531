"""How the memory of a training step adds up on one device, when the networks are split over processes or not."""

from dataclasses import dataclass

import torch

from dinov2.configs import Config
from dinov2.run.dry_step import StepCost, dry_step

# Context of CUDA, workspaces of its libraries, and room for blocks of scores: an allowance, not measured.
GPU_ALLOWANCE_BYTES = int(1.5 * 2**30)
RANKS_OF_A_NODE = 8  # assumed for HYBRID_SHARD where hybrid_shard_size does not say


@dataclass(frozen=True)
class Target:
    """What the run is to run on."""

    device_type: str  # cpu or cuda
    dtype: torch.dtype  # of the forward pass
    num_ranks: int
    overhead: int  # bytes of a process before it trains: program, libraries, context


def memory_of(cost: StepCost, cfg: Config, target: Target) -> dict[str, int]:
    """Split the bytes of one process into named parts; their sum is the peak.

    With several processes, gradients are averaged and split block by block; SHARD_GRAD_OP and NO_SHARD keep gathered
    weights of all networks beside the parts that a process holds, FULL_SHARD and HYBRID_SHARD those of two blocks.
    Checkpoints are written from a copy in the memory of the host, which on a CPU is the device's.
    """
    parts = {"program and libraries": target.overhead}
    if target.device_type == "cpu":
        parts["copy for checkpoints"] = -(-cost.saved // target.num_ranks)
    if target.num_ranks == 1:
        return parts | {
            "student": cost.student,
            "teacher": cost.teacher,
            "frozen networks": cost.frozen,
            "optimiser's averages": cost.averages,
            "gradients, activations": cost.working,
        }
    strategy = cfg.compute_precision.sharding_strategy
    split = split_over(cfg, num_ranks=target.num_ranks)
    size = target.dtype.itemsize
    gathered = 2 * cost.largest_unit * size
    if strategy in ("NO_SHARD", "SHARD_GRAD_OP"):
        gathered = (cost.num_student + cost.num_teacher + cost.num_frozen) * size
    return parts | {
        "student": -(-cost.student // split),
        "teacher": -(-cost.teacher // split),
        "frozen networks": -(-cost.frozen // split),
        "optimiser's averages": -(-cost.averages // split),
        "gradients": -(-cost.gradients // split) + 2 * cost.largest_unit * 4,  # two parts are on their way
        "gathered weights": gathered,
        "activations": cost.working,
    }


def split_over(cfg: Config, *, num_ranks: int) -> int:
    """Return over how many processes each network is split."""
    precision = cfg.compute_precision
    if precision.sharding_strategy == "NO_SHARD":
        return 1
    if precision.sharding_strategy == "HYBRID_SHARD":
        return min(num_ranks, precision.hybrid_shard_size or RANKS_OF_A_NODE)
    return num_ranks


def cost_of(cfg: Config, target: Target, *, batch_size: int, freeze_backbone: bool = False) -> StepCost:
    """Take a dry step as a process of the target would."""
    return dry_step(
        cfg,
        batch_size=batch_size,
        dtype=target.dtype,
        freeze_backbone=freeze_backbone,
        is_sharded=target.num_ranks > 1,
    )
