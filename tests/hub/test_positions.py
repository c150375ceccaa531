"""Learned positions on other grids: the official rules against an array computed without PyTorch.

`python tests/hub/test_positions.py` writes that array again: 37 x 37 positions (518 px, patch 14), as float64 sums of
weights, by DINOv2's rule for models without registers (scale with 0.1 patches more, no smoothing) and by that for
models with registers (exact scale, smoothed).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.models.vision_transformer import interpolate_positions

STORED = Path(__file__).parents[1] / "golden" / "positions_37.npz"
GRIDS = [(16, 16), (7, 7), (32, 20), (50, 41), (37, 36)]
SIDE = 37


def cubic(x, a):
    """Cubic convolution kernel of Keys 1981 with parameter a."""
    x = np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


def weights_with_offset(cells, offset=0.1):
    """Weight of each of SIDE cells in each new one, [cells, SIDE]; beyond the border the last cell is repeated."""
    weights = np.zeros((cells, SIDE))
    for new in range(cells):
        position = (new + 0.5) * SIDE / (cells + offset) - 0.5
        first = int(np.floor(position)) - 1
        for tap in range(first, first + 4):
            weights[new, np.clip(tap, 0, SIDE - 1)] += cubic(position - tap, a=-0.75)
    return weights


def weights_smoothed(cells):
    """Weight of each of SIDE cells in each new one, [cells, SIDE]; the kernel widens when the grid shrinks."""
    scale = SIDE / cells
    width = max(scale, 1.0)
    distance = (np.arange(SIDE) + 0.5 - (np.arange(cells)[:, None] + 0.5) * scale) / width
    weights = cubic(distance, a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def interpolated(positions, rows, columns, weights):
    """Interpolate [1, 1 + SIDE * SIDE, D] to [1, 1 + rows * columns, D] in float64."""
    grid = positions[0, 1:].astype(np.float64).reshape(SIDE, SIDE, -1)
    grid = np.einsum("rs,ct,std->rcd", weights(rows), weights(columns), grid)
    return np.concatenate([positions[0, :1], grid.reshape(rows * columns, -1)])[None]


def reference():
    positions = np.random.default_rng(0).standard_normal((1, 1 + SIDE * SIDE, 2)).astype(np.float32)
    arrays = {"pos_embed": positions}
    for rows, columns in GRIDS:
        arrays[f"offset_{rows}x{columns}"] = interpolated(positions, rows, columns, weights_with_offset)
        arrays[f"smoothed_{rows}x{columns}"] = interpolated(positions, rows, columns, weights_smoothed)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def stored():
    with np.load(STORED) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("rule", "kwargs"), [("offset", {}), ("smoothed", {"offset": 0.0, "antialias": True})])
def test_official_rules_on_other_grids(stored, grid, rule, kwargs):
    got = interpolate_positions(stored["pos_embed"], *grid, **kwargs)
    want = stored[f"{rule}_{grid[0]}x{grid[1]}"]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)  # float32 coordinates; values of about 1


def test_the_offset_matters(stored):
    got = interpolate_positions(stored["pos_embed"], 16, 16, offset=0.0)
    assert (got - stored["offset_16x16"]).abs().max() > 0.1


def test_the_stored_array_is_what_this_file_computes(stored):
    made = reference()
    assert made.keys() == stored.keys()
    for name, array in made.items():
        np.testing.assert_allclose(array, stored[name].numpy(), rtol=0, atol=1e-6, err_msg=name)


if __name__ == "__main__":
    np.savez_compressed(STORED, **reference())
