"""Gradient norms of sharded parameters, and clipping by them.

Each rank sums the squares of the rows it holds, every part weighted by one over the ranks that hold it too; one
all-reduce makes the same norm everywhere, whatever the sharding.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_sum, get_device
from dinov2.fsdp.layout import layout_of, local_part

_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_


def grad_norms(groups: Sequence[Iterable[Tensor]]) -> Tensor:
    """Compute the L2 norm over all ranks of each group's gradients.

    Args:
        groups: lists of parameters; those without a gradient count as zero.

    Returns:
        One norm per group, float32, a plain tensor equal on all ranks; not waited for.

    Cost: one all-reduce of as many floats as there are groups.
    """
    squares = [_local_square_sum(list(params)) for params in groups]
    return all_reduce_sum(torch.stack(squares)).sqrt()


def clip_grad_norm_(params: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients in place so that their norm over all ranks is at most `max_norm`.

    Args:
        params: parameters, sharded or plain; their gradients are changed in place.
        max_norm: > 0; None or inf measures only.

    Returns:
        The norm before clipping, a 0-dim plain float32 tensor equal on all ranks. It is inf or NaN if a gradient is;
        the gradients are useless then and the caller drops the update.
    """
    params = list(params)
    norm = grad_norms([params])[0]
    gradients = [local_part(param.grad) for param in params if param.grad is not None]
    if gradients and max_norm is not None and not math.isinf(max_norm):
        torch._foreach_mul_(gradients, (max_norm / (norm + _EPSILON)).clamp(max=1.0))
    return norm


@torch.no_grad()
def _local_square_sum(params: list[Tensor]) -> Tensor:
    """Sum of squares of this rank's gradient rows; over all ranks these sums add up to the whole square norm."""
    with_gradient = [param for param in params if param.grad is not None]
    if not with_gradient:
        return torch.zeros((), device=params[0].device if params else get_device())
    norms = torch._foreach_norm([local_part(param.grad) for param in with_gradient], 2, dtype=torch.float32)
    weights = [1 / layout_of(param).num_replicas for param in with_gradient]
    squares = torch.stack(norms).square()
    if len(set(weights)) == 1:
        return squares.sum() * weights[0]
    return squares.dot(torch.tensor(weights).to(squares.device, non_blocking=True))
