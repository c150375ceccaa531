import numpy as np
import pytest
from support.images import photo

from dinov2.data.stain import TARGET_MEANS_LAB, TARGET_STDS_LAB, reinhard, tissue_statistics

RGB_TO_XYZ = np.array([[0.412453, 0.35758, 0.180423], [0.212671, 0.71516, 0.072169], [0.019334, 0.119193, 0.950227]])
SCALES = np.array([116.0, 500.0, 200.0])


def to_lab(pixels):
    values = pixels.astype(np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    shares = linear @ RGB_TO_XYZ.T / RGB_TO_XYZ.sum(axis=1)
    x, y, z = np.moveaxis(np.where(shares > 216 / 24389, np.cbrt(shares), (24389 / 27 * shares + 16) / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def to_rgb(lab):
    y = (lab[..., 0] + 16) / 116
    roots = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], axis=-1)
    shares = np.where(roots > 6 / 29, roots**3, (116 * roots - 16) * 27 / 24389) * RGB_TO_XYZ.sum(axis=1)
    linear = np.clip(shares @ np.linalg.inv(RGB_TO_XYZ).T, 0, 1)
    values = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(values * 255).astype(np.uint8)


def weights_of(lab):
    return np.clip((95 - lab[..., :1]) / 10, 0, 1)


def moments(lab):
    weights = weights_of(lab)
    mean = (weights * lab).sum((0, 1)) / weights.sum()
    return mean, np.sqrt((weights * (lab - mean) ** 2).sum((0, 1)) / weights.sum())


def slow_reinhard(pixels, means, stds):
    """The formula of dinov2/data/stain.py, pixel by pixel in float64."""
    lab = to_lab(pixels)
    weights = weights_of(lab)
    if weights.mean() < 0.01:
        return pixels
    mean, std = moments(lab)
    gain = np.where(std < 1e-3, 1, np.minimum(np.array(stds) / np.maximum(std, 1e-3), 4))
    return to_rgb(lab + weights * (np.array(means) + gain * (lab - mean) - lab))


def tissue(number=0, size=(61, 47)):
    """A photograph in pink and violet, brighter than black, with a white border."""
    grey = np.asarray(photo(number, size=size).convert("L"), dtype=np.float64)[..., None] / 255
    pixels = np.array([90, 40, 110]) + grey * np.array([140, 150, 120])
    pixels[:5] = 250
    return pixels.round().astype(np.uint8)


def every_hue():
    red, green = np.meshgrid(np.arange(0, 256), np.arange(0, 256))
    return np.stack([red, green, (red + green) % 256], axis=-1).astype(np.uint8)


TILES = {
    "tissue": tissue(),
    "photograph": np.asarray(photo(1)),
    "every hue": every_hue(),
    "noise": np.random.default_rng(0).integers(0, 256, (64, 65, 3), dtype=np.uint8),
    "one colour": np.full((8, 9, 3), (200, 120, 160), np.uint8),
    "black": np.zeros((8, 8, 3), np.uint8),
    "one row": tissue()[20:21],
}
TARGETS = {
    "default": (TARGET_MEANS_LAB, TARGET_STDS_LAB),
    "pale": ((75.0, 15.0, -8.0), (10.0, 5.0, 4.0)),
    "beyond sRGB": ((60.0, 60.0, -50.0), (40.0, 30.0, 30.0)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tile", TILES)
def test_it_agrees_with_the_formula_in_float64_within_one_grey_level(tile, target):
    means, stds = TARGETS[target]
    found = reinhard(TILES[tile], means_lab=means, stds_lab=stds)
    expected = slow_reinhard(TILES[tile], means, stds)
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert found.dtype == np.uint8 and found.shape == TILES[tile].shape
    # both round at the end, so that a difference of 1 stands for any small error; it must be rare
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


def test_tissue_gets_the_colour_of_the_target():
    pixels = tissue()[5:]
    found = tissue_statistics(reinhard(pixels, means_lab=(60.0, 20.0, -15.0), stds_lab=(10.0, 4.0, 3.0)))
    # the values are rounded to 8 bits
    assert found.means_lab == pytest.approx((60.0, 20.0, -15.0), abs=0.1)
    assert found.stds_lab == pytest.approx((10.0, 4.0, 3.0), abs=0.1)


def test_statistics_are_those_of_the_tissue_alone():
    mean, std = moments(to_lab(tissue()))
    found = tissue_statistics(tissue())
    assert found.means_lab == pytest.approx(mean, abs=0.02)
    assert found.stds_lab == pytest.approx(std, abs=0.02)
    assert found.share == pytest.approx(weights_of(to_lab(tissue())).mean(), abs=1e-4)
    bordered = np.pad(tissue(), ((40, 40), (40, 40), (0, 0)), constant_values=252)
    assert tissue_statistics(bordered).means_lab == pytest.approx(found.means_lab, abs=1e-3)
    assert tissue_statistics(np.full((4, 4, 3), 255, np.uint8)).means_lab is None


def test_background_stays_as_it_is():
    pixels = tissue()
    assert np.array_equal(reinhard(pixels)[:5], pixels[:5])
    assert not np.array_equal(reinhard(pixels)[5:], pixels[5:])


@pytest.mark.parametrize("value", [255, 243])
def test_a_white_tile_stays_as_it_is(value):
    pixels = np.full((32, 32, 3), value, np.uint8)
    assert np.array_equal(reinhard(pixels), pixels)
    pixels[3, 4] = (160, 80, 150)  # a speck of dust, 0.1 %
    assert np.array_equal(reinhard(pixels), pixels)


def test_the_noise_of_a_tile_of_one_colour_is_not_blown_up():
    rng = np.random.default_rng(0)
    noise = (np.array([200, 120, 160]) + rng.integers(-1, 2, (64, 64, 3))).astype(np.uint8)
    found = tissue_statistics(reinhard(noise, means_lab=(60.0, 20.0, -15.0), stds_lab=(15.0, 10.0, 10.0)))
    before = tissue_statistics(noise)
    assert max(new / old for new, old in zip(found.stds_lab, before.stds_lab, strict=True)) < 4.5


def test_the_input_is_left_unchanged_and_other_kinds_are_refused():
    pixels = tissue()
    before = pixels.copy()
    reinhard(pixels)
    assert np.array_equal(pixels, before)
    with pytest.raises(ValueError, match=r"takes uint8 \[H, W, 3\], not uint16 \[61, 3\]"):
        reinhard(np.zeros((61, 3), np.uint16))
