import numpy as np
import pytest
import torch

from dinov2.data.datasets.array_image import ArrayImage, Plane, Scaling
from dinov2.data.datasets.image_source import ImageSource, RegionSource
from dinov2.data.random_crops import CropBox, cut_crops
from dinov2.errors import DatasetError


class MemoryArray:
    """An array in memory that counts how many numbers of it were read."""

    def __init__(self, values, axes, bits=None):
        self.values, self.axes = values, axes
        self.shape, self.dtype = values.shape, values.dtype
        self.bits = bits or 8 * values.dtype.itemsize
        self.num_read = 0

    def read(self, box):
        self.num_read += int(np.prod([part.stop - part.start for part in box]))
        return self.values[tuple(box)]

    def close(self):
        pass


def plane(values, axes="YX", channels=None, bits=None, **fixed):
    return Plane(MemoryArray(values, axes, bits), "Y", "X", channels, fixed)


def image(values, kind=None, low=0.1, high=99.9, *, axes="YX", plane_channels=None, file_bits=None, **options):
    return ArrayImage(plane(values, axes, plane_channels, file_bits), scaling=Scaling(kind, low, high), **options)


def noise(*shape, dtype=np.uint16, high=60_000):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def by_formula(values, low, high, bits):
    shares = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    return shares * (2**bits - 1)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
def test_a_window_spreads_its_numbers_over_the_full_scale(dtype, bits):
    values = noise(20, 30, high=120 if dtype == "uint8" else 30_000).astype(dtype)
    low, high = (20, 90) if dtype == "uint8" else (1_000, 25_000)
    found = image(values, "window", low, high, channels=1, bits=bits).to_tensor()
    assert found.dtype == {8: torch.uint8, 16: torch.uint16}[bits]
    # half a level for rounding, and float32's share of a level of 16 bits
    difference = np.abs(found[0].to(torch.float64).numpy() - by_formula(values, low, high, bits))
    assert difference.max() <= 0.51
    assert found.to(torch.int64).min() == 0 and found.to(torch.int64).max() == 2**bits - 1


def test_a_narrow_window_high_up_in_32_bits_is_exact():
    values = (4_000_000_000 + np.arange(256)).astype(np.uint32).reshape(16, 16)
    found = image(values, "window", 4_000_000_000, 4_000_000_255, channels=1).to_tensor()
    assert found.flatten().tolist() == list(range(256))


@pytest.mark.parametrize(
    ("dtype", "numbers", "expected"),
    [
        ("uint8", [0, 7, 255], [0, 7, 255]),
        ("uint16", [0, 257, 65535], [0, 1, 255]),
        ("int16", [-32768, 0, 32767], [0, 128, 255]),
        ("uint32", [0, 2**31, 2**32 - 1], [0, 128, 255]),
        ("float32", [0, 0.5, 1], [0, 128, 255]),
        ("bool", [0, 1, 1], [0, 255, 255]),
    ],
)
def test_by_type_the_whole_range_of_the_type_is_used(dtype, numbers, expected):
    values = np.array([numbers], dtype=dtype)
    assert image(values, "dtype", channels=1).to_tensor().flatten().tolist() == expected


def test_bits_that_a_file_does_not_use_are_no_part_of_the_range():
    values = np.array([[0, 4095]], dtype=np.uint16)
    assert image(values, "dtype", channels=1, file_bits=12).to_tensor().flatten().tolist() == [0, 255]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_percentiles_are_those_of_the_plane(dtype):
    values = noise(50, 60).astype(dtype)
    low, high = np.percentile(values, [2, 95], method="inverted_cdf")
    found = image(values, "percentile", 2, 95, channels=1, bits=16).to_tensor()
    expected = image(values, "window", low, high, channels=1, bits=16).to_tensor()
    assert torch.equal(found, expected)
    assert ((found == 0).float().mean() - 0.02).abs() < 0.002


def test_without_a_kind_8_bits_are_kept_and_others_scaled_by_percentiles():
    eight, sixteen = noise(20, 30, dtype=np.uint8, high=90), noise(20, 30)
    assert np.array_equal(image(eight, channels=1).to_tensor()[0].numpy(), eight)
    assert torch.equal(image(sixteen, channels=1).to_tensor(), image(sixteen, "percentile", channels=1).to_tensor())


def test_a_plane_of_one_number_is_black_and_never_nan():
    for dtype in ("uint16", "float32"):
        assert not image(np.full((9, 9), 7, dtype=dtype), channels=1).to_tensor().any()


def test_percentiles_of_a_large_plane_come_from_evenly_spread_blocks():
    rows = np.linspace(0, 60_000, 4096)[:, None] + np.linspace(0, 5_000, 2048)
    found = plane(rows.astype(np.uint16))
    window = Scaling("percentile", 1, 99).window(found)
    assert found.array.num_read < 0.6 * rows.size
    assert window == pytest.approx(np.percentile(rows, [1, 99]), abs=1_500)
    assert Scaling("percentile", 1, 99).window(found) == window


def test_nan_and_infinite_numbers_have_a_sentence():
    values = noise(20, 30).astype(np.float32)
    values[3, 4], values[5, 6] = np.nan, np.inf
    for kind in ("percentile", "window"):
        with pytest.raises(DatasetError) as error:
            image(values, kind, 0, 100, channels=1).to_tensor()
        assert str(error.value) == "2 of its numbers are NaN or infinite; fill them in before training"


def test_floats_without_a_known_range_have_a_sentence():
    with pytest.raises(DatasetError) as error:
        image(np.array([[-3.5, 480.0]]), "dtype", channels=1).to_tensor()
    assert str(error.value) == (
        "its floats reach from -3.5 to 480, and scaling=dtype takes 0..1; use scaling=percentile, or scaling=window "
        "with low= and high="
    )


def test_grey_is_repeated_and_colour_becomes_grey():
    grey = noise(10, 12, dtype=np.uint8, high=255)
    assert torch.equal(image(grey, channels=3).to_tensor(), torch.from_numpy(grey).expand(3, -1, -1))
    colour = noise(10, 12, 3, dtype=np.uint8, high=255)
    options = {"axes": "YXS", "plane_channels": "S"}
    assert torch.equal(image(colour, channels=3, **options).to_tensor(), torch.from_numpy(colour).permute(2, 0, 1))
    luma = image(colour, channels=1, **options).to_tensor()[0].numpy()
    assert np.abs(luma - colour @ np.array([0.299, 0.587, 0.114])).max() <= 0.5
    with pytest.raises(DatasetError) as error:
        image(noise(10, 12, 5), axes="YXS", plane_channels="S", channels=3)
    assert str(error.value) == "it has 5 channels, but student.in_chans=3"
    assert image(noise(10, 12, 5), axes="YXS", plane_channels="S", channels=5).to_tensor().shape == (5, 10, 12)


def test_other_axes_stand_at_their_places():
    values = noise(2, 5, 10, 12)
    found = plane(values, "TZYX", T=1, Z=3)
    assert np.array_equal(found.read(2, 3, 4, 5)[0], values[1, 3, 2:6, 3:8])
    sideways = Plane(MemoryArray(values, "TZYX"), "Z", "Y", None, {"T": 0, "X": 7})
    assert (sideways.height, sideways.width) == (5, 10)
    assert np.array_equal(sideways.read(0, 0, 5, 10)[0], values[0, :, :, 7])


def test_parts_and_regions_are_cut_out_of_the_plane():
    values = noise(40, 50)
    scaling = {"kind": "dtype", "channels": 1, "bits": 16}
    whole = image(values, **scaling)
    part = image(values, part=(10, 20, 16, 12), **scaling)
    assert isinstance(whole, RegionSource) and isinstance(part, ImageSource)
    assert (part.height, part.width) == (16, 12)
    assert np.array_equal(part.to_tensor()[0].numpy(), values[10:26, 20:32])
    assert np.array_equal(part.read_region(1, 2, 3, 4)[0].numpy(), values[11:14, 22:26])


def test_crops_read_no_more_than_they_need():
    array = MemoryArray(noise(2_000, 3_000), "YX")
    source = ArrayImage(Plane(array, "Y", "X", None, {}), scaling=Scaling("dtype", 0, 1), channels=1, bits=16)
    boxes = [CropBox(top, 50, 100, 120, 32, False, False) for top in (10, 1_800)]
    crops = cut_crops(source, boxes)
    assert array.num_read == 2 * 100 * 120
    whole = cut_crops(source.to_tensor(), boxes)
    for crop, expected in zip(crops, whole, strict=True):
        assert torch.equal(crop, expected)


def test_more_pixels_than_the_limit_are_not_read_at_once():
    source = image(noise(40, 50), "dtype", channels=1, max_image_pixels=1_000)
    assert source.read_region(0, 0, 20, 50).shape == (1, 20, 50)
    with pytest.raises(DatasetError) as error:
        source.to_tensor()
    assert str(error.value) == (
        "50 x 40 pixels at once are more than data.max_image_pixels=1000; set tile_px= to take the image in parts, or "
        "raise the limit"
    )
