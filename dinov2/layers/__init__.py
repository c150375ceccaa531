"""Building blocks of the networks."""

from dinov2.layers.attention import LinearKMaskedBias, SelfAttention
from dinov2.layers.block import Block
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.layer_scale import LayerScale
from dinov2.layers.mlp import Mlp
from dinov2.layers.norms import NORM_LAYERS
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.layers.rope import RopePositionEmbedding
from dinov2.layers.swiglu_ffn import SwiGLUFFN, SwiGLUFFNFused, SwiGLUFFNSeparate
from dinov2.layers.sync_batchnorm import SyncBatchNorm

__all__ = [
    "NORM_LAYERS",
    "Block",
    "DINOHead",
    "LayerScale",
    "LinearKMaskedBias",
    "Mlp",
    "PatchEmbed",
    "RopePositionEmbedding",
    "SelfAttention",
    "SwiGLUFFN",
    "SwiGLUFFNFused",
    "SwiGLUFFNSeparate",
    "SyncBatchNorm",
]
