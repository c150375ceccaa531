"""Fit tensors of a backbone to another image size, patch size or number of channels.

Shapes: D features, C channels of the file, N channels of the model, p and q sides of a patch in pixels.
"""

import functools
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.hub.stored_tensor import State, StoredTensor
from dinov2.models.positions import interpolate_positions

_KERNELS = ("patch_embed.proj.weight", "conv1.weight")  # first layer of a vision transformer, of a ResNet


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


def fit_sizes(model: nn.Module, own: Mapping[str, Tensor], state: State) -> tuple[State, dict[str, str]]:
    """Plan the resizing of positions and of the first kernel, where only their size differs from the model's.

    Args:
        model: gives its rule of interpolation; left unchanged.
        own: its state dict.
        state: of the file, official names; left unchanged.

    Returns:
        (the state with resized tensors in place of these, {name: what was resized, for people}).
    """
    fitted, resized = dict(state), {}
    for name in (*_KERNELS, "pos_embed"):
        if name not in own or name not in state or own[name].shape == state[name].shape:
            continue
        want = own[name].shape
        result = (
            _fit_positions(model, want, state[name]) if name == "pos_embed" else _fit_kernel(name, want, state[name])
        )
        if result:
            fitted[name], resized[name] = result
    return fitted, resized


def _fit_positions(model: nn.Module, want: torch.Size, stored: StoredTensor) -> tuple[StoredTensor, str] | None:
    have = stored.shape
    side, wanted = math.isqrt(have[1] - 1), math.isqrt(want[1] - 1)
    if have[2] != want[2] or side**2 != have[1] - 1:
        return None  # a mismatch that has its own sentence
    resize = functools.partial(
        resize_positions, side=wanted, offset=model.interpolate_offset, antialias=model.interpolate_antialias
    )
    return stored.map(want, resize), f"{side}x{side} -> {wanted}x{wanted} patches"


def _fit_kernel(name: str, want: torch.Size, stored: StoredTensor) -> tuple[StoredTensor, str] | None:
    have = stored.shape
    if len(have) != 4 or have[0] != want[0] or have[2] != have[3]:
        return None
    changes = []
    if have[1] != want[1]:
        changes.append(f"{have[1]} -> {want[1]} channels")
        stored = stored.map((have[0], want[1], *have[2:]), functools.partial(adapt_in_chans, in_chans=want[1]))
    if have[2:] != want[2:]:
        if name != "patch_embed.proj.weight":
            return None
        changes.append(f"patches of {have[2]} -> {want[2]} px")
        stored = stored.map(want, functools.partial(resize_patch_embed, patch_size=want[2]))
    return stored, ", ".join(changes)
