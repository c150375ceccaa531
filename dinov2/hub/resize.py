"""Fit tensors of a backbone to another image size, patch size or number of channels.

Shapes: D features, C channels of the file, N channels of the model, p and q sides of a patch in pixels.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.models.positions import interpolate_positions


def resize_positions(pos_embed: Tensor, side: int, *, offset: float, antialias: bool) -> Tensor:
    """Carry positions [1, 1 + s * s, D] over to a grid of `side` x `side` patches by the official rule.

    Source: the parents' `interpolate_pos_encoding`; see `interpolate_positions`.
    """
    return interpolate_positions(pos_embed, side, side, offset=offset, antialias=antialias)


def resize_patch_embed(weight: Tensor, patch_size: int) -> Tensor:
    """Resize the kernel of a patch embedding so that a patch, resized likewise, gives the same token.

    The kernel v sought for the resize B of patches makes <B x, v> = <x, w> for every patch x, where that can be, else
    as nearly as can be: v is the pseudo-inverse of B's transpose times w. It is exact when patches get larger.

    Args:
        weight: [D, C, p, p], any float dtype; left unchanged.
        patch_size: q, pixels.

    Returns:
        [D, C, q, q] of the same dtype.

    Source: FlexiViT, Beyer et al. 2022, arXiv:2212.08013, section 3.4 (PI-resize), with antialiased bicubic B.
    """
    if weight.shape[-1] == patch_size:
        return weight
    inverse = _inverse_resize(weight.shape[-1], patch_size)
    flat = weight.detach().float().flatten(2)  # [D, C, p * p]
    return (flat @ inverse.T).unflatten(2, (patch_size, patch_size)).to(weight.dtype)


@functools.lru_cache(maxsize=8)
def _inverse_resize(old: int, new: int) -> Tensor:
    """Return the pseudo-inverse of the transposed resize, [q * q, p * p]."""
    pixels = torch.eye(old**2).unflatten(1, (1, old, old))  # one patch for every pixel
    resized = F.interpolate(pixels, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.linalg.pinv(
        resized.flatten(1)
    )  # row i of the matrix is B applied to pixel i, so this is B's transpose


def adapt_in_chans(weight: Tensor, in_chans: int) -> Tensor:
    """Fit the kernel of the first layer to another number of channels.

    Every new channel gets the sum over the file's channels, divided by the number of new ones. So an image with the
    same value in all channels gives the same token as before:

        3 -> 1  the sum of the three (a grey image used to be repeated over them)
        3 -> N  the mean of the three, times 3 / N
        1 -> N  the one channel repeated, divided by N

    Args:
        weight: [D, C, height, width]; left unchanged.
        in_chans: N.

    Returns:
        [D, N, height, width] of the same dtype.
    """
    if weight.shape[1] == in_chans:
        return weight
    shared = weight.detach().float().sum(dim=1, keepdim=True) / in_chans
    return shared.repeat(1, in_chans, 1, 1).to(weight.dtype)
