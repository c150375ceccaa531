import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encode, photo

from dinov2.data.datasets.decoders import EncodedImage
from dinov2.errors import ConfigError, DatasetError

COLOUR = photo(size=(40, 30))
GREY = COLOUR.convert("L")


def pixels(data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return EncodedImage(data, **options).to_tensor()


def rgb(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_give_back_their_pixels(kind, channels):
    expected = rgb(COLOUR) if channels == 3 else torch.from_numpy(np.array(GREY))[None]
    assert torch.equal(pixels(encode(COLOUR, kind), channels=channels), expected)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_formats_are_close(kind):
    assert (
        pixels(encode(COLOUR, kind, quality=95)).float() - rgb(COLOUR).float()
    ).abs().mean() < 8  # fine detail, halved colour


def test_a_jpeg_read_as_grey_is_its_luma():
    data = encode(COLOUR, quality=95)
    converted = pixels(data).float().mul(torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    assert (pixels(data, channels=1)[0].float() - converted).abs().max() <= 2  # rounding and clipping of RGB


def test_grey_palette_alpha_bilevel_and_cmyk_images_simply_work():
    images = {
        "grey": (GREY, "PNG"),
        "palette": (COLOUR.convert("P"), "PNG"),
        "alpha": (COLOUR.convert("RGBA"), "PNG"),
        "grey and alpha": (GREY.convert("LA"), "PNG"),
        "1 bit": (GREY.convert("1"), "PNG"),
        "CMYK": (COLOUR.convert("CMYK"), "JPEG"),
        "CMYK TIFF": (COLOUR.convert("CMYK"), "TIFF"),
    }
    for name, (image, kind) in images.items():
        assert (pixels(encode(image, kind)).float() - rgb(image).float()).abs().mean() < 6, name
        assert pixels(encode(image, kind), channels=1).shape == (1, 30, 40), name


def test_transparent_pixels_show_white():
    opacity = torch.linspace(0, 1, 40).expand(30, 40)
    image = COLOUR.convert("RGBA")
    image.putalpha(Image.fromarray(opacity.mul(255).round().byte().numpy()))
    expected = rgb(COLOUR) * opacity + 255 * (1 - opacity)
    assert (pixels(encode(image, "PNG")).float() - expected).abs().max() <= 2  # rounded twice
    palette = COLOUR.convert("P")
    data = encode(palette, "PNG", transparency=bytes(256))  # every colour fully transparent
    assert torch.equal(pixels(data), torch.full((3, 30, 40), 255, dtype=torch.uint8))
    data = encode(GREY, "PNG", transparency=GREY.getpixel((0, 0)))  # one grey value
    assert pixels(data)[0, 0, 0] == 255 and pixels(data, channels=1)[0, 0, 0] == 255
    black_on_nothing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    black_on_nothing.putpixel((3, 3), (0, 0, 0, 255))
    assert pixels(encode(black_on_nothing, "PNG"), channels=1)[0].eq(0).nonzero().tolist() == [[3, 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_images_keep_their_range(kind):
    values = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    decoded = pixels(encode(Image.fromarray(values), kind))
    expected = torch.from_numpy(np.round(values / 257).astype(np.uint8))
    assert torch.equal(decoded, expected.expand(3, -1, -1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_images_are_uint16_where_the_dataset_asks_for_it(kind, channels):
    values = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    decoded = pixels(encode(Image.fromarray(values), kind), bits=16, channels=channels)
    assert decoded.dtype == torch.uint16
    assert torch.equal(decoded, torch.from_numpy(values).expand(channels, -1, -1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_8_bit_images_are_scaled_up_where_the_dataset_asks_for_16(kind, channels):
    data = encode(COLOUR, kind)
    narrow, wide = pixels(data, channels=channels), pixels(data, channels=channels, bits=16)
    assert torch.equal(wide.to(torch.int32), narrow.to(torch.int32) * 257)


def deep_png(values):
    """A PNG file of 16 bits a channel from [H, W, C] of uint16, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_png_is_read_with_8_bits_and_refused_for_16(channels):
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    colour = values[..., :3] if channels > 2 else values[..., [0, 0, 0]]
    narrow = pixels(deep_png(values)).permute(1, 2, 0).numpy()
    assert np.abs(narrow - colour / 257).max() <= 1  # the upper 8 bits
    with pytest.raises(DatasetError) as error:
        pixels(deep_png(values), bits=16)
    assert str(error.value) == ("colour PNG files of 16 bits are read with bits=8 only; store TIFF files for bits=16")


TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).T,
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    turned = TURNS[orientation](np.array(upright))
    encoded = EncodedImage(encode(upright, kind, exif=exif, **({"quality": 100} if kind == "JPEG" else {})), channels=1)
    decoded = encoded.to_tensor()[0].numpy()
    assert (encoded.height, encoded.width) == decoded.shape == turned.shape
    assert np.abs(decoded.astype(int) - turned).max() <= (40 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_16_bits(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    encoded = EncodedImage(encode(Image.fromarray(upright), kind, exif=exif), bits=16)
    decoded = encoded.to_tensor().numpy()
    assert decoded.dtype == np.uint16
    assert (3, encoded.height, encoded.width) == decoded.shape
    assert np.array_equal(decoded, np.stack([TURNS[orientation](upright)] * 3))


def test_float_images_are_refused_with_a_reason():
    with pytest.raises(
        DatasetError, match="pixels of Pillow's mode F have no known range; store 8 or 16 bits a channel"
    ):
        pixels(encode(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize(("reduce", "size"), [(1, (400, 300)), (1.9, (400, 300)), (2, (200, 150)), (5, (100, 75))])
def test_a_jpeg_decodes_to_no_fewer_pixels_than_asked(reduce, size):
    image = photo(size=(400, 300))
    encoded = EncodedImage(encode(image, quality=95))
    decoded = encoded.to_pil(reduce=reduce)
    assert (encoded.width, encoded.height) == (400, 300)
    assert decoded.size == size
    reference = image.resize(size, Image.Resampling.BOX)
    assert np.abs(np.array(decoded).astype(int) - np.array(reference)).mean() < 4


def bomb(width, height):
    """Header of a PNG of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 8) + b"IDAT" + bytes(12)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + data


def test_an_image_that_claims_too_many_pixels_is_refused_before_decoding():
    with pytest.raises(DatasetError) as error:
        pixels(bomb(60000, 50000))
    assert str(error.value) == (
        "60000 x 50000 pixels are more than data.max_image_pixels=178956970; "
        "raise it if the image is what it claims to be"
    )
    with pytest.raises(DatasetError, match="40 x 30 pixels are more than data.max_image_pixels=1000"):
        pixels(encode(COLOUR), max_image_pixels=1000)
    limit = Image.MAX_IMAGE_PIXELS
    assert pixels(encode(COLOUR), max_image_pixels=None).shape == (3, 30, 40)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_damaged_files_are_dataset_errors():
    whole = encode(photo(size=(200, 150)))
    with pytest.raises(DatasetError, match="^the file is empty$"):
        pixels(b"")
    with pytest.raises(DatasetError, match="^not an image of a known format$"):
        pixels(b"hello, this is text")
    with pytest.raises(DatasetError, match="^damaged file \\(image file is truncated"):
        pixels(whole[: len(whole) // 2])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM"])
def test_any_damage_gives_an_image_or_a_dataset_error(kind):
    rng = np.random.default_rng(0)
    whole = encode(COLOUR, kind)
    for _ in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, len(data), size=4):
            data[place] = rng.integers(0, 256)
        try:
            assert EncodedImage(bytes(data), max_image_pixels=10**6).to_tensor().dtype == torch.uint8
        except DatasetError:
            pass


def test_other_numbers_of_channels_are_a_config_error():
    with pytest.raises(
        ConfigError, match="student.in_chans=5: image files of this dataset are read with 1 or 3 channels"
    ):
        EncodedImage(encode(COLOUR), channels=5)
