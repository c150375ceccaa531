"""Learned positions of a grid of patches, carried over to other grids."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_positions(
    pos_embed: Tensor, rows: int, columns: int, *, offset: float = 0.1, antialias: bool = False
) -> Tensor:
    """Carry learned positions over to another grid of patches.

    Args:
        pos_embed: class token first, then a square grid, [1, 1 + side * side, D]; left unchanged.
        rows, columns: of the new grid.
        offset: added to the new sizes to form a scale factor, as DINOv2's models without registers do; 0 for sizes.
        antialias: smooth where the new grid is coarser.

    Returns:
        [1, 1 + rows * columns, D]; `pos_embed` itself where the grid is its own.

    Source: the parents' `interpolate_pos_encoding`.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if (rows, columns) == (side, side):
        return pos_embed
    target = {"size": (rows, columns)}
    if offset:
        target = {"scale_factor": [(cells + offset) / side for cells in (rows, columns)]}
    positions = pos_embed.float()
    grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [1, D, side, side]
    grid = F.interpolate(grid, mode="bicubic", antialias=antialias, **target)
    grid = grid.flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :1], grid], dim=1).to(pos_embed.dtype)
