"""Reinhard stain normalisation: give a histology tile the mean and spread of colour of a target, and spare its glass.

In CIE L*a*b* (D65), each channel of the tissue is shifted and stretched to the target's mean and standard deviation.
A pixel counts as tissue with the weight clip((95 - L) / 10, 0, 1), in the statistics as in the change, so that white
background stays as it is and no edge appears between the two:

    weight = clip((95 - L) / 10, 0, 1)
    mean, std = of L, a, b, each pixel by its weight
    gain = min(target_std / std, 4); 1 if the std is below 0.001
    new = old + weight * (target_mean + gain * (old - mean) - old)

A tile of which less than 1 % is tissue is left as it is. Shapes: H rows, W columns.
Source: Reinhard et al. 2001, doi:10.1109/38.946629, in another opponent colour space; weights and limits are ours.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

# A section under haematoxylin and eosin, the example histo.jpg of the package stardist 0.9.2, by `tissue_statistics`.
TARGET_MEANS_LAB = (47.9, 28.0, -17.3)
TARGET_STDS_LAB = (14.6, 3.4, 5.6)

GLASS_L = 95.0  # lightness from which on a pixel is background
TISSUE_L = 85.0  # lightness down from which it is tissue
MAX_GAIN = 4.0  # so that the noise of a tile of one colour does not become a picture
MIN_STD = 1e-3
MIN_TISSUE = 0.01  # share of the tile
_LEVELS = 65_535
_CHUNK = 1 << 14  # px at a time, so that what lies between input and output stays in the processor's cache
_KNEE = 6 / 29  # of CIE's cube root, linear below it
_SLOPE = 3 * _KNEE**2
_RGB_TO_XYZ = np.array(  # IEC 61966-2-1
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)


@dataclass(frozen=True)
class TissueStatistics:
    """Colour of the tissue of a tile; means and stds are None without tissue."""

    share: float  # of the tile, 0..1
    means_lab: tuple[float, float, float] | None
    stds_lab: tuple[float, float, float] | None


def tissue_statistics(pixels: np.ndarray) -> TissueStatistics:
    """Measure the colour of a tile's tissue, e.g. to make it the target.

    Args:
        pixels: [H, W, 3], uint8, sRGB.
    """
    return _statistics(_opponents(_require_rgb(pixels)))


def reinhard(
    pixels: np.ndarray,
    *,
    means_lab: tuple[float, float, float] = TARGET_MEANS_LAB,
    stds_lab: tuple[float, float, float] = TARGET_STDS_LAB,
) -> np.ndarray:
    """Normalise the stain of a tile.

    Args:
        pixels: [H, W, 3], uint8, sRGB; left unchanged.
        means_lab: of the target's tissue: L in 0..100, a and b.
        stds_lab: of the same, > 0.

    Returns:
        [H, W, 3], uint8; within one grey level of the formula in float64.
    """
    opponents = _opponents(_require_rgb(pixels))
    found = _statistics(opponents)
    if found.means_lab is None or found.stds_lab is None or found.share < MIN_TISSUE:
        return pixels.copy()
    means, stds = np.array(found.means_lab), np.array(found.stds_lab)
    gains = np.where(stds < MIN_STD, 1.0, np.minimum(np.array(stds_lab) / np.maximum(stds, MIN_STD), MAX_GAIN))
    shifts = np.array(means_lab) - gains * means
    # the same in units of `_opponents`: L = 116 y - 16, a = 500 (x - y), b = 200 (y - z)
    scales = np.array([116.0, 500.0, 200.0])
    shifts[0] += 16.0 - 16.0 * gains[0]
    slopes = (gains - 1).astype(np.float32)[:, None]
    offsets = (shifts / scales).astype(np.float32)[:, None]
    changed = np.empty((opponents.shape[1], 3), dtype=np.uint8)
    for start in range(0, len(changed), _CHUNK):
        part = opponents[:, start : start + _CHUNK]
        part += _weights(part[0]) * (slopes * part + offsets)
        changed[start : start + _CHUNK] = _to_rgb(part).T
    return changed.reshape(pixels.shape)


def _require_rgb(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"stain normalisation takes uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    return pixels


def _opponents(pixels: np.ndarray) -> np.ndarray:
    """Cube roots as they make up L*a*b*, [3, H * W] float32: y, x - y and y - z."""
    flat = pixels.reshape(-1, 3)
    found = np.empty((3, len(flat)), dtype=np.float32)
    linear, to_xyz, roots = _linear_light(), _to_xyz(), _cube_roots()
    for start in range(0, len(flat), _CHUNK):
        xyz = to_xyz @ np.take(linear, np.ascontiguousarray(flat[start : start + _CHUNK].T))
        x, y, z = np.take(roots, (xyz + np.float32(0.5)).astype(np.uint16))
        part = found[:, start : start + _CHUNK]
        part[0] = y
        np.subtract(x, y, out=part[1])
        np.subtract(y, z, out=part[2])
    return found


def _weights(roots: np.ndarray) -> np.ndarray:
    """How much of a pixel is tissue, 0..1, from the y of `_opponents`."""
    scale = np.float32(116 / (GLASS_L - TISSUE_L))
    return np.clip(np.float32((GLASS_L + 16) / (GLASS_L - TISSUE_L)) - scale * roots, np.float32(0), np.float32(1))


def _statistics(opponents: np.ndarray) -> TissueStatistics:
    """Weighted mean and spread, summed in float64 over chunks."""
    count = opponents.shape[1]
    total, sums, squares = 0.0, np.zeros(3), np.zeros(3)
    centre = np.array([[0.7], [0.0], [0.0]], dtype=np.float32)  # near the means, so that squares lose no digits
    for start in range(0, count, _CHUNK):
        part = opponents[:, start : start + _CHUNK] - centre
        weights = _weights(opponents[0, start : start + _CHUNK])
        total += float(weights.sum())
        sums += part @ weights
        squares += (part * part) @ weights
    if total <= 0:
        return TissueStatistics(0.0, None, None)
    means = sums / total
    variances = np.maximum(squares / total - means**2, 0)
    lightness, a, b = (means + centre[:, 0]) * np.array([116.0, 500.0, 200.0])
    stds = np.sqrt(variances) * np.array([116.0, 500.0, 200.0])
    return TissueStatistics(
        total / count, (float(lightness - 16), float(a), float(b)), (float(stds[0]), float(stds[1]), float(stds[2]))
    )


def _to_rgb(opponents: np.ndarray) -> np.ndarray:
    """Back to sRGB, [3, n] uint8, colours outside it clipped."""
    y, x_y, y_z = opponents
    roots = np.stack([y + x_y, y, y - y_z])
    upper = np.maximum(roots, np.float32(_KNEE))
    xyz = upper * upper * upper + np.float32(_SLOPE) * (roots - upper)
    levels = np.clip(_from_xyz() @ xyz, np.float32(0), np.float32(_LEVELS))
    return np.take(_srgb_levels(), (levels + np.float32(0.5)).astype(np.uint16))


@cache
def _linear_light() -> np.ndarray:
    """Light of each value of sRGB, 0..1, [256]."""
    values = np.arange(256) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)


@cache
def _to_xyz() -> np.ndarray:
    """From linear RGB to X, Y and Z as shares of white, in `_LEVELS`, [3, 3]."""
    return (_RGB_TO_XYZ / _RGB_TO_XYZ.sum(axis=1, keepdims=True) * _LEVELS).astype(np.float32)


@cache
def _from_xyz() -> np.ndarray:
    """From shares of white to linear RGB in `_LEVELS`, [3, 3]."""
    inverse = np.linalg.inv(_RGB_TO_XYZ / _RGB_TO_XYZ.sum(axis=1, keepdims=True))
    return (inverse * _LEVELS).astype(np.float32)


@cache
def _cube_roots() -> np.ndarray:
    """CIE's cube root of each level, [65536]."""
    shares = np.arange(_LEVELS + 1) / _LEVELS
    return np.where(shares > _KNEE**3, np.cbrt(shares), shares / _SLOPE + 4 / 29).astype(np.float32)


@cache
def _srgb_levels() -> np.ndarray:
    """Value of sRGB of each level of light, [65536] uint8."""
    light = np.arange(_LEVELS + 1) / _LEVELS
    values = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(values * 255).astype(np.uint8)
