import numpy as np
import pytest
import tifffile
import torch
from support.images import photo

from dinov2.data import make_dataset
from dinov2.data.datasets.decoders import EncodedImage
from dinov2.data.datasets.image_source import ImageSource
from dinov2.data.datasets.wide_tiff import WideTiff, open_image_file
from dinov2.errors import DatasetError

RAMP = np.linspace(0, 1, 48).reshape(6, 8)


def opened(path, pixels, *, channels=1, max_image_pixels=None, bits=16, **options):
    tifffile.imwrite(path, pixels, **options)
    settings = {"channels": channels, "max_image_pixels": max_image_pixels, "bits": bits}
    return open_image_file(str(path), path.read_bytes(), **settings)


@pytest.mark.parametrize(
    "pixels",
    [
        (RAMP * 4e9).astype(np.uint32),
        (RAMP * 4e9 - 2e9).astype(np.int32),
        (RAMP * 60000 - 30000).astype(np.int16),
        (RAMP * 1e12).astype(np.uint64),
        (RAMP * 7 - 3).astype(np.float32),
        (RAMP * 1e200).astype(np.float64),
        (RAMP * 100).astype(np.float16),
    ],
    ids=lambda pixels: pixels.dtype.name,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_wide_grey_is_windowed_to_16_bits(tmp_path, pixels, channels):
    image = opened(tmp_path / "a.tif", pixels, channels=channels)
    assert isinstance(image, ImageSource)
    assert (image.height, image.width, image.channels) == (6, 8, channels)
    decoded = image.to_tensor()
    assert decoded.dtype == torch.uint16
    assert decoded.shape == (channels, 6, 8)
    assert (decoded.float() - torch.tensor(RAMP) * 65535).abs().max() < 40  # float16 has 11 bits
    narrow = opened(tmp_path / "a.tif", pixels, channels=channels, bits=8).to_tensor()
    assert narrow.dtype == torch.uint8
    assert (narrow.float() - decoded.float() / 257).abs().max() <= 0.51  # rounding, twice


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int16])
def test_integers_that_fit_into_16_bits_are_left_as_they_are(tmp_path, dtype):
    pixels = np.arange(48).reshape(6, 8).astype(dtype) * 600
    assert np.array_equal(opened(tmp_path / "a.tif", pixels).to_tensor()[0].numpy(), pixels)
    assert not opened(tmp_path / "b.tif", np.full((4, 5), 70000, dtype=np.uint32)).to_tensor().any()  # no contrast


@pytest.mark.parametrize("layout", ["contig", "separate"])
def test_16_bit_colour_keeps_its_bits(tmp_path, layout):
    colour = np.random.default_rng(0).integers(0, 65536, (6, 8, 3)).astype(np.uint16)
    stored = colour if layout == "contig" else colour.transpose(2, 0, 1)
    options = {"photometric": "rgb", "planarconfig": layout}
    decoded = opened(tmp_path / "a.tif", stored, channels=3, **options).to_tensor()
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), colour)
    grey = opened(tmp_path / "a.tif", stored, **options).to_tensor()[0].numpy()
    assert np.abs(grey - colour @ [0.299, 0.587, 0.114]).max() <= 0.51  # rounding
    assert isinstance(opened(tmp_path / "a.tif", stored, bits=8, **options), EncodedImage)


def test_alpha_is_dropped_and_other_samples_are_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (6, 8, 5)).astype(np.uint16)
    colour = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    decoded = opened(tmp_path / "a.tif", pixels[..., :4], channels=3, **colour).to_tensor()
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels[..., :3])
    grey = {"photometric": "minisblack", "planarconfig": "contig"}
    decoded = opened(tmp_path / "a.tif", pixels[..., :2], **grey).to_tensor()
    assert np.array_equal(decoded[0].numpy(), pixels[..., 0])
    with pytest.raises(DatasetError, match="^it has 5 channels, but student.in_chans=1$"):
        opened(tmp_path / "a.tif", pixels, **grey).to_tensor()


def test_ordinary_files_are_pillows(tmp_path):
    pixels = np.array(photo(size=(16, 12)))
    for bits in (8, 16):
        image = opened(tmp_path / "a.tif", pixels, channels=3, bits=bits, photometric="rgb")
        assert isinstance(image, EncodedImage)
        assert np.array_equal(
            image.to_tensor().permute(1, 2, 0).numpy(), pixels.astype(int) * (257 if bits == 16 else 1)
        )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_orientation_is_applied(tmp_path, orientation):
    pixels = (RAMP * 1000).astype(np.float32)
    extra = [(274, "H", 1, orientation, False)]
    image = opened(tmp_path / "a.tif", pixels, extratags=extra)
    turned = np.rot90(pixels, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
    assert (image.height, image.width) == turned.shape
    assert np.abs(image.to_tensor()[0].numpy() - turned / 1000 * 65535).max() < 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_counted(tmp_path, value):
    pixels = RAMP.astype(np.float32)
    pixels[2, 3:5] = value
    with pytest.raises(DatasetError) as error:
        opened(tmp_path / "a.tif", pixels).to_tensor()
    assert str(error.value) == "2 of its numbers are NaN or infinite; fill them in before training"


def test_large_and_unknown_files_are_refused(tmp_path):
    with pytest.raises(DatasetError) as error:
        opened(tmp_path / "a.tif", RAMP, max_image_pixels=47)
    assert str(error.value) == (
        "8 x 6 pixels are more than data.max_image_pixels=47; raise it if the image is what it claims to be"
    )
    (tmp_path / "b.tif").write_bytes(b"hello, this is text")
    with pytest.raises(DatasetError, match="^damaged or unknown TIFF file"):
        open_image_file(str(tmp_path / "b.tif"), b"hello, this is text")
    with pytest.raises(DatasetError, match="^not an image of a known format$"):
        open_image_file("b.png", b"hello, this is text")


def test_bits_become_black_and_white(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RAMP > 0.5)
    assert WideTiff(tmp_path / "a.tif", channels=1).to_tensor().unique().tolist() == [0, 255]


def test_folders_hold_any_of_them(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", (RAMP * 1e9).astype(np.uint32))
    photo(size=(16, 12)).save(tmp_path / "b.png")
    wide = make_dataset(f"ImageFolder:root='{tmp_path}':bits=16")
    assert [wide[index][0].dtype for index in (0, 1)] == [torch.uint16] * 2
    assert wide[0][0].shape == (3, 6, 8)
    plain = make_dataset(f"ImageFolder:root='{tmp_path}'")
    assert plain[0][0].dtype == torch.uint8
    assert isinstance(plain.encoded_image(0), WideTiff)
    pixels = RAMP.astype(np.float32)
    pixels[0, 0] = np.nan
    tifffile.imwrite(tmp_path / "c.tif", pixels)
    with pytest.raises(DatasetError) as error:
        make_dataset(f"ImageFolder:root='{tmp_path}'")[2]
    assert str(error.value) == (
        f"image 2 ({tmp_path}/c.tif) cannot be read: 1 of its numbers are NaN or infinite; fill them in before training"
    )
