"""Backbones."""

from dinov2.models.build import build_model
from dinov2.models.sizes import SIZES
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["SIZES", "DinoVisionTransformer", "build_model"]
