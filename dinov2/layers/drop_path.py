"""Stochastic depth: leave out a residual branch for some images of a batch.

Shapes: T packed tokens, B images of one crop size, N tokens of such an image, D features.
Source: Huang et al. 2016, arXiv:1603.09382. High rates use DINOv2's speed-up: the branch is computed for the kept
images alone, a fixed number of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.layers.packing import Layout, unpack

SUBSET_ABOVE_RATE = 0.1  # the parents' threshold: below it, picking a subset costs more than it saves


def add_residual(x: Tensor, branch: Callable[[Tensor, Layout], Tensor], layout: Layout, *, drop_rate: float) -> Tensor:
    """Return x + branch(x), with the branch left out for a share of the images.

    Args:
        x: packed tokens [T, D]; left unchanged.
        branch: maps packed tokens and their layout to tokens of the same shape.
        layout: images and tokens of each crop size.
        drop_rate: share of images without the branch, 0 to below 1; the others are scaled up to keep the mean.
    """
    if drop_rate > SUBSET_ABOVE_RATE:
        subset = _draw_subset(layout, drop_rate=drop_rate, device=x.device)
        taken, x = _TakeImages.apply(x, subset)
        return _AddImages.apply(x, branch(taken, subset.kept_layout).to(x.dtype), subset)
    residual = branch(x, layout)
    if drop_rate > 0:
        residual = residual * _keep_factors(layout, drop_rate=drop_rate, like=residual)
    return x + residual


def _keep_factors(layout: Layout, *, drop_rate: float, like: Tensor) -> Tensor:
    """Draw 0 or 1 / (1 - drop_rate) for each image; [T, 1]."""
    keep = 1 - drop_rate
    factors = [
        like.new_empty(num_images, 1).bernoulli_(keep).div_(keep).expand(num_images, num_tokens).reshape(-1, 1)
        for num_images, num_tokens in layout
    ]
    return torch.cat(factors)


class _Subset(NamedTuple):
    """Images that keep a branch: their numbers within each crop size, and the layouts of all and of the kept."""

    kept: tuple[Tensor, ...]
    layout: Layout
    kept_layout: Layout

    def take(self, x: Tensor) -> Tensor:
        """Copy the kept images of packed tokens."""
        out = x.new_empty(sum(num_images * num_tokens for num_images, num_tokens in self.kept_layout), x.shape[1])
        for images, into, kept in zip(unpack(x, self.layout), unpack(out, self.kept_layout), self.kept, strict=True):
            torch.index_select(images, 0, kept, out=into)
        return out

    def add_(self, x: Tensor, taken: Tensor, scales: tuple[float, ...]) -> Tensor:
        """Add to the kept images, changed in place, their rows times the scale of their crop size."""
        parts = zip(unpack(x, self.layout), unpack(taken, self.kept_layout), self.kept, scales, strict=True)
        for images, addend, kept, scale in parts:
            images.index_add_(0, kept, addend, alpha=scale)
        return x

    def scales(self) -> tuple[float, ...]:
        """Return the images over the kept images of each crop size."""
        return tuple(b / k for (b, _), (k, _) in zip(self.layout, self.kept_layout, strict=True))


def _draw_subset(layout: Layout, *, drop_rate: float, device: torch.device) -> _Subset:
    kept_layout = tuple((max(int(b * (1 - drop_rate)), 1), n) for b, n in layout)
    kept = tuple(torch.randperm(b, device=device)[:k] for (b, _), (k, _) in zip(layout, kept_layout, strict=True))
    return _Subset(kept, layout, kept_layout)


class _TakeImages(torch.autograd.Function):
    """Return the kept images, and x itself, so that one gradient is added into the other without a dense copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, subset: _Subset) -> tuple[Tensor, Tensor]:
        ctx.subset = subset
        return subset.take(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_taken: Tensor, grad_x: Tensor) -> tuple[Tensor, None]:
        return ctx.subset.add_(grad_x.clone(), grad_taken, (1.0,) * len(ctx.subset.kept)), None


class _AddImages(torch.autograd.Function):
    """Return x with the scaled residual added to the kept images."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, subset: _Subset) -> Tensor:
        ctx.subset = subset
        return subset.add_(x.clone(), residual, subset.scales())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        subset: _Subset = ctx.subset
        taken = subset.take(grad)
        for rows, scale in zip(unpack(taken, subset.kept_layout), subset.scales(), strict=True):
            rows.mul_(scale)
        return grad, taken, None
