"""Backbones."""

from dinov2.models.build import Backbone, build_model
from dinov2.models.resnet import RESNETS, ResNet
from dinov2.models.sizes import SIZES
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["RESNETS", "SIZES", "Backbone", "DinoVisionTransformer", "ResNet", "build_model"]
