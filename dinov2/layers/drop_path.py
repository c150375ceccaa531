"""Stochastic depth: leave out a residual branch for some images of a batch.

Shapes: T packed tokens, B images of one crop size, N tokens of such an image, D features.
Source: Huang et al. 2016, arXiv:1603.09382. High rates use DINOv2's speed-up: the branch is computed for the kept
images alone, a fixed number of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2.layers.packing import Layout, split

SUBSET_ABOVE_RATE = 0.1  # the parents' threshold: below it, picking a subset costs more than it saves


def add_residual(
    x: Tensor, branch: Callable[[Tensor, Layout], Tensor], layout: Layout, *, gamma: Tensor | None, drop_rate: float
) -> Tensor:
    """Return x + gamma * branch(x), with the branch left out for a share of the images.

    Args:
        x: packed tokens [T, D]; left unchanged.
        branch: maps packed tokens and their layout to tokens of the same shape.
        layout: images and tokens of each crop size.
        gamma: LayerScale factors [D], or None.
        drop_rate: share of images without the branch, 0 to below 1; the others are scaled up to keep the mean.
    """
    if drop_rate > SUBSET_ABOVE_RATE:
        return _add_to_subset(x, branch, layout, gamma=gamma, drop_rate=drop_rate)
    residual = branch(x, layout)
    if drop_rate > 0:
        residual = residual * _keep_factors(layout, drop_rate=drop_rate, like=residual)
    return x + residual if gamma is None else torch.addcmul(x, residual, gamma)


def _keep_factors(layout: Layout, *, drop_rate: float, like: Tensor) -> Tensor:
    """Draw 0 or 1 / (1 - drop_rate) for each image; [T, 1]."""
    keep = 1 - drop_rate
    factors = [
        like.new_empty(num_images, 1).bernoulli_(keep).div_(keep).expand(num_images, num_tokens).reshape(-1, 1)
        for num_images, num_tokens in layout
    ]
    return torch.cat(factors)


def _add_to_subset(
    x: Tensor, branch: Callable[[Tensor, Layout], Tensor], layout: Layout, *, gamma: Tensor | None, drop_rate: float
) -> Tensor:
    """Compute the branch for B * (1 - drop_rate) images of each crop size, at least one, and scale it by B / kept."""
    kept_layout = tuple((max(int(num_images * (1 - drop_rate)), 1), num_tokens) for num_images, num_tokens in layout)
    rows, start = [], 0
    for (num_images, num_tokens), (num_kept, _) in zip(layout, kept_layout, strict=True):
        kept = torch.randperm(num_images, device=x.device)[:num_kept]
        rows.append((start + kept[:, None] * num_tokens + torch.arange(num_tokens, device=x.device)).flatten())
        start += num_images * num_tokens
    residual = branch(x.index_select(0, torch.cat(rows)), kept_layout)
    if gamma is not None:
        residual = residual * gamma
    parts = split(residual.to(x.dtype), kept_layout)
    out = x.clone()
    for index, part, (num_images, _), (num_kept, _) in zip(rows, parts, layout, kept_layout, strict=True):
        out.index_add_(0, index, part, alpha=num_images / num_kept)
    return out
