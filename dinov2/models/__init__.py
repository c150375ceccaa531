"""Backbones."""

from dinov2.models.vision_transformer import DinoVisionTransformer, build_model

__all__ = ["DinoVisionTransformer", "build_model"]
