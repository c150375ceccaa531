"""Running statistics of batch normalisation: one set for all ranks, which the teacher takes over from the student.

Networks without batch normalisation have none, and nothing is done for them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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


def keep_frozen_statistics(network: nn.Module) -> None:
    """Let layers whose scale and shift are frozen use the statistics they have, also in training mode."""
    for layer in _layers(network):
        params = list(layer.parameters())
        if params and not any(param.requires_grad for param in params):
            layer.eval()


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """While entered, a network in training mode is passed through without gradients, and its statistics stay.

    All else that training mode does to it, such as stochastic depth, goes on, so that what follows it gets used to it.
    """
    learning = [layer for layer in _layers(network) if layer.training]
    for layer in learning:
        layer.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in learning:
            layer.train()


def _statistics(network: nn.Module) -> list[Tensor]:
    return [buffer for layer in _layers(network) for buffer in layer.buffers()]


def _layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, _KINDS)]
