"""Vision transformer of DINOv2 and DINOv3: patch tokens, a class token, register tokens, and one of two positions.

Learned positions make the DINOv2 family, rotary positions (RoPE) the DINOv3 family, whose registers are called storage
tokens. All else is an option of both.

Shapes: B images, C channels, N patches, R registers, D features, T tokens of all crop sizes.
Source: Dosovitskiy et al. 2020, arXiv:2010.11929; Oquab et al. 2023, arXiv:2304.07193; Siméoni et al. 2025,
arXiv:2508.10104; registers: Darcet et al. 2023, arXiv:2309.16588. Parameter names and shapes are those of the released
weights, blocks without chunks.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.layers.attention import Rotations
from dinov2.layers.block import Block
from dinov2.layers.initialisation import init_norm
from dinov2.layers.mlp import Mlp
from dinov2.layers.norms import NORM_LAYERS
from dinov2.layers.packing import Layout, pack, unpack
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.recompute import Recomputation
from dinov2.layers.rope import RopePositionEmbedding
from dinov2.layers.swiglu_ffn import SwiGLUFFNFused, SwiGLUFFNSeparate
from dinov2.models.positions import interpolate_positions
from dinov2.models.sizes import SIZES

POS_EMBED_TYPES = ("learned", "rope")
FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNFused,  # of the DINOv2 family; SwiGLUFFNSeparate of the DINOv3 family
    "swiglufused": SwiGLUFFNFused,
    "swiglu32": partial(SwiGLUFFNSeparate, align_to=32),
    "swiglu64": partial(SwiGLUFFNSeparate, align_to=64),
    "swiglu128": partial(SwiGLUFFNSeparate, align_to=128),
}
ROPE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
        ffn_layer: "mlp"; "swiglufused", with one matrix for gate and value; "swiglu32", "swiglu64" or "swiglu128", with
            two of a width that is a multiple of this; "swiglu": "swiglufused" with learned positions, two matrices of a
            multiple of 8 with rotary ones.
        num_register_tokens: registers R; the parameter is `register_tokens`, with rotary positions `storage_tokens`.
        interpolate_antialias: smooth positions when they are shrunk.
        interpolate_offset: patches added to the target grid when the scale of the positions is computed, 0.1 in
            DINOv2's first weights; 0 interpolates to the exact grid, as for its weights with registers.
        attention_backend: "auto", "sdpa" or "xformers".
        norm_layer: "layernorm", "layernormbf16" (epsilon 1e-5 instead of 1e-6) or "rmsnorm".
        mask_k_bias: leave the keys without bias.
        untie_cls_and_patch_norms: give class token and registers a final norm of their own, `cls_norm`.
        untie_global_and_local_cls_norm: give those of the second crop size of a list one, `local_cls_norm`; in
            training mode only.
        pos_embed_type: "learned" or "rope".
        pos_embed_rope_*: see `RopePositionEmbedding`; the dtype is "fp32", "bf16" or "fp16".
    """

    def __init__(  # longer than other functions: a line for each argument of both families
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
        *,
        norm_layer: str = "layernorm",
        mask_k_bias: bool = False,
        untie_cls_and_patch_norms: bool = False,
        untie_global_and_local_cls_norm: bool = False,
        pos_embed_type: str = "learned",
        pos_embed_rope_base: float | None = 100.0,
        pos_embed_rope_min_period: float | None = None,
        pos_embed_rope_max_period: float | None = None,
        pos_embed_rope_normalize_coords: str = "separate",
        pos_embed_rope_shift_coords: float | None = None,
        pos_embed_rope_jitter_coords: float | None = None,
        pos_embed_rope_rescale_coords: float | None = None,
        pos_embed_rope_dtype: str = "bf16",
    ) -> None:
        super().__init__()
        _check_choice("pos_embed_type", pos_embed_type, POS_EMBED_TYPES)
        norm = NORM_LAYERS[_check_choice("norm_layer", norm_layer, NORM_LAYERS)]
        ffn = FFN_LAYERS[_check_choice("ffn_layer", ffn_layer, FFN_LAYERS)]
        if (ffn_layer, pos_embed_type) == ("swiglu", "rope"):
            ffn = SwiGLUFFNSeparate
        self.embed_dim = self.num_features = embed_dim
        self.depth = self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset

        self.patch_embed = PatchEmbed(img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = self.rope_embed = self.register_tokens = self.storage_tokens = None
        registers = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        if pos_embed_type == "rope":
            self.storage_tokens = registers
            self.rope_embed = RopePositionEmbedding(
                embed_dim,
                num_heads=num_heads,
                base=pos_embed_rope_base,
                min_period=pos_embed_rope_min_period,
                max_period=pos_embed_rope_max_period,
                normalize_coords=pos_embed_rope_normalize_coords,
                shift_coords=pos_embed_rope_shift_coords,
                jitter_coords=pos_embed_rope_jitter_coords,
                rescale_coords=pos_embed_rope_rescale_coords,
                dtype=ROPE_DTYPES[_check_choice("pos_embed_rope_dtype", pos_embed_rope_dtype, ROPE_DTYPES)],
            )
        else:
            self.register_tokens = registers
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.patch_embed.num_patches, embed_dim))
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
                ffn_layer=ffn,
                attention_backend=attention_backend,
                norm_layer=norm,
                mask_k_bias=mask_k_bias,
            )
            for i in range(depth)
        )
        self.norm = norm(embed_dim)
        self.cls_norm = norm(embed_dim) if untie_cls_and_patch_norms else None
        self.local_cls_norm = norm(embed_dim) if untie_global_and_local_cls_norm else None
        self.head = nn.Identity()
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters and buffers, drawing from the generator or, without one, from PyTorch's global state."""
        self.patch_embed.init_weights(generator)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        if self.rope_embed is not None:
            self.rope_embed.init_weights(generator)
        for token in (self.cls_token, self._registers):
            if token is not None:
                nn.init.normal_(token, std=1e-6 if self.rope_embed is None else 0.02, generator=generator)
        nn.init.zeros_(self.mask_token)
        for block in self.blocks:
            block.init_weights(generator)
        for norm in (self.norm, self.cls_norm, self.local_cls_norm):
            if norm is not None:
                init_norm(norm)

    @property
    def _registers(self) -> Tensor | None:
        return self.register_tokens if self.rope_embed is None else self.storage_tokens

    def shard_units(self) -> list[nn.Module]:
        """List the modules whose parameters are gathered together when the model is sharded."""
        return list(self.blocks)

    def recompute(self, recomputation: Recomputation) -> None:
        """Choose what the blocks do not keep for the backward pass; see `dinov2.layers.recompute.checkpointed`."""
        for block in self.blocks:
            block.recomputation = recomputation

    def compute_blocks_by(self, compute: Callable[..., Tensor]) -> None:
        """Choose what the blocks call for their arithmetic: `Block.compute`, or a compiled form of it."""
        for block in self.blocks:
            block.computed_by = compute

    def no_weight_decay(self) -> set[str]:
        """Name the tokens and positions, which are no weights of a product."""
        names = {"cls_token", "pos_embed", "mask_token", "register_tokens", "storage_tokens"}
        return {name for name in names if getattr(self, name) is not None}

    def layer_id(self, param_name: str) -> int:
        """Return a parameter's depth: 0 for tokens and embeddings, i + 1 for block i, `depth` + 1 for the norms."""
        parts = param_name.split(".")
        if parts[0] == "blocks":
            return int(parts[1]) + 1
        return self.depth + 1 if parts[0] in ("norm", "cls_norm", "local_cls_norm") else 0

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
            One dict, or a list of them, with `x_norm_clstoken` [B, D], `x_norm_regtokens` [B, R, D] (with rotary
            positions also as `x_storage_tokens`), `x_norm_patchtokens` [B, N, D], `x_prenorm` [B, 1 + R + N, D] (before
            the final norm), and `masks`.
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
        *,
        return_extra_tokens: bool = False,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, ...], ...]:
        """Return the patch tokens after several blocks.

        Args:
            x: images [B, C, height, width].
            n: how many of the last blocks, or the numbers of the blocks, counted from 0.
            reshape: give patch tokens as maps [B, D, rows, columns] instead of [B, N, D].
            return_class_token: give pairs (patch tokens, class token [B, D]).
            norm: apply the final norm to each.
            return_extra_tokens: give the registers [B, R, D] as last entry of each tuple.
        """
        wanted = range(self.depth - n, self.depth) if isinstance(n, int) else n
        packed, layout = pack([self.prepare_tokens_with_masks(x)])
        outputs = []
        for i, (block, rotations) in enumerate(zip(self.blocks, self._rotations([x]), strict=True)):
            packed = block(packed, layout, rotations)
            if i in wanted:
                outputs += self._normed(packed, layout) if norm else map(self._divided, unpack(packed, layout))
        if len(outputs) != len(wanted):
            raise ValueError(f"blocks {list(wanted)} asked for, the model has blocks 0 to {self.depth - 1}")
        columns = [[patches for _, patches in outputs]]
        if reshape:
            grid = self._grid_size(x)
            columns = [[patches.transpose(1, 2).unflatten(2, grid).contiguous() for patches in columns[0]]]
        if return_class_token:
            columns.append([first[:, 0] for first, _ in outputs])
        if return_extra_tokens:
            columns.append([first[:, 1:] for first, _ in outputs])
        return tuple(columns[0]) if len(columns) == 1 else tuple(zip(*columns, strict=True))

    def get_class_attention(self, x: Tensor, block: int = -1) -> Tensor:
        """Return how a block's heads weigh the tokens for the class token; see `SelfAttention.first_token_weights`.

        Args:
            x: images [B, C, height, width].
            block: counted from 0, or from the last by negative numbers.

        Returns:
            Weights [B, H, 1 + R + N] of class token, registers and patches, float32; they sum to 1.
        """
        if not -self.depth <= block < self.depth:
            raise ValueError(f"block {block} asked for, the model has blocks 0 to {self.depth - 1}")
        packed, layout = pack([self.prepare_tokens_with_masks(x)])
        rotations = list(self._rotations([x]))
        for number in range(block % self.depth):
            packed = self.blocks[number](packed, layout, rotations[number])
        last, turned = self.blocks[block], rotations[block]
        tokens = last.norm1(unpack(packed, layout)[0])
        return last.attn.first_token_weights(tokens, None if turned is None else turned[0])

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return class, register and patch tokens, learned positions added, [B, 1 + R + N, D]."""
        patches = self.patch_embed(x)
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        cls_token = self.cls_token
        if self.pos_embed is not None:
            positions = self.interpolate_pos_encoding(*self._grid_size(x))
            cls_token, patches = cls_token + positions[:, :1], patches + positions[:, 1:]
        prefix = [token.expand(x.shape[0], -1, -1) for token in (cls_token, self._registers) if token is not None]
        return torch.cat([*prefix, patches], dim=1)

    def interpolate_pos_encoding(self, rows: int, columns: int) -> Tensor:
        """Return learned positions of the class token and of a grid of patches, [1, 1 + rows * columns, D]."""
        return interpolate_positions(
            self.pos_embed, rows, columns, offset=self.interpolate_offset, antialias=self.interpolate_antialias
        )

    def _grid_size(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // self.patch_size, x.shape[3] // self.patch_size

    def _forward_crops(self, images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Features]:
        tokens = [self.prepare_tokens_with_masks(x, m) for x, m in zip(images, masks, strict=True)]
        packed, layout = pack(tokens)
        for block, rotations in zip(self.blocks, self._rotations(images), strict=True):
            packed = block(packed, layout, rotations)
        names = ("x_norm_regtokens",) if self.rope_embed is None else ("x_norm_regtokens", "x_storage_tokens")
        return [
            {
                "x_norm_clstoken": first[:, 0],
                **dict.fromkeys(names, first[:, 1:]),
                "x_norm_patchtokens": patches,
                "x_prenorm": prenorm,
                "masks": mask,
            }
            for (first, patches), prenorm, mask in zip(
                self._normed(packed, layout), unpack(packed, layout), masks, strict=True
            )
        ]

    def _rotations(self, images: Sequence[Tensor]) -> Iterator[Rotations | None]:
        """Yield the rotations of each block: one set for all, or in training with augmentation, one drawn for each."""
        rotations = None
        for i in range(self.depth):
            if self.rope_embed is not None and (i == 0 or self.rope_embed.augments):
                prefix = 1 + self.num_register_tokens
                rotations = tuple(self.rope_embed(*self._grid_size(x), num_prefix=prefix) for x in images)
            yield rotations

    def _divided(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Class token and registers, and patches."""
        return tokens[:, : 1 + self.num_register_tokens], tokens[:, 1 + self.num_register_tokens :]

    def _normed(self, packed: Tensor, layout: Layout) -> list[tuple[Tensor, Tensor]]:
        """Apply the final norms: for each crop size, class token and registers [B, 1 + R, D] and patches [B, N, D]."""
        if self.cls_norm is None and self.local_cls_norm is None:
            return [self._divided(tokens) for tokens in unpack(self.norm(packed), layout)]
        pairs = []
        for i, tokens in enumerate(unpack(packed, layout)):
            cls_norm = self.norm if self.cls_norm is None else self.cls_norm
            if i == 1 and self.training and self.local_cls_norm is not None:  # the local crops, as in the parent
                cls_norm = self.local_cls_norm
            first, patches = self._divided(tokens)
            pairs.append((cls_norm(first), self.norm(patches)))
        return pairs


def _check_choice(name: str, value: str, choices: Collection[str]) -> str:
    if value not in choices:
        raise ConfigError(f"{name}={value}: must be one of {', '.join(choices)}")
    return value


def vit_tiny(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 192 features, 12 blocks, 3 heads: for tests and demonstrations, no size of the parents."""
    return DinoVisionTransformer(patch_size=patch_size, **SIZES["vit_tiny"] | kwargs)


def vit_small(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 384 features, 12 blocks, 6 heads."""
    return DinoVisionTransformer(patch_size=patch_size, **SIZES["vit_small"] | kwargs)


def vit_base(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 768 features, 12 blocks, 12 heads."""
    return DinoVisionTransformer(patch_size=patch_size, **SIZES["vit_base"] | kwargs)


def vit_large(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 1024 features, 24 blocks, 16 heads."""
    return DinoVisionTransformer(patch_size=patch_size, **SIZES["vit_large"] | kwargs)


def vit_so400m(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 1152 features, 27 blocks, 18 heads."""
    return DinoVisionTransformer(patch_size=patch_size, **SIZES["vit_so400m"] | kwargs)


def vit_huge2(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 1280 features, 32 blocks, 20 heads."""
    return DinoVisionTransformer(patch_size=patch_size, **SIZES["vit_huge2"] | kwargs)


def vit_giant2(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 1536 features, 40 blocks, 24 heads; close to the published ViT-giant, with heads of 64 features."""
    return DinoVisionTransformer(patch_size=patch_size, **SIZES["vit_giant2"] | kwargs)


def vit_7b(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
    """Build 4096 features, 40 blocks, 32 heads."""
    return DinoVisionTransformer(patch_size=patch_size, **SIZES["vit_7b"] | kwargs)
