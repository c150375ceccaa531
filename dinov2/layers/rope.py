"""Rotary position embedding over both axes of the patch grid: queries and keys are turned by angles of their position.

Shapes: B images, N tokens of an image (class and storage tokens first), d features of a head.
Source: Su et al. 2021, arXiv:2104.09864 (RoPE); Siméoni et al. 2025, arXiv:2508.10104 (axial form and augmentation of
DINOv3), same values as the parent's `RopePositionEmbedding`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import ConfigError

NORMALIZATIONS = ("separate", "min", "max")


class Rotation:
    """Angles of the tokens of one crop size: `cos` and `sin`, [N, d / 2].

    Neither a tuple nor a dataclass, because FSDP's mixed precision looks into those and would round the angles to the
    type of the parameters.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


class RopePositionEmbedding(nn.Module):
    """Map the size of a patch grid to the angles by which queries and keys are turned.

    A quarter of a head's features gets periods in geometric order; rows and columns each turn half of the pairs.
    Coordinates are those of patch centres, from -1 to 1. The augmentations are drawn anew in each call in training mode
    and are without effect in evaluation mode.

    Args:
        embed_dim: features of a token.
        num_heads: attention heads; 4 * num_heads must divide embed_dim.
        base: the periods are base ** 0 to (nearly) base ** 1; None with `min_period` and `max_period`.
        min_period, max_period: first and last period; both or none.
        normalize_coords: divide row and column numbers by "separate" the grid's own rows and columns, "min" the smaller
            or "max" the larger of the two (which keep the aspect ratio).
        shift_coords: add to each axis a number uniform in [-shift, shift]; None for no shift.
        jitter_coords: multiply each axis by a number log-uniform in [1 / jitter, jitter]; None for none.
        rescale_coords: multiply both axes by one number log-uniform in [1 / rescale, rescale]; None for none.
        dtype: type in which angles are computed and queries and keys are turned.

    Raises:
        ConfigError: a setting is out of range, or both or none of base and periods are given.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize_coords: str = "separate",
        shift_coords: float | None = None,
        jitter_coords: float | None = None,
        rescale_coords: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if embed_dim % (4 * num_heads):
            raise ConfigError(
                f"embed_dim={embed_dim} is not a multiple of 4 * num_heads={4 * num_heads}, "
                "as pos_embed_type=rope needs"
            )
        _check_periods(base, min_period, max_period)
        if normalize_coords not in NORMALIZATIONS:
            raise ConfigError(
                f"pos_embed_rope_normalize_coords={normalize_coords}: must be one of {', '.join(NORMALIZATIONS)}"
            )
        if shift_coords is not None and shift_coords < 0:
            raise ConfigError(f"pos_embed_rope_shift_coords={shift_coords}: must be at least 0, or null for none")
        for name, value in (("jitter", jitter_coords), ("rescale", rescale_coords)):
            if value is not None and value < 1:
                raise ConfigError(f"pos_embed_rope_{name}_coords={value}: must be at least 1, or null for none")
        self.base = base
        self.min_period = min_period
        self.max_period = max_period
        self.normalize_coords = normalize_coords
        self.shift_coords = shift_coords
        self.jitter_coords = jitter_coords
        self.rescale_coords = rescale_coords
        self.dtype = dtype
        self.register_buffer("periods", torch.empty(embed_dim // num_heads // 4, dtype=dtype))
        self.init_weights()

    @property
    def augments(self) -> bool:
        """Whether two calls give different angles."""
        options = (self.shift_coords, self.jitter_coords, self.rescale_coords)
        return self.training and any(option is not None for option in options)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set the periods; nothing is drawn from the generator."""
        num = len(self.periods)
        kind = {"dtype": self.dtype, "device": self.periods.device}
        if self.base is not None:
            periods = self.base ** (2 * torch.arange(num, **kind) / (2 * num))
        else:
            ratio = self.max_period / self.min_period
            periods = ratio ** torch.linspace(0, 1, num, **kind) / ratio * self.max_period
        self.periods.copy_(periods)

    def forward(self, rows: int, columns: int, *, num_prefix: int = 0) -> Rotation:
        """Return the angles of a grid's patches, row by row, after 0 for `num_prefix` class and storage tokens."""
        with torch.autocast(self.periods.device.type, enabled=False):  # it would change the type of the angles
            coords = self._augment(self._coordinates(rows, columns))
            angles = 2 * math.pi * coords[:, :, None] / self.periods  # [N, 2, d / 4]
        angles = angles.flatten(1).to(self.dtype)
        prefix = (0, 0, num_prefix, 0)
        return Rotation(F.pad(angles.cos(), prefix, value=1.0), F.pad(angles.sin(), prefix))

    def _coordinates(self, rows: int, columns: int) -> Tensor:
        """Centres of the patches, [N, 2]."""
        divisors = {
            "separate": (rows, columns),
            "min": (min(rows, columns),) * 2,
            "max": (max(rows, columns),) * 2,
        }[self.normalize_coords]
        axes = [
            torch.arange(0.5, cells, dtype=self.dtype, device=self.periods.device) / divisor
            for cells, divisor in zip((rows, columns), divisors, strict=True)
        ]
        return 2 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1) - 1

    def _augment(self, coords: Tensor) -> Tensor:
        if not self.augments:
            return coords
        if self.shift_coords is not None:
            coords = coords + coords.new_empty(2).uniform_(-self.shift_coords, self.shift_coords)
        if self.jitter_coords is not None:
            coords = coords * _log_uniform(coords.new_empty(2), self.jitter_coords)
        if self.rescale_coords is not None:
            coords = coords * _log_uniform(coords.new_empty(1), self.rescale_coords)
        return coords


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the features of each head: feature i and feature i + d / 2 are a pair.

    Args:
        x: queries or keys, [B, N, ..., d]; left unchanged.
        rotation: angles of the N tokens.

    Returns:
        The same shape and type; computed in the type of the angles.
    """
    shape = (x.shape[1], *[1] * (x.ndim - 3), x.shape[-1] // 2)
    cos, sin = rotation.cos.view(shape), rotation.sin.view(shape)
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    with torch.autocast(x.device.type, enabled=False):  # on the CPU it refuses to join float16
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _log_uniform(like: Tensor, limit: float) -> Tensor:
    return like.uniform_(-math.log(limit), math.log(limit)).exp()


def _check_periods(base: float | None, min_period: float | None, max_period: float | None) -> None:
    given = (
        f"pos_embed_rope_base={base}, pos_embed_rope_min_period={min_period}, pos_embed_rope_max_period={max_period}"
    )
    if (min_period is None) != (max_period is None) or (base is None) == (min_period is None):
        raise ConfigError(f"{given}: give either the base or both periods, and null for the other")
    if any(value is not None and value <= 0 for value in (base, min_period, max_period)):
        raise ConfigError(f"{given}: must be above 0")
