"""Running statistics of batch normalisation: one set for all ranks, which the teacher takes over from the student.

Networks without batch normalisation have none, and nothing is done for them.
"""

import torch
from torch import Tensor, nn

from dinov2.distributed import all_reduce_mean

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Replace running means and variances, in place, by their averages over ranks. Cost: one all-reduce of them all.

    A rank's own statistics describe its part of the batch. The ranks share one teacher, so they need one set.
    """
    averaged = [tensor for tensor in _statistics(network) if tensor.is_floating_point()]
    if averaged:
        flat = all_reduce_mean(torch.cat([tensor.flatten() for tensor in averaged]))
        for tensor, values in zip(averaged, flat.split([tensor.numel() for tensor in averaged]), strict=True):
            tensor.copy_(values.view_as(tensor))


@torch.no_grad()
def copy_statistics(target: nn.Module, source: nn.Module) -> None:
    """Overwrite a network's running means, variances and counts of batches by those of an equal one."""
    for own, other in zip(_statistics(target), _statistics(source), strict=True):
        own.copy_(other)


def _statistics(network: nn.Module) -> list[Tensor]:
    return [buffer for module in network.modules() if isinstance(module, _KINDS) for buffer in module.buffers()]
