"""Transformer block: attention, then a feed-forward network, each on a residual path with LayerScale.

Shapes: T packed tokens of all crop sizes, B images, N tokens of an image, D features.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov2.layers.attention import Rotations, SelfAttention
from dinov2.layers.drop_path import add_residual
from dinov2.layers.initialisation import init_norm
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.norms import NORM_LAYERS, NormLayer
from dinov2.layers.packing import Layout
from dinov2.layers.recompute import Recomputation, checkpointed


class Block(nn.Module):
    """Pre-norm transformer block over the tokens of one or several crop sizes.

    Args:
        dim: features D.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward network over D.
        qkv_bias, proj_bias, ffn_bias: biases of the linear layers.
        drop_path: rate of stochastic depth, 0 to below 1; without effect in eval mode.
        init_values: initial LayerScale factor; None or 0 for no LayerScale.
        ffn_layer: builds the feed-forward network, called as `Mlp` is.
        attention_backend: see `dinov2.layers.attention.attention`.
        norm_layer: builds a normalisation of D features.
        mask_k_bias: see `dinov2.layers.attention.SelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path: float = 0.0,
        init_values: float | None = None,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        attention_backend: str = "auto",
        norm_layer: NormLayer = NORM_LAYERS["layernorm"],
        mask_k_bias: bool = False,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path
        self.recomputation: Recomputation = "none"  # what is not kept for the backward pass; see `checkpointed`
        # What `forward` calls for the arithmetic: `Block.compute` or a compiled form of it. Not bound to this block, so
        # that a copy computes with its own weights.
        self.computed_by: Callable[..., Tensor] = Block.compute
        self.norm1 = norm_layer(dim)
        self.attn = SelfAttention(
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attention_backend=attention_backend,
            mask_k_bias=mask_k_bias,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(in_features=dim, hidden_features=int(dim * mlp_ratio), bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters and buffers."""
        init_norm(self.norm1)
        init_norm(self.norm2)
        self.attn.init_weights(generator)
        self.mlp.init_weights(generator)
        for scale in (self.ls1, self.ls2):
            if isinstance(scale, LayerScale):
                scale.init_weights(generator)

    def forward(self, x: Tensor, layout: Layout | None = None, rotations: Rotations | None = None) -> Tensor:
        """Return tokens of the same shape: packed [T, D] with their layout, or [B, N, D] without one.

        `rotations` turn queries and keys, one for each crop size; None for learned positions.
        """
        if layout is None:
            return self.forward(x.flatten(0, 1), ((x.shape[0], x.shape[1]),), rotations).view_as(x)
        return self.computed_by(self, x, layout, rotations)

    def compute(self, x: Tensor, layout: Layout, rotations: Rotations | None) -> Tensor:
        """Return packed tokens of the same shape; what gathers weights, and other hooks, are around it."""
        return checkpointed(self._transform, x, layout, rotations, recomputation=self.recomputation)

    def _transform(self, x: Tensor, layout: Layout, rotations: Rotations | None) -> Tensor:
        def attend(x: Tensor, layout: Layout) -> Tensor:
            return self.attn(self.norm1(x), layout, rotations)

        drop_rate = self.drop_path_rate if self.training else 0.0
        x = add_residual(x, attend, layout, gamma=_gamma(self.ls1), drop_rate=drop_rate)
        return add_residual(x, self._feed_forward, layout, gamma=_gamma(self.ls2), drop_rate=drop_rate)

    def _feed_forward(self, x: Tensor, layout: Layout) -> Tensor:
        return self.mlp(self.norm2(x))


def _gamma(scale: nn.Module) -> Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None
