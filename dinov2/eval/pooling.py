"""What of a backbone's tokens makes the features of an image: the pools, by name.

    cls          class token of the last block
    mean         mean of the patch tokens of the last block
    cls+mean     both, end to end
    patches      every patch token of the last block, [N, D]
    lastN        class tokens of the last N blocks, earlier ones first, as in the parents' linear evaluation
    lastN+mean   these and the mean of the patch tokens of the last block

The final norm is applied to all of them. `last1` is another name for `cls`. A ResNet has `cls` alone, its mean over the
last map.

Shapes: B images, N patches, D features of a token.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError

POOLS = "cls, mean, cls+mean, patches, lastN or lastN+mean with a number N of blocks, e.g. last4+mean"
_LAST = re.compile(r"last([1-9][0-9]{0,3})")


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A pool, taken apart."""

    num_blocks: int  # class tokens of how many of the last blocks; 0: none
    has_mean: bool  # mean of the patch tokens, behind the class tokens
    has_patches: bool = False  # all patch tokens, and nothing else

    @property
    def name(self) -> str:
        """Name of the pool; of two that mean the same, the shorter."""
        if self.has_patches:
            return "patches"
        tokens = {0: [], 1: ["cls"]}.get(self.num_blocks, [f"last{self.num_blocks}"])
        return "+".join([*tokens, *["mean"] * self.has_mean])

    @property
    def num_parts(self) -> int:
        """How many vectors of D features stand end to end."""
        return self.num_blocks + self.has_mean

    def holds(self, other: "Pool") -> bool:
        """Say whether the features of the other pool are columns of this one's."""
        if self.has_patches or other.has_patches:
            return self == other
        return other.num_blocks <= self.num_blocks and other.has_mean <= self.has_mean


def parse_pool(name: str) -> Pool:
    """Take the name of a pool apart.

    Raises:
        ConfigError: there is no such pool.
    """
    if name == "patches":
        return Pool(num_blocks=0, has_mean=False, has_patches=True)
    tokens, plus, mean = name.partition("+")
    if name == "mean":
        return Pool(num_blocks=0, has_mean=True)
    match = _LAST.fullmatch(tokens)
    if (tokens == "cls" or match) and (not plus or mean == "mean"):
        return Pool(num_blocks=int(match[1]) if match else 1, has_mean=bool(plus))
    raise ConfigError(f"pool {name!r}: must be one of {POOLS}")


def select_pool(values: Tensor, *, pool: str, wanted: str) -> Tensor:
    """Cut a smaller pool out of a larger one; a view where columns are kept, left unchanged.

    Args:
        values: features of `pool`, [n, D * parts], or [n, N, D] of patches.
        pool: what they are.
        wanted: what is asked for.

    Raises:
        ConfigError: `wanted` is no part of `pool`.
    """
    have, want = parse_pool(pool), parse_pool(wanted)
    if have == want:
        return values
    if have.has_patches and want == Pool(num_blocks=0, has_mean=True):
        return values.float().mean(dim=1).to(values.dtype)
    if not have.holds(want):
        raise ConfigError(f"features of the pool {pool} do not hold those of {wanted}; compute them with that pool")
    width = values.shape[1] // have.num_parts
    first = (have.num_blocks - want.num_blocks) * width
    return values[:, first : first + want.num_parts * width]


class PooledBackbone(nn.Module):
    """A backbone with a pool behind it: images [B, C, height, width] to [B, D * parts], or [B, N, D] of patches.

    Args:
        backbone: `DinoVisionTransformer` or `ResNet`; kept, not copied.
        pool: name of the pool.

    Raises:
        ConfigError: there is no such pool, or the backbone cannot give it.
    """

    def __init__(self, backbone: nn.Module, pool: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pool = parse_pool(pool)
        if self.pool.name == "cls":
            return
        if not hasattr(backbone, "get_intermediate_layers"):
            raise ConfigError(f"pool {pool!r}: a ResNet has one feature for an image, its mean over the map; use cls")
        if self.pool.num_blocks > backbone.depth:
            raise ConfigError(f"pool {pool!r}: the backbone has only {backbone.depth} blocks")

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images."""
        pool = self.pool
        if pool.name == "cls":
            return self.backbone(images)
        if pool.num_blocks > 1:
            layers = self.backbone.get_intermediate_layers(images, pool.num_blocks, return_class_token=True)
            class_tokens, patches = [token for _, token in layers], layers[-1][0]
        else:
            tokens = self.backbone(images, is_training=True)
            class_tokens, patches = [tokens["x_norm_clstoken"]] * pool.num_blocks, tokens["x_norm_patchtokens"]
        if pool.has_patches:
            return patches
        return torch.cat([*class_tokens, *[patches.mean(dim=1)] * pool.has_mean], dim=1)
