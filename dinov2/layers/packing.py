"""Tokens of several crop sizes in one matrix, so that token-wise layers run once over all of them.

Shapes: B images of one size, N tokens of such an image, D features, T tokens altogether (the sum of B * N).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Layout = tuple[tuple[int, int], ...]  # (images, tokens of an image) of each crop size, in the order they are packed


def pack(tokens: Sequence[Tensor]) -> tuple[Tensor, Layout]:
    """Put token tensors [B, N, D] under one another: [T, D], and the layout that leads back."""
    layout = tuple((x.shape[0], x.shape[1]) for x in tokens)
    if len(tokens) == 1:
        return tokens[0].flatten(0, 1), layout
    return torch.cat([x.flatten(0, 1) for x in tokens]), layout


def split(x: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Cut rows [T, ...] into one view [B * N, ...] for each crop size."""
    if len(layout) == 1:
        return (x,)
    return x.split([num_images * num_tokens for num_images, num_tokens in layout])


def unpack(x: Tensor, layout: Layout) -> list[Tensor]:
    """Return the views [B, N, ...] that `pack` put together."""
    return [rows.unflatten(0, size) for rows, size in zip(split(x, layout), layout, strict=True)]
