"""Vision transformer of DINOv2: patch tokens, class token, register tokens, learned positions.

Shapes: B images, C channels, N patches, R registers, D features, T tokens of all crop sizes.
Source: Dosovitskiy et al. 2020, arXiv:2010.11929; Oquab et al. 2023, arXiv:2304.07193; registers: Darcet et al. 2023,
arXiv:2309.16588. Parameter names and shapes are those of the released weights, blocks without chunks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.layers.block import Block
from dinov2.layers.initialisation import init_norm
from dinov2.layers.mlp import Mlp
from dinov2.layers.packing import Layout, pack, unpack
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.swiglu_ffn import SwiGLUFFNFused

FFN_LAYERS: dict[str, type[nn.Module]] = {"mlp": Mlp, "swiglufused": SwiGLUFFNFused, "swiglu": SwiGLUFFNFused}
SIZES: dict[str, dict[str, int]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vit_giant2": {"embed_dim": 1536, "depth": 40, "num_heads": 24},
}
Features = dict[str, Tensor | None]


class DinoVisionTransformer(nn.Module):
    """Turn images into a class token, register tokens and patch tokens.

    Args:
        img_size: side of the images that positions are learned for, pixels; other sizes interpolate them.
        patch_size: side of a patch, pixels.
        in_chans: channels C.
        embed_dim: features D.
        depth: number of blocks.
        num_heads: attention heads; must divide D.
        mlp_ratio: width of the feed-forward networks over D.
        qkv_bias, ffn_bias, proj_bias: biases of the linear layers.
        drop_path_rate: stochastic depth, 0 to below 1.
        drop_path_uniform: the rate holds for every block; otherwise it grows linearly from 0 in the first block.
        init_values: initial LayerScale factor; None or 0 for no LayerScale.
        ffn_layer: "mlp", "swiglufused" or "swiglu" (the same network as "swiglufused").
        num_register_tokens: registers R.
        interpolate_antialias: smooth positions when they are shrunk.
        interpolate_offset: patches added to the target grid when the scale of the positions is computed, 0.1 in
            DINOv2's first weights; 0 interpolates to the exact grid, as for its weights with registers.
        attention_backend: "auto", "sdpa" or "xformers".
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        ffn_layer: str = "mlp",
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise ConfigError(f"ffn_layer={ffn_layer}: must be one of {', '.join(FFN_LAYERS)}")
        self.embed_dim = self.num_features = embed_dim
        self.depth = self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset

        self.patch_embed = PatchEmbed(img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path=drop_path_rate if drop_path_uniform else drop_path_rate * i / max(depth - 1, 1),
                init_values=init_values,
                ffn_layer=FFN_LAYERS[ffn_layer],
                attention_backend=attention_backend,
            )
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters, drawing from the generator or, without one, from PyTorch's global state."""
        self.patch_embed.init_weights(generator)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6, generator=generator)
        nn.init.zeros_(self.mask_token)
        for block in self.blocks:
            block.init_weights(generator)
        init_norm(self.norm)

    def shard_units(self) -> list[nn.Module]:
        """List the modules whose parameters are gathered together when the model is sharded."""
        return list(self.blocks)

    def no_weight_decay(self) -> set[str]:
        """Name the tokens and positions, which are no weights of a product."""
        names = {"cls_token", "pos_embed", "mask_token"}
        return names if self.register_tokens is None else names | {"register_tokens"}

    def layer_id(self, param_name: str) -> int:
        """Return a parameter's depth: 0 for tokens and embeddings, i + 1 for block i, `depth` + 1 for the norm."""
        parts = param_name.split(".")
        if parts[0] == "blocks":
            return int(parts[1]) + 1
        return self.depth + 1 if parts[0] == "norm" else 0

    def forward(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None, is_training: bool = False
    ) -> Tensor | list[Tensor] | Features | list[Features]:
        """Return the normalised class tokens [B, D], or all features (see `forward_features`) if `is_training`."""
        features = self.forward_features(x, masks)
        if is_training:
            return features
        if isinstance(features, list):
            return [self.head(part["x_norm_clstoken"]) for part in features]
        return self.head(features["x_norm_clstoken"])

    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> Features | list[Features]:
        """Compute the tokens of images, or of several crop sizes at once.

        Args:
            x: images [B, C, height, width], or a list of such tensors; every block is then called once for all of them.
            masks: bool [B, N], true where the mask token takes a patch's place; a list, with None allowed, for a list.

        Returns:
            One dict, or a list of them, with `x_norm_clstoken` [B, D], `x_norm_regtokens` [B, R, D],
            `x_norm_patchtokens` [B, N, D], `x_prenorm` [B, 1 + R + N, D] (before the final norm), and `masks`.
        """
        if isinstance(x, Tensor):
            return self._forward_crops([x], [masks])[0]
        return self._forward_crops(x, [None] * len(x) if masks is None else masks)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Return the patch tokens after several blocks.

        Args:
            x: images [B, C, height, width].
            n: how many of the last blocks, or the numbers of the blocks, counted from 0.
            reshape: give patch tokens as maps [B, D, rows, columns] instead of [B, N, D].
            return_class_token: give pairs (patch tokens, class token [B, D]).
            norm: apply the final norm to each.
        """
        wanted = range(self.depth - n, self.depth) if isinstance(n, int) else n
        packed, layout = pack([self.prepare_tokens_with_masks(x)])
        outputs = []
        for i, block in enumerate(self.blocks):
            packed = block(packed, layout)
            if i in wanted:
                outputs.append(unpack(self.norm(packed) if norm else packed, layout)[0])
        if len(outputs) != len(wanted):
            raise ValueError(f"blocks {list(wanted)} asked for, the model has blocks 0 to {self.depth - 1}")
        patches = [tokens[:, 1 + self.num_register_tokens :] for tokens in outputs]
        if reshape:
            grid = self._grid_size(x)
            patches = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in patches]
        if return_class_token:
            return tuple(zip(patches, [tokens[:, 0] for tokens in outputs], strict=True))
        return tuple(patches)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return class, register and patch tokens with positions added, [B, 1 + R + N, D]."""
        patches = self.patch_embed(x)
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        positions = self.interpolate_pos_encoding(*self._grid_size(x))
        prefix = [self.cls_token + positions[:, :1]]
        if self.register_tokens is not None:
            prefix.append(self.register_tokens)
        prefix = [token.expand(x.shape[0], -1, -1) for token in prefix]
        return torch.cat([*prefix, patches + positions[:, 1:]], dim=1)

    def interpolate_pos_encoding(self, rows: int, columns: int) -> Tensor:
        """Return positions of the class token and of a grid of patches, [1, 1 + rows * columns, D]."""
        return interpolate_positions(
            self.pos_embed, rows, columns, offset=self.interpolate_offset, antialias=self.interpolate_antialias
        )

    def _grid_size(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    def _forward_crops(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Features]:
        tokens = [self.prepare_tokens_with_masks(x, m) for x, m in zip(images, masks, strict=True)]
        packed, layout = pack(tokens)
        for block in self.blocks:
            packed = block(packed, layout)
        return self._features(packed, layout, masks)

    def _features(self, packed: Tensor, layout: Layout, masks: Sequence[Tensor | None]) -> list[Features]:
        first_patch = 1 + self.num_register_tokens
        pairs = zip(unpack(self.norm(packed), layout), unpack(packed, layout), strict=True)
        return [
            {
                "x_norm_clstoken": normed[:, 0],
                "x_norm_regtokens": normed[:, 1:first_patch],
                "x_norm_patchtokens": normed[:, first_patch:],
                "x_prenorm": prenorm,
                "masks": mask,
            }
            for (normed, prenorm), mask in zip(pairs, masks, strict=True)
        ]


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


def build_model(
    arch: str,
    *,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Build a vision transformer of a named size.

    Args:
        arch: a key of `SIZES`.
        embed_dim, depth, num_heads: numbers that replace those of the named size.
        kwargs: all other arguments of `DinoVisionTransformer`.

    Raises:
        ConfigError: the name is unknown, or `num_heads` does not divide `embed_dim`.
    """
    if arch not in SIZES:
        raise ConfigError(f"arch={arch}: must be one of {', '.join(SIZES)}")
    given = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    size = SIZES[arch] | {name: value for name, value in given.items() if value is not None}
    return DinoVisionTransformer(**size, **kwargs)


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 192 features, 12 blocks, 3 heads: for tests and demonstrations, no size of the parents."""
    return build_model("vit_tiny", patch_size=patch_size, **kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 384 features, 12 blocks, 6 heads."""
    return build_model("vit_small", patch_size=patch_size, **kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 768 features, 12 blocks, 12 heads."""
    return build_model("vit_base", patch_size=patch_size, **kwargs)


def vit_large(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 1024 features, 24 blocks, 16 heads."""
    return build_model("vit_large", patch_size=patch_size, **kwargs)


def vit_giant2(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 1536 features, 40 blocks, 24 heads; close to the published ViT-giant, with heads of 64 features."""
    return build_model("vit_giant2", patch_size=patch_size, **kwargs)
