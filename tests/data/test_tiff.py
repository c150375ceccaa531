import itertools

import numpy as np
import pytest
import tifffile
from support.tiff_files import sparse_tiff

from dinov2.data.datasets.tiff import TiffArray
from dinov2.errors import DatasetError


def numbers(*shape, dtype=np.uint16):
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, 200 if np.dtype(dtype).itemsize == 1 else 30000, shape).astype(dtype)


def write(path, values, **options):
    tifffile.imwrite(path, values, **options)
    return path


def whole(array):
    return tuple(slice(0, size) for size in array.shape)


def sentence(path, box=None, **options):
    with pytest.raises(DatasetError) as error:
        array = TiffArray(path, **options)
        array.read(box or whole(array))
    return str(error.value)


LAYOUTS = {
    "contiguous": {},
    "big-endian": {"byteorder": ">"},
    "strips": {"rowsperstrip": 7},
    "deflate": {"compression": "zlib", "rowsperstrip": 16},
    "deflate with predictor": {"compression": "zlib", "predictor": True},
    "LZW": {"compression": "lzw", "rowsperstrip": 5},
    "tiles": {"tile": (16, 32)},
    "BigTIFF, tiles, deflate": {"bigtiff": True, "tile": (32, 16), "compression": "zlib"},
    "ImageJ": {"imagej": True, "metadata": {"axes": "ZYX"}},
    "OME": {"ome": True, "metadata": {"axes": "ZYX"}, "compression": "zlib"},
    "plain pages": {"metadata": None, "compression": "zlib"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_box_of_a_stack_equals_that_of_the_whole_array(tmp_path, layout):
    values = numbers(6, 45, 70)
    array = TiffArray(write(tmp_path / "a.tif", values, photometric="minisblack", **LAYOUTS[layout]))
    assert array.shape == values.shape and array.dtype == np.uint16 and array.bits == 16
    assert array.axes[-2:] == "YX"
    rng = np.random.default_rng(1)
    for _ in range(12):
        box = tuple(slice(*sorted(rng.choice(size + 1, 2, replace=False).tolist())) for size in values.shape)
        found = array.read(box)
        assert np.array_equal(found, values[box])
        assert found.dtype.isnative and found.flags.writeable


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint32", "float32", "float64"])
def test_types_of_numbers_are_kept(tmp_path, dtype):
    values = numbers(20, 30, dtype=dtype)
    for number, options in enumerate(({}, {"tile": (16, 16), "compression": "zlib"})):
        array = TiffArray(write(tmp_path / f"{number}.tif", values, **options))
        assert array.dtype == dtype
        assert np.array_equal(array.read(whole(array)), values)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "zlib"}])
def test_samples_are_an_axis(tmp_path, planar, options):
    values = numbers(40, 50, 3, dtype=np.uint8)
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    array = TiffArray(write(tmp_path / "a.tif", stored, photometric="rgb", planarconfig=planar, **options))
    assert array.axes == ("YXS" if planar == "contig" else "SYX")
    box = {"Y": slice(3, 29), "X": slice(11, 40), "S": slice(1, 3)}
    found = array.read([box[axis] for axis in array.axes])
    assert np.array_equal(found, stored[tuple(box[axis] for axis in array.axes)])


def test_axes_of_imagej_and_ome_are_told(tmp_path):
    values = numbers(2, 3, 20, 30)
    imagej = TiffArray(write(tmp_path / "a.tif", values, imagej=True, metadata={"axes": "ZCYX"}))
    ome = TiffArray(write(tmp_path / "b.tif", values, ome=True, metadata={"axes": "CZYX"}, photometric="minisblack"))
    assert (imagej.axes, ome.axes) == ("ZCYX", "CZYX")
    for array in (imagej, ome):
        assert np.array_equal(array.read(whole(array)), values)


def test_pages_that_lie_apart_are_read_one_by_one(tmp_path):
    values = numbers(4, 20, 30)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in values:
            file.write(page, contiguous=False, metadata=None)
    array = TiffArray(tmp_path / "a.tif")
    assert np.array_equal(array.read((slice(1, 4), slice(5, 9), slice(0, 30))), values[1:4, 5:9])


def test_blocks_of_volumes_are_tiles_too(tmp_path):
    values = numbers(20, 40, 40)
    path = write(tmp_path / "a.tif", values, volumetric=True, tile=(16, 16, 32), photometric="minisblack")
    array = TiffArray(path)
    for box in itertools.product((slice(0, 20), slice(15, 17)), (slice(3, 37),), (slice(31, 33),)):
        assert np.array_equal(array.read(box), values[box])


def test_white_as_zero_and_palettes_become_brightness(tmp_path):
    values = numbers(10, 12, dtype=np.uint8)
    inverted = TiffArray(write(tmp_path / "a.tif", values, photometric="miniswhite"))
    assert np.array_equal(inverted.read(whole(inverted)), 255 - values)
    bits = TiffArray(write(tmp_path / "b.tif", values > 100, photometric="miniswhite"))
    assert np.array_equal(bits.read(whole(bits)), values <= 100)
    ramp = np.stack([np.arange(255, -1, -1)] * 3).astype(np.uint16) * 257
    palette = TiffArray(write(tmp_path / "c.tif", values, photometric="palette", colormap=ramp))
    assert np.array_equal(palette.read(whole(palette)), 255 - values)


def test_a_region_of_a_huge_tiled_file_needs_its_tiles_alone(tmp_path):
    array = TiffArray(sparse_tiff(tmp_path / "a.tif"), max_image_pixels=1_000_000)
    assert array.shape == (100_000, 100_000)
    found = array.read((slice(3 * 256 - 10, 3 * 256 + 20), slice(5 * 256 - 4, 6 * 256 + 4)))
    assert found.shape == (30, 264)
    assert (found[10:, 4:-4] == 7).all() and found.sum() == 7 * 20 * 256


def test_a_region_of_a_mapped_file_leaves_the_rest_on_disk(tmp_path):
    path = tmp_path / "a.tif"
    values = tifffile.memmap(path, shape=(3, 6_000, 8_000), dtype=np.uint16, bigtiff=True, photometric="minisblack")
    values[1, 5_000:5_002, 7_000:7_003] = 9
    values.flush()
    array = TiffArray(path, max_image_pixels=1000)
    found = array.read((slice(1, 2), slice(4_999, 5_003), slice(6_999, 7_004)))
    assert found.sum() == 54 and found.nbytes == 40


def test_tiles_and_strips_of_oversized_headers_are_refused(tmp_path):
    values = np.zeros((300, 400), np.uint8)
    strips = write(tmp_path / "a.tif", values, compression="zlib", rowsperstrip=300)
    assert sentence(strips, max_image_pixels=100_000) == (
        "its strips hold 400 x 300 pixels each, more than data.max_image_pixels=100000; store it in smaller tiles"
    )
    tiles = write(tmp_path / "b.tif", values, compression="zlib", tile=(512, 512))
    assert sentence(tiles, max_image_pixels=100_000) == (
        "its tiles hold 512 x 512 pixels each, more than data.max_image_pixels=100000; store it in smaller tiles"
    )


def test_a_page_or_pixel_out_of_range_is_named(tmp_path):
    path = write(tmp_path / "a.tif", numbers(5, 20, 30), imagej=True, metadata={"axes": "ZYX"})
    everything = (slice(0, 20), slice(0, 30))
    assert sentence(path, (slice(7, 8), *everything)) == "page or slice 7 along Z is out of range; the file has 0..4"
    assert sentence(path, (slice(0, 1), slice(0, 21), slice(0, 30))) == (
        "pixel 20 along Y is out of range; the file has 0..19"
    )


def test_truncated_files_have_a_sentence(tmp_path):
    for number, (options, expected) in enumerate(
        (
            ({}, "the file is truncated: page 1 is cut off; copy it anew"),
            ({"metadata": None, "compression": "zlib"}, "the file is truncated: page 4 is cut off; copy it anew"),
        )
    ):
        path = write(tmp_path / f"{number}.tif", numbers(5, 50, 60), **options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        assert sentence(path) == expected
    path = write(tmp_path / "c.tif", numbers(50, 60))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    assert sentence(path) == f"the file is truncated: its pixels end at byte {size}, the file at byte {size - 10}"
    path.write_bytes(b"II*\0")
    assert "damaged or unknown TIFF file" in sentence(path)
    path.write_bytes(b"")
    assert sentence(path).startswith("damaged or unknown TIFF file (not a TIFF file")


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_pages_that_lead_round_in_a_circle_have_a_sentence(tmp_path, options):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, **options) as file:
        for page in numbers(120, 4, 5, dtype=np.uint8):
            file.write(page, contiguous=False, metadata=None)
    with tifffile.TiffFile(path) as file:
        start, end = file.pages[110].offset, file.pages.next_page_offset
        order = {"<": "little", ">": "big"}[file.byteorder]
        length = file.tiff.offsetsize
    content = bytearray(path.read_bytes())
    content[end : end + length] = start.to_bytes(length, order)
    path.write_bytes(bytes(content))
    assert sentence(path) == "damaged TIFF file: page 120 leads back to one before it"


def test_damaged_pixels_and_missing_files_have_a_sentence(tmp_path):
    path = write(tmp_path / "a.tif", numbers(50, 60), compression="zlib")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    path.write_bytes(bytes(content))
    assert sentence(path).startswith("damaged or unknown TIFF file (")
    assert sentence(tmp_path / "none.tif") == "No such file or directory"


def test_kinds_of_pixels_without_brightness_are_refused(tmp_path):
    values = numbers(20, 30, dtype=np.float32).astype(np.complex64)
    assert sentence(write(tmp_path / "a.tif", values)) == (
        "its pixels are complex64; store grey or RGB as integers or floats"
    )
    cmyk = write(tmp_path / "b.tif", numbers(20, 30, 4, dtype=np.uint8), photometric="separated")
    assert sentence(cmyk) == "its pixels are CMYK; store grey or RGB as integers or floats"


def test_other_files_that_metadata_names_are_not_opened(tmp_path):
    """OME lets a file say that some of its planes are in another one."""
    secret = write(tmp_path / "secret.ome.tif", np.full((20, 30), 9, np.uint8))
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image ID="Image:0">'
        '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="30" SizeY="20" SizeZ="2" SizeC="1" SizeT="1">'
        '<TiffData IFD="0" FirstZ="0" PlaneCount="1"><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>'
        f'<TiffData IFD="0" FirstZ="1" PlaneCount="1"><UUID FileName="../{secret.name}">urn:uuid:2</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    (tmp_path / "inside").mkdir()
    path = write(tmp_path / "inside" / "a.ome.tif", np.zeros((20, 30), np.uint8), description=xml, metadata=None)
    array = TiffArray(path)
    assert array.shape == (20, 30)
    assert not array.read(whole(array)).any()


def test_a_missing_codec_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", numbers(20, 30), compression="lzw")
    monkeypatch.setattr("tifffile.tifffile.imagecodecs", None)
    monkeypatch.setattr(tifffile.tifffile.TIFF.DECOMPRESSORS, "_codecs", {})
    text = sentence(path)
    assert text.startswith("its compression needs the package imagecodecs (")
    assert text.endswith("); install the extra: pip install 'dinov2-adapt[tiff]'")
