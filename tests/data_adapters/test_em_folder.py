import json
import os
import pickle
import sys

import h5py
import mrcfile
import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from support.images import encode, photo
from support.tiff_files import sparse_tiff
from support.training import losses_of, metrics_of, train

from dinov2.data import DataAugmentationDINO, make_dataset
from dinov2.data.datasets.image_source import RegionSource
from dinov2.errors import ConfigError, DatasetError


def em_folder(root, *, channels=1, cache_dir=None, max_image_pixels=10**8, **options):
    text = f"EMFolder:root='{root}'" + "".join(f":{key}='{value}'" for key, value in options.items())
    return make_dataset(text, channels=channels, cache_dir=cache_dir, max_image_pixels=max_image_pixels)


def stack(*shape, dtype=np.uint16):
    return np.random.default_rng(0).integers(100, 4000, shape).astype(dtype)


def sentence(root, error_class=DatasetError, **options):
    with pytest.raises(error_class) as error:
        em_folder(root, **options)
    return str(error.value).replace(str(root), "ROOT")


def reading(dataset, index=0):
    """Sentence of reading one image."""
    with pytest.raises(DatasetError) as error:
        dataset[index]
    return str(error.value).replace(str(dataset.root), "ROOT")


def pixels(dataset, index):
    return dataset.encoded_image(index).to_tensor()[0].numpy()


def scaled(values, low, high, full_scale=65535):
    return np.round(np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * full_scale)


WINDOW = {"scaling": "window", "low": 0, "high": 65535, "bits": 16}  # 16-bit numbers as they are


def write_mrc(path, values):
    with mrcfile.new(path) as file:
        file.set_data(values)


def write_hdf5(path, values, name="volumes/raw"):
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=values, chunks=(1, 16, 16))
        file["notes"] = [1, 2, 3]


def write_zarr(path, values, *, zarr_format=3, attributes=None):
    group = zarr.open_group(path, mode="w", zarr_format=zarr_format, attributes=attributes)
    group.create_array("0", shape=values.shape, dtype=values.dtype, chunks=(1, 16, 16))[:] = values


WRITERS = {
    "stack.tif": lambda path, values: tifffile.imwrite(path, values, photometric="minisblack"),
    "tiled.tiff": lambda path, values: tifffile.imwrite(
        path, values, tile=(16, 16), compression="zlib", photometric="minisblack", bigtiff=True
    ),
    "volume.mrc": write_mrc,
    "volume.h5": write_hdf5,
    "volume.zarr": write_zarr,
    "old.zarr": lambda path, values: write_zarr(path, values, zarr_format=2),
}


@pytest.mark.parametrize("name", WRITERS)
def test_slices_of_a_stack_are_images(tmp_path, name):
    values = stack(5, 24, 40)
    WRITERS[name](tmp_path / name, values)
    dataset = em_folder(tmp_path, **WINDOW)
    assert len(dataset) == 5
    for index in range(5):
        assert np.array_equal(pixels(dataset, index), values[index])
        assert dataset.path(index) == f"{tmp_path}/{name}, slice {index}"
        assert dataset.file(index) == f"{tmp_path}/{name}"
    source = dataset.encoded_image(2)
    assert isinstance(source, RegionSource) and (source.height, source.width) == (24, 40)
    assert np.array_equal(source.read_region(3, 5, 7, 9)[0].numpy(), values[2, 3:10, 5:14])
    assert set(dataset.groups().tolist()) == {0}


@pytest.mark.parametrize("name", WRITERS)
def test_a_stack_can_be_cut_the_other_ways(tmp_path, name):
    values = stack(5, 24, 40)
    WRITERS[name](tmp_path / name, values)
    from_the_side = em_folder(tmp_path, axis="x", **WINDOW)
    assert len(from_the_side) == 40
    assert np.array_equal(pixels(from_the_side, 33), values[:, :, 33])
    from_the_front = em_folder(tmp_path, axis="Y", slices="10-12", **WINDOW)
    assert len(from_the_front) == 3
    assert np.array_equal(pixels(from_the_front, 2), values[:, 12])
    assert from_the_front.metadata()["slice"].tolist() == [10, 11, 12]


def test_other_axes_are_gone_through_too_or_become_channels(tmp_path):
    values = stack(2, 3, 20, 30)
    tifffile.imwrite(tmp_path / "a.tif", values, imagej=True, metadata={"axes": "ZCYX"})
    dataset = em_folder(tmp_path, **WINDOW)
    assert len(dataset) == 6
    found = np.stack([pixels(dataset, index) for index in range(6)])
    assert np.array_equal(found, values.transpose(1, 0, 2, 3).reshape(6, 20, 30))
    with_channels = em_folder(tmp_path, channel_axis="c", channels=3, **WINDOW)
    assert len(with_channels) == 2
    assert np.array_equal(with_channels.encoded_image(1).to_tensor().numpy(), values[1])
    assert "has 3 channels, but student.in_chans=4" in reading(
        em_folder(tmp_path, channel_axis="c", channels=4, **WINDOW)
    )


def test_transparency_is_left_out_and_samples_can_be_channels(tmp_path):
    values = stack(20, 30, 4)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unassalpha"])
    colour = em_folder(tmp_path, channels=3, **WINDOW)
    assert len(colour) == 1
    assert np.array_equal(colour.encoded_image(0).to_tensor().numpy(), values[..., :3].transpose(2, 0, 1))
    assert colour.encoded_image(0).channels == 3
    all_four = em_folder(tmp_path, channels=4, channel_axis="s", **WINDOW)
    assert np.array_equal(all_four.encoded_image(0).to_tensor().numpy(), values.transpose(2, 0, 1))


def test_pictures_of_any_kind_work(tmp_path):
    grey = (stack(20, 30) // 16).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("1").save(tmp_path / "one_bit.png")
    Image.fromarray(stack(20, 30)).save(tmp_path / "sixteen.png")
    photo(size=(30, 20)).convert("P").save(tmp_path / "palette.png")
    photo(size=(30, 20)).convert("RGBA").save(tmp_path / "alpha.png")
    photo(size=(30, 20)).convert("CMYK").save(tmp_path / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(size=(20, 30)).save(tmp_path / "turned.jpg", exif=exif)
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(encode(photo(size=(30, 20)), "PNG"))
    for channels in (1, 3):
        dataset = em_folder(tmp_path, channels=channels)
        assert len(dataset) == 8
        for index in range(8):
            found = dataset.encoded_image(index).to_tensor()
            assert (found.shape, found.dtype) == ((channels, 20, 30), torch.uint8)
            assert found.to(torch.float32).std() > 0
    dataset = em_folder(tmp_path)
    by_name = {os.path.basename(dataset.path(index)): index for index in range(8)}
    assert np.array_equal(pixels(dataset, by_name["grey.png"]), grey)
    # 16 bits are spread by percentiles
    assert pixels(dataset, by_name["sixteen.png"]).max() == 255


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint32", "float32"])
def test_32_bits_and_signed_numbers_are_windowed_to_16(tmp_path, dtype):
    values = stack(30, 40, dtype=dtype)
    tifffile.imwrite(tmp_path / "a.tif", values)
    by_window = pixels(em_folder(tmp_path, scaling="window", low=500, high=3500, bits=16), 0)
    assert by_window.dtype == np.uint16
    # float32 holds 24 bits, of which 16 are asked for
    assert np.abs(by_window - scaled(values, 500, 3500)).max() <= 1
    low, high = np.percentile(values, [0.1, 99.9], method="inverted_cdf")
    unasked = pixels(em_folder(tmp_path, bits=16), 0)
    assert np.abs(unasked - scaled(values, low, high)).max() <= 1
    low, high = np.percentile(values, [5, 90], method="inverted_cdf")
    asked = pixels(em_folder(tmp_path, scaling="percentile", low=5, high=90), 0)
    assert np.abs(asked - scaled(values, low, high, 255)).max() <= 1


def test_tiles_cover_a_plane_and_are_the_same_each_time(tmp_path):
    values = stack(2, 50, 70)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    Image.fromarray(values[0]).save(tmp_path / "b.png")
    tifffile.imwrite(tmp_path / "small.tif", values[0, :20, :25])
    dataset = em_folder(tmp_path, tile_px=32, **WINDOW)
    assert len(dataset) == 2 * 6 + 6 + 1
    tops, lefts = (0, 18), (0, 32, 38)
    corners = [(top, left) for top in tops for left in lefts]
    for index in range(18):
        plane = values[0] if index >= 12 else values[index // 6]
        top, left = corners[index % 6]
        assert np.array_equal(pixels(dataset, index), plane[top : top + 32, left : left + 32])
    assert np.array_equal(pixels(dataset, 18), values[0, :20, :25])
    assert dataset.path(7) == f"{tmp_path}/a.tif, slice 1, tile 1"
    columns = dataset.metadata()
    assert columns["slice"].tolist() == [0] * 6 + [1] * 6 + [0] * 7
    assert columns["tile"].tolist() == [*range(6)] * 3 + [0]
    assert columns["file"].tolist() == [f"{tmp_path}/a.tif"] * 12 + [f"{tmp_path}/b.png"] * 6 + [
        f"{tmp_path}/small.tif"
    ]
    assert set(columns) == {"path", "file", "group", "slice", "tile"}


def test_tiles_of_a_plane_share_its_window(tmp_path):
    values = np.tile(np.linspace(0, 40_000, 64).astype(np.uint16), (64, 1))
    tifffile.imwrite(tmp_path / "a.tif", values)
    dataset = em_folder(tmp_path, tile_px=32, scaling="percentile", low=0, high=100)
    left, right = pixels(dataset, 0), pixels(dataset, 1)
    assert (left.min(), right.max()) == (0, 255) and left.max() < right.min()


def test_a_file_larger_than_the_limit_is_read_in_parts(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(300, 400), tile=(64, 64), compression="zlib")
    whole = em_folder(tmp_path, max_image_pixels=20_000, scaling="dtype")
    assert reading(whole) == (
        "image 0 (ROOT/a.tif) cannot be read: 400 x 300 pixels at once are more than data.max_image_pixels=20000; set "
        "tile_px= to take the image in parts, or raise the limit"
    )
    assert whole.encoded_image(0).read_region(100, 100, 50, 50).shape == (1, 50, 50)
    tiles = em_folder(tmp_path, max_image_pixels=20_000, scaling="dtype", tile_px=100)
    assert len(tiles) == 12 and tiles[11][0].shape == (1, 100, 100)


def test_a_header_of_100000_by_100000_px_is_read_by_region_alone(tmp_path):
    sparse_tiff(tmp_path / "a.tif")
    whole = em_folder(tmp_path, max_image_pixels=178_956_970)
    assert reading(whole) == (
        "image 0 (ROOT/a.tif) cannot be read: 100000 x 100000 pixels at once are more than "
        "data.max_image_pixels=178956970; set tile_px= to take the image in parts, or raise the limit"
    )
    augmentation = DataAugmentationDINO((1e-6, 1e-4), (1e-7, 1e-6), 4, 32, 16, in_chans=1)
    assert augmentation.crop(whole.encoded_image(0), seed=0)["global_crops"][1].shape == (1, 32, 32)
    tiles = em_folder(tmp_path, tile_px=256)
    assert len(tiles) == 391**2
    assert (tiles[3 * 391 + 5][0] == 7).all() and not tiles[3 * 391 + 6][0].any()


def test_folders_are_labels_and_a_file_is_never_in_two_splits(tmp_path):
    for number in range(24):
        folder = tmp_path / ("brain", "liver")[number % 2] / f"grid{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(folder / f"{number}.tif", stack(2, 8, 9), photometric="minisblack")
    tifffile.imwrite(tmp_path / "stray.tif", stack(8, 9))
    dataset = em_folder(tmp_path)
    assert len(dataset) == 49 and dataset.class_names == ["brain", "liver"]
    assert dataset.get_targets().tolist() == [0] * 24 + [1] * 24 + [-1]
    assert dataset[30][1] == 1 and dataset[48][1] is None
    parts = {split: em_folder(tmp_path, split=split, val_fraction=0.4) for split in ("train", "VAL")}
    files = {split: set(part.metadata()["file"]) for split, part in parts.items()}
    assert len(files["train"]) + len(files["VAL"]) == 25 and not files["train"] & files["VAL"]
    groups = {split: set(em_folder(tmp_path, split=split, split_by="level2").metadata()["group"]) for split in parts}
    assert groups["train"] and not groups["train"] & groups["VAL"]
    assert len(em_folder(tmp_path, classes="liver")) == 24
    assert len(em_folder(tmp_path, exclude="grid0")) == 33
    assert em_folder(tmp_path, label_level=0).get_targets() is None
    assert em_folder(tmp_path, one_per_group=True).groups().tolist() == [n // 2 for n in range(49)]


def test_headers_are_read_once_and_kept_in_the_cache(tmp_path):
    (tmp_path / "data").mkdir()
    tifffile.imwrite(tmp_path / "data" / "a.tif", stack(3, 8, 9), photometric="minisblack")
    first = em_folder(tmp_path / "data", cache_dir=str(tmp_path / "cache"))
    names = sorted(os.listdir(tmp_path / "cache" / "index"))
    assert any(name.startswith("planes-") and name.endswith(".index") for name in names)
    again = em_folder(tmp_path / "data", cache_dir=str(tmp_path / "cache"))
    assert len(first) == len(again) == 3
    assert os.listdir(tmp_path / "data") == ["a.tif"]


def test_a_file_that_could_not_be_read_is_looked_at_again(tmp_path):
    (tmp_path / "data").mkdir()
    tifffile.imwrite(tmp_path / "data" / "a.tif", stack(8, 9))
    tifffile.imwrite(tmp_path / "data" / "b.tif", stack(3, 8, 9), photometric="minisblack", compression="lzw")
    content = (tmp_path / "data" / "b.tif").read_bytes()
    (tmp_path / "data" / "b.tif").write_bytes(b"")
    options = {"cache_dir": str(tmp_path / "cache")}
    assert len(em_folder(tmp_path / "data", **options)) == 2
    (tmp_path / "data" / "b.tif").write_bytes(content)  # which does not change the folder
    assert len(em_folder(tmp_path / "data", **options)) == 4


def test_one_bad_file_among_good_ones_is_an_error_where_it_is_read(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(8, 9))
    (tmp_path / "b.tif").write_bytes(b"")
    (tmp_path / "c.png").write_bytes(b"")
    values = stack(8, 9, dtype=np.float32)
    values[2, 3] = np.nan
    tifffile.imwrite(tmp_path / "d.tif", values)
    dataset = em_folder(tmp_path, cache_dir=None)
    assert len(dataset) == 4
    assert dataset[0][0].shape == (1, 8, 9)
    assert reading(dataset, 1).startswith("image 1 (ROOT/b.tif) cannot be read: damaged or unknown TIFF file (")
    assert reading(dataset, 2) == "image 2 (ROOT/c.png) cannot be read: the file is empty"
    assert reading(dataset, 3) == (
        "image 3 (ROOT/d.tif) cannot be read: 1 of its numbers are NaN or infinite; fill them in before training"
    )


def test_a_folder_without_a_readable_image_is_an_error(tmp_path):
    assert sentence(tmp_path) == "folder ROOT is empty"
    assert sentence(tmp_path / "none") == "folder ROOT does not exist; check root= in the dataset string"
    (tmp_path / "a.tif").write_bytes(b"II")
    assert sentence(tmp_path).startswith(
        "folder ROOT: none of the first 1 of its 1 images can be read; the first: image 0 (ROOT/a.tif) cannot be read: "
        "damaged or unknown TIFF file ("
    )


def test_a_slice_out_of_range_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", stack(31, 8, 9), photometric="minisblack")
    assert sentence(tmp_path, slices="40").endswith(
        "image 0 (ROOT/a.tif) cannot be read: slice 40 is out of range; the file has 0..30"
    )
    tifffile.imwrite(tmp_path / "a.tif", stack(8, 9))
    assert sentence(tmp_path, axis="y").endswith("cannot be read: its axes are YX; axis=y needs a stack")
    assert sentence(tmp_path, channel_axis="c").endswith("its axes are YX; channel_axis=c is none of them")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"axis": "t"}, "axis=t must be z, y or x"),
        ({"tile_px": 0}, "tile_px=0 must be at least 1"),
        ({"scaling": "log"}, "scaling=log must be one of dtype, percentile, window"),
        ({"scaling": "window", "low": 3}, "scaling=window needs low= and high=, the numbers of black and white"),
        ({"scaling": "window", "low": 3, "high": 2}, "low=3 must be below high=2"),
        ({"scaling": "percentile", "high": 101}, "low=0.1:high=101 must be percentages, 0..100"),
        ({"low": 3}, "low=3.0 must be left out without scaling=percentile or scaling=window"),
        ({"slices": "a-b"}, "slices=a-b must be a number, or two such as 10-19"),
        ({"slices": "9-3"}, "slices=9-3 must be a rising range"),
        ({"channel_axis": "x"}, "channel_axis=x must be a letter other than z, y and x"),
        ({"label_level": -1}, "label_level=-1 must be at least 0"),
        ({"split_by": "plate"}, "split_by=plate must be path, folder, or level1, level2, ..."),
    ],
)
def test_wrong_options_are_config_errors(tmp_path, options, expected):
    tifffile.imwrite(tmp_path / "a.tif", stack(8, 9))
    message = sentence(tmp_path, ConfigError, **options)
    assert message.removeprefix("dataset EMFolder: ") == expected


def test_arrays_of_hdf5_and_zarr_are_named_where_there_are_several(tmp_path):
    values = stack(3, 20, 30)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["volumes/raw"], file["volumes/labels"] = values, values // 2
    assert sentence(tmp_path).endswith(
        "it holds 2 arrays of numbers with two axes or more (volumes/labels, volumes/raw); array= names one"
    )
    assert sentence(tmp_path, array="volumes/row").endswith(
        "it has no array 'volumes/row' of numbers with two axes or more; did you mean volumes/raw? known are "
        "volumes/labels, volumes/raw"
    )
    dataset = em_folder(tmp_path, array="/volumes/labels", axes="xzy", **WINDOW)
    assert len(dataset) == 20
    assert np.array_equal(pixels(dataset, 7), (values // 2)[:, 7].T)
    assert sentence(tmp_path, array="volumes/raw", axes="yx").endswith(
        "its array has 3 axes [3, 20, 30], which YX does not name; set axes= to a letter for each, with Y and X"
    )


def test_ome_zarr_names_its_array_and_axes(tmp_path):
    values = stack(2, 20, 30)
    axes = [{"name": name} for name in "cyx"]
    scales = [{"axes": axes, "datasets": [{"path": "0"}, {"path": "1"}]}]
    attributes_of = {3: {"ome": {"multiscales": scales}}, 2: {"multiscales": scales}}
    for zarr_format, attributes in attributes_of.items():
        path = tmp_path / str(zarr_format) / "a.zarr"
        write_zarr(path, values, zarr_format=zarr_format, attributes=attributes)
        zarr.open_group(path).create_array("1", shape=(2, 10, 15), dtype="uint16")
        dataset = em_folder(tmp_path / str(zarr_format), channel_axis="c", channels=2, **WINDOW)
        assert len(dataset) == 1
        assert np.array_equal(dataset.encoded_image(0).to_tensor().numpy(), values)


def test_links_of_hdf5_and_zarr_to_other_files_are_not_followed(tmp_path):
    write_hdf5(tmp_path / "secret.h5", stack(3, 20, 30))
    root = tmp_path / "root"
    root.mkdir()
    with h5py.File(root / "a.h5", "w") as file:
        file["raw"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "volumes/raw")
    assert "it holds 0 arrays of numbers with two axes or more (none)" in sentence(root)
    assert "it has no array 'raw'" in sentence(root, array="raw")
    (tmp_path / "secret.bin").write_bytes(bytes(600))
    with h5py.File(root / "a.h5", "w") as file:
        file.create_dataset("raw", (20, 30), dtype="u1", external=[(str(tmp_path / "secret.bin"), 0, 600)])
    assert "its array lies in other files; store the numbers in the file itself" in sentence(root)
    (root / "a.h5").unlink()
    write_zarr(root / "a.zarr", stack(3, 20, 30))
    chunk = root / "a.zarr" / "0" / "c" / "0" / "0" / "0"
    chunk.rename(tmp_path / "chunk")
    chunk.symlink_to(tmp_path / "chunk")
    assert "link ROOT/a.zarr/0/c/0/0/0 leaves the dataset's folder" in sentence(root)


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ({"id": "base64"}, "its codec 'base64' is not known to be safe; store it with blosc or zstd"),
        ({"id": "pickle", "protocol": 5}, "damaged file (No Zarr data type found"),  # zarr's own refusal
    ],
)
def test_codecs_that_do_more_than_compress_are_refused(tmp_path, codec, expected):
    write_zarr(tmp_path / "a.zarr", stack(3, 20, 30), zarr_format=2)
    path = tmp_path / "a.zarr" / "0" / ".zarray"
    metadata = json.loads(path.read_text())
    metadata["compressor"] = codec
    path.write_text(json.dumps(metadata))
    assert expected in sentence(tmp_path)


def test_chunks_of_oversized_arrays_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", (100_000, 100_000), dtype="u1", chunks=(20_000, 20_000), compression="gzip")
    assert sentence(tmp_path).endswith(
        "its chunks hold 400000000 numbers each, more than data.max_image_pixels=100000000; store it in smaller chunks"
    )


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("volume.mrc", "mrcfile", "mrc"), ("volume.h5", "h5py", "hdf5"), ("volume.zarr", "zarr", "zarr")],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name, package, extra):
    WRITERS[name](tmp_path / name, stack(3, 20, 30))
    monkeypatch.setitem(sys.modules, package, None)
    assert sentence(tmp_path, ConfigError) == (
        f"reading this kind of file needs the package {package}; install the extra: pip install 'dinov2-adapt[{extra}]'"
    )


def test_damaged_files_of_packages_have_a_sentence(tmp_path):
    write_mrc(tmp_path / "a.mrc", stack(3, 20, 30))
    (tmp_path / "a.mrc").write_bytes((tmp_path / "a.mrc").read_bytes()[:-9])
    assert "cannot be read: damaged file (mmap length is greater than file size)" in sentence(tmp_path)
    (tmp_path / "a.mrc").unlink()
    (tmp_path / "a.h5").write_bytes(b"x" * 100)
    assert "(ROOT/a.h5) cannot be read: damaged file (" in sentence(tmp_path)


def test_it_goes_to_workers_and_more_files_than_are_kept_open(tmp_path):
    for number in range(12):
        tifffile.imwrite(tmp_path / f"{number:02d}.tif", stack(2, 8, 9) + number, photometric="minisblack")
    dataset = em_folder(tmp_path, **WINDOW)
    before = [pixels(dataset, index) for index in range(24)]
    copy = pickle.loads(pickle.dumps(dataset))
    sources = [copy.encoded_image(index) for index in range(24)]  # all at once
    for source, expected in zip(sources, before, strict=True):
        assert np.array_equal(source.to_tensor()[0].numpy(), expected)


@pytest.mark.parametrize(("channels", "options"), [(1, ""), (3, ":tile_px=24:bits=16")])
def test_it_trains_twenty_steps_with_workers(tmp_path, channels, options):
    (tmp_path / "data").mkdir()
    for name, write in WRITERS.items():
        write(tmp_path / "data" / name, stack(4, 30, 40))
    Image.fromarray((stack(30, 40) // 16).astype(np.uint8)).save(tmp_path / "data" / "a.png")
    code = train(
        tmp_path / "run",
        f"train.dataset_path=EMFolder:root='{tmp_path / 'data'}'{options}",
        f"student.in_chans={channels}",
        "train.OFFICIAL_EPOCH_LENGTH=20",
        "train.batch_size_per_gpu=6",
        "train.num_workers=2",
    )
    assert code == 0
    assert len(metrics_of(tmp_path / "run")) == 20
    assert torch.isfinite(losses_of(tmp_path / "run")).all()
