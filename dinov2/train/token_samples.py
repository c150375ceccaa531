"""Some patches of each crop, drawn by the seeds of its sample: the same on any rank, in any batch, after any resume.

Shapes: B images on this rank, G global crops, N patches of a crop, T of them drawn.
"""

import torch
from torch import Tensor

from dinov2.data.random_streams import uniforms

_STREAM = 1 << 16  # of `uniforms`, for the first crop; the photometric augmentation uses the crops' numbers


def patch_ranks(seeds: Tensor, *, num_crops: int, num_patches: int) -> Tensor:
    """Draw a number in 0..1 for each patch of the global crops; who takes the smallest ones takes a random sample.

    Args:
        seeds: of the samples, [B] int64, on any device.
        num_crops: G.
        num_patches: N.

    Returns:
        [G * B, N] float32, crop-major, on the seeds' device; a row depends on its sample and crop alone.
    """
    crops = torch.arange(num_crops, device=seeds.device).repeat_interleave(len(seeds))  # [G * B]
    return uniforms(seeds.repeat(num_crops), crops + _STREAM, count=num_patches)


def smallest(ranks: Tensor, count: int) -> Tensor:
    """Return the places of the `count` smallest numbers in the last axis, [..., T]; all if there are fewer."""
    return ranks.argsort(dim=-1, stable=True)[..., :count]


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """Take tokens [G * B, T, D] out of [G * B, N, D], or entries [G * B, T] out of [G * B, N]."""
    return tokens.take_along_dim(places if tokens.ndim == places.ndim else places.unsqueeze(-1), dim=1)
