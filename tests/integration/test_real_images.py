"""Microscopy, histology and drawings from packages: opened, cropped, and trained on by the program."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from support.real_images import clipart_folder, hyperspy_folder, stardist_images, write_histology_tiles
from support.training import losses_of, metrics_of, train

from dinov2.data import DataAugmentationDINO, make_dataset
from dinov2.data.stain import TARGET_MEANS_LAB, TARGET_STDS_LAB, tissue_statistics

pytestmark = pytest.mark.integration

AUGMENTATION = {"global_crops_size": 32, "local_crops_size": 16}


def train_twenty_steps(tmp_path, dataset, channels):
    options = ("train.OFFICIAL_EPOCH_LENGTH=20", "train.batch_size_per_gpu=6", "train.num_workers=1")
    code = train(tmp_path / "run", f"train.dataset_path={dataset}", f"student.in_chans={channels}", *options)
    assert code == 0
    assert len(metrics_of(tmp_path / "run")) == 20
    assert torch.isfinite(losses_of(tmp_path / "run")).all()


def crops_of_all(dataset, channels):
    """Cut crops of every image; returns how many there were of each kind of number."""
    augmentation = DataAugmentationDINO((0.3, 1.0), (0.05, 0.3), 2, in_chans=channels, **AUGMENTATION)
    kinds = {}
    for index in range(len(dataset)):
        crops = augmentation.crop(dataset.encoded_image(index), seed=index)
        assert [len(crops[name]) for name in ("global_crops", "local_crops")] == [2, 2]
        kinds[crops["global_crops"][0].dtype] = kinds.get(crops["global_crops"][0].dtype, 0) + 1
    return kinds


@pytest.fixture(scope="module")
def micrographs(tmp_path_factory):
    """stardist's 16-bit TIFF files, 2-D and of 31 pages, and all of hyperspy's TIFF and HDF5 micrographs."""
    root = tmp_path_factory.mktemp("micrographs")
    for name in ("img2d.tif", "img3d.tif"):
        (root / "fluorescence").mkdir(exist_ok=True)
        shutil.copy(stardist_images() / name, root / "fluorescence")
    (root / "electrons").mkdir()
    files = hyperspy_folder() / "tests" / "io" / "tiff_files"
    for path in [*files.glob("*.tif"), *files.glob("*.tiff")]:
        shutil.copy(path, root / "electrons")
    for path in files.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.lower().endswith((".tif", ".tiff")):
                    (root / "electrons" / f"{path.stem}_{Path(name).name}").write_bytes(archive.read(name))
    for path in (hyperspy_folder() / "misc" / "holography" / "example_signals").glob("*.hdf5"):
        shutil.copy(path, root / "electrons")
    return root


def test_sixteen_bit_files_and_pages_are_what_tifffile_reads(micrographs):
    window = "scaling=window:low=0:high=65535:bits=16"
    dataset = make_dataset(f"EMFolder:root={micrographs / 'fluorescence'}:{window}", channels=1)
    flat, volume = (tifffile.imread(micrographs / "fluorescence" / name) for name in ("img2d.tif", "img3d.tif"))
    assert len(dataset) == 1 + 31 == 1 + len(volume)
    assert np.array_equal(dataset.encoded_image(0).to_tensor()[0].numpy(), flat)
    for index, page in enumerate(volume):
        assert np.array_equal(dataset.encoded_image(1 + index).to_tensor()[0].numpy(), page)
    sideways = make_dataset(f"EMFolder:root={micrographs / 'fluorescence'}:axis=x:slices=20:{window}", channels=1)
    assert np.array_equal(sideways.encoded_image(1).to_tensor()[0].numpy(), volume[:, :, 20])


@pytest.mark.parametrize("channels", [1, 3])
def test_every_micrograph_is_opened_and_cropped(micrographs, channels):
    dataset = make_dataset(f"EMFolder:root={micrographs}", channels=channels)
    assert dataset.class_names == ["electrons", "fluorescence"]
    assert len(set(dataset.metadata()["file"])) >= 14
    assert crops_of_all(dataset, channels) == {torch.uint8: len(dataset)}
    blank = {
        Path(dataset.path(index)).name
        for index in range(len(dataset))
        if dataset.encoded_image(index).to_tensor().to(torch.float32).std() < 1
    }
    # hyperspy emptied these three of its files
    assert len(blank) == 3 and all("navcam" in name for name in blank)


def test_micrographs_as_tiles_of_sixteen_bits(micrographs):
    dataset = make_dataset(f"EMFolder:root={micrographs}:tile_px=64:bits=16", channels=1)
    whole = make_dataset(f"EMFolder:root={micrographs}", channels=1)
    assert len(dataset) > 3 * len(whole)
    kinds = crops_of_all(dataset, 1)
    assert kinds == {torch.uint16: len(dataset)}


@pytest.mark.parametrize(("channels", "options"), [(1, ":tile_px=64:bits=16"), (3, "")])
def test_it_trains_on_micrographs(micrographs, tmp_path, channels, options):
    train_twenty_steps(tmp_path, f"EMFolder:root='{micrographs}'{options}", channels)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Tiles of two slides, and glass; see `write_histology_tiles`."""
    root = tmp_path_factory.mktemp("tiles")
    write_histology_tiles(root)
    return root


def test_the_default_target_is_the_section_it_was_measured_on():
    pixels = np.asarray(Image.open(stardist_images() / "histo.jpg").convert("RGB"))
    found = tissue_statistics(pixels)
    assert found.means_lab == pytest.approx(TARGET_MEANS_LAB, abs=0.06)  # the target is given with one decimal
    assert found.stds_lab == pytest.approx(TARGET_STDS_LAB, abs=0.06)


def test_normalised_slides_have_one_stain(tiles):
    string = f"Histology:csv=files.csv:label_col=label:slide_col=slide:root={tiles}"
    means = {}
    for kind in ("none", "reinhard"):
        dataset = make_dataset(f"{string}:stain_norm={kind}")
        slides = dataset.metadata()["slide"]
        for slide in ("left", "right"):
            rows = [index for index in np.flatnonzero(slides == slide) if "glass" not in dataset.path(index)]
            images = (dataset.encoded_image(index).to_tensor().permute(1, 2, 0).contiguous() for index in rows)
            found = [tissue_statistics(image.numpy()).means_lab for image in images]
            means[kind, slide] = np.mean(found, axis=0)
        glass = next(index for index in range(len(dataset)) if "glass" in dataset.path(index))
        assert (dataset.encoded_image(glass).to_tensor() == 255).all() and dataset[glass][1] is None
    assert np.abs(means["none", "left"] - means["none", "right"]).max() > 10
    assert np.abs(means["reinhard", "left"] - means["reinhard", "right"]).max() < 1


@pytest.mark.parametrize("channels", [1, 3])
def test_it_trains_on_histology(tiles, tmp_path, channels):
    string = f"Histology:csv=files.csv:slide_col=slide:root='{tiles}'"
    train_twenty_steps(tmp_path, string + (":stain_norm=reinhard" if channels == 3 else ""), channels)


def test_it_trains_on_class_folders_of_tiles(tiles, tmp_path):
    train_twenty_steps(tmp_path, f"Histology:root='{tiles}':stain_norm=reinhard:classes=left", 3)


@pytest.mark.parametrize("name", ["ImageFolder", "EMFolder"])
def test_it_trains_on_drawings_with_palettes_and_alpha(tmp_path, name):
    string = f"{name}:root='{clipart_folder()}'"
    dataset = make_dataset(string, channels=3)
    assert len(dataset) > 200 and {"birds", "bugs", "mammals"} <= set(dataset.class_names)
    assert {Image.open(dataset.path(index)).mode for index in range(len(dataset))} - {"RGB"}
    train_twenty_steps(tmp_path, string, 3)
