"""Batch normalisation with statistics over all ranks, on GPUs and, other than PyTorch's, on CPUs.

The one layer that knows of ranks, as PyTorch's own does: its statistics are part of its formula.
Shapes: B images of this rank, C channels.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov2.layers.batch_norm import normalize_batch


class SyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` that also takes CPU tensors, and parameters of another type than its statistics.

    With one rank it is plain batch normalisation.

    Every rank must call it equally often in training mode, because it communicates then.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return normalised features of the same shape, [B, C, ...]."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return normalize_batch(x, self)
        if x.device.type != "cpu" and self.weight.dtype == self.running_mean.dtype:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        return self._normalize_over_ranks(x.float()).to(x.dtype)

    def _normalize_over_ranks(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        count = x.new_tensor([x.numel() / x.shape[1]])
        count, total = _SumOverRanks.apply(torch.cat([count, x.sum(axes)])).tensor_split([1])
        shape = (1, -1, *[1] * (x.ndim - 2))
        centred = x - (total / count).view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / count  # [C]
        with torch.no_grad():
            self.running_mean.lerp_((total / count).to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale.view(shape) + self.bias.view(shape)


class _SumOverRanks(torch.autograd.Function):
    """Sum a tensor over all ranks; each rank's gradient reaches every rank's addend."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad
