"""Build a backbone by the name of its architecture."""

from typing import Any

from dinov2.errors import ConfigError
from dinov2.models.resnet import RESNETS, ResNet
from dinov2.models.sizes import SIZES
from dinov2.models.vision_transformer import DinoVisionTransformer

Backbone = DinoVisionTransformer | ResNet


def build_model(
    arch: str,
    *,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    **kwargs: Any,
) -> Backbone:
    """Build a backbone of a named architecture.

    Args:
        arch: a key of `SIZES` or `RESNETS`.
        embed_dim, depth, num_heads, mlp_ratio: numbers that replace those of the named size; not for ResNets.
        kwargs: all other arguments of `DinoVisionTransformer` or `ResNet`.

    Raises:
        ConfigError: the name is unknown, or the model's arguments do not fit together.
    """
    given = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
    given = {name: value for name, value in given.items() if value is not None}
    if arch in RESNETS:
        for name, value in given.items():
            raise ConfigError(f"{name}={value}: arch={arch} has fixed sizes; leave it out")
        return ResNet(arch, **kwargs)
    if arch not in SIZES:
        raise ConfigError(f"arch={arch}: must be one of {', '.join([*SIZES, *RESNETS])}")
    return DinoVisionTransformer(**SIZES[arch] | given, **kwargs)
