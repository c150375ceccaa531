"""Build a backbone by the name of its architecture."""

from typing import Any

from dinov2.errors import ConfigError
from dinov2.models.sizes import SIZES
from dinov2.models.vision_transformer import DinoVisionTransformer


def build_model(
    arch: str,
    *,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    **kwargs: Any,
) -> DinoVisionTransformer:
    """Build a backbone of a named architecture.

    Args:
        arch: a key of `SIZES`.
        embed_dim, depth, num_heads, mlp_ratio: numbers that replace those of the named size.
        kwargs: all other arguments of `DinoVisionTransformer`.

    Raises:
        ConfigError: the name is unknown, or the model's arguments do not fit together.
    """
    if arch not in SIZES:
        raise ConfigError(f"arch={arch}: must be one of {', '.join(SIZES)}")
    given = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
    size = SIZES[arch] | {name: value for name, value in given.items() if value is not None}
    return DinoVisionTransformer(**size, **kwargs)
