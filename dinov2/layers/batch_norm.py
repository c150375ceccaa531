"""Batch normalisation whose scale and shift may come in another type than its statistics.

FSDP's mixed precision hands parameters to a forward pass in bfloat16 or float16; buffers stay float32, and PyTorch
accepts statistics and parameters of one type only.
Shapes: B images of this rank, C channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def normalize_batch(x: Tensor, layer: nn.BatchNorm2d | nn.SyncBatchNorm) -> Tensor:
    """Apply a layer to this rank's features [B, C, ...]; in training mode its statistics are changed in place."""
    if layer.training:
        layer.num_batches_tracked.add_(1)
    dtype = layer.running_mean.dtype
    return F.batch_norm(
        x,
        layer.running_mean,
        layer.running_var,
        layer.weight.to(dtype),
        layer.bias.to(dtype),
        training=layer.training,
        momentum=layer.momentum,
        eps=layer.eps,
    )


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with its default settings, for parameters of any floating-point type."""

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised features of the same shape, [B, C, height, width]."""
        return normalize_batch(x, self)
