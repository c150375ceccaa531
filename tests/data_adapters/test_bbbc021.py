"""BBBC021: tables, channels, scaling, splits, training."""

import json
import os
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from support.bbbc021 import TREATMENTS, make_annotated_csv, make_bbbc021
from support.small_bbbc021 import FEW, IMAGES, MOAS, bbbc021, change, raw, sentence
from support.training import losses_of, metrics_of, train

from data_adapters.bbbc021_scaling import Window, histogram, percentile_window
from dinov2.errors import DatasetError

MOA_NAMES = sorted({moa for _, _, moa in TREATMENTS})


def test_rows_of_the_table_are_images_with_all_that_is_known_of_them(tmp_path):
    table = make_bbbc021(tmp_path, size=(24, 16))
    dataset = bbbc021(tmp_path)
    columns = dataset.metadata()
    assert len(dataset) == len(table) == 36
    assert dataset.path(3) == f"{tmp_path}/Week1/Week1_22123/{table['Image_FileName_Tubulin'][3]}"
    assert columns["compound"].tolist() == table["Image_Metadata_Compound"].tolist()
    assert columns["plate"].tolist() == table["Image_Metadata_Plate_DAPI"].tolist()
    assert columns["well"].tolist() == table["Image_Metadata_Well_DAPI"].tolist()
    assert columns["concentration"].dtype == np.float64
    assert columns["concentration"].tolist() == table["Image_Metadata_Concentration"].tolist()
    assert columns["batch"].tolist() == ["Week1"] * 18 + ["Week2"] * 18
    assert columns["site"].tolist() == ["1", "2"] * 18
    assert columns["replicate"].tolist() == ["1"] * 18 + ["2"] * 18
    assert columns["moa"][:6].tolist() == ["DMSO"] * 2 + ["Actin disruptors"] * 4
    assert columns["treatment"][:4].tolist() == ["DMSO 0"] * 2 + ["cytochalasin B 10"] * 2
    assert columns["control"].tolist() == ([True] * 2 + [False] * 16) * 2
    assert columns["group"].tolist() == columns["compound"].tolist()
    assert dataset.class_names == MOA_NAMES
    assert [MOA_NAMES[target] for target in dataset.get_targets()] == columns["moa"].tolist()
    image, target = dataset[2]
    assert (image.shape, image.dtype, target) == ((3, 16, 24), torch.uint8, 0)


@pytest.mark.parametrize("nesting", ["week", "plate", "archive"])
def test_images_are_found_however_the_folders_are_nested(tmp_path, nesting):
    make_bbbc021(tmp_path, treatments=FEW, sites=1, size=(24, 16), nesting=nesting)
    dataset = bbbc021(tmp_path)
    folder = {"week": "Week1/", "plate": "", "archive": "BBBC021_v1_images_Week1_22123/"}[nesting]
    assert dataset.path(0).startswith(f"{tmp_path}/{folder}Week1_22123/Week1_150607_B02_s1_w2")
    assert dataset[7][0].shape == (3, 16, 24)


def test_images_may_lie_in_a_folder_of_their_own(tmp_path):
    make_bbbc021(tmp_path / "pictures", treatments=FEW, sites=1, size=(24, 16))
    for name in (IMAGES, MOAS):
        (tmp_path / "pictures" / name).rename(tmp_path / name)
    assert bbbc021(tmp_path, images="pictures")[0][0].shape == (3, 16, 24)
    assert sentence(tmp_path) == (
        "none of the 2 folders that ROOT/BBBC021_v1_image.csv names is below ROOT: Week1/Week1_22123 is there neither "
        "as Week1/Week1_22123 nor as Week1_22123 nor as BBBC021_v1_images_Week1_22123/Week1_22123; set root= or "
        "images= to where the images are"
    )


@pytest.mark.parametrize(
    ("target", "first_names"),
    [
        ("compound", ["DMSO", "cytochalasin B", "latrunculin B", "taxol"]),
        ("treatment", ["DMSO 0", "cytochalasin B 10", "latrunculin B 3", "taxol 0.1"]),
        ("plate", ["Week1_22123", "Week2_24121"]),
        ("well", ["B02", "B03", "B04", "B05"]),
        ("batch", ["Week1", "Week2"]),
    ],
)
def test_anything_known_can_be_the_target(small_bbbc021, target, first_names):
    dataset = bbbc021(small_bbbc021, target=target)
    assert dataset.class_names == first_names
    assert [first_names[label] for label in dataset.get_targets()] == dataset.metadata()[target].tolist()
    assert dataset[5][1] == dataset.get_targets()[5]


def test_concentrations_are_joined_as_numbers(small_bbbc021):
    change(small_bbbc021, Image_Metadata_Concentration=(3, "1e-1"))
    assert pd.read_csv(small_bbbc021 / MOAS, dtype=str)["concentration"].tolist() == ["0.00", "10.00", "3.00", "0.10"]
    assert bbbc021(small_bbbc021).metadata()["moa"][3] == "Microtubule stabilizers"


def test_an_image_without_moa_has_no_label_and_can_be_left_out(tmp_path):
    make_bbbc021(tmp_path, treatments=[*FEW, ("new drug", 1.0, None)], sites=1, size=(24, 16))
    dataset = bbbc021(tmp_path)
    assert dataset[4][1] is None
    assert dataset.get_targets().tolist() == [1, 0, 0, 2, -1] * 2
    assert len(bbbc021(tmp_path, labelled_only="true")) == 8
    assert bbbc021(tmp_path, labelled_only="true", target="compound").class_names[-2:] == ["new drug", "taxol"]


def test_controls_can_be_left_out_or_kept_alone(small_bbbc021):
    assert bbbc021(small_bbbc021, controls="drop").class_names == ["Actin disruptors", "Microtubule stabilizers"]
    assert bbbc021(small_bbbc021, controls="only").metadata()["compound"].tolist() == ["DMSO", "DMSO"]
    change(small_bbbc021, Image_Metadata_Compound=(0, "taxol"), Image_Metadata_Concentration=(0, "0.1"))
    change(small_bbbc021, Image_Metadata_Compound=(4, "taxol"), Image_Metadata_Concentration=(4, "0.1"))
    assert sentence(small_bbbc021, controls="only") == "ROOT/BBBC021_v1_image.csv: no row is left with controls=only"


def test_training_without_the_moa_table_is_possible(small_bbbc021):
    (small_bbbc021 / MOAS).unlink()
    dataset = bbbc021(small_bbbc021, moa_csv="none")
    assert dataset.get_targets() is None and dataset.class_names == [] and dataset[0][1] is None
    assert sentence(small_bbbc021) == (
        "ROOT/BBBC021_v1_moa.csv is missing, and ROOT/BBBC021_v1_image.csv has no column moa; copy it there, or set "
        "moa_csv= to another table, moa_col= to a column, or moa_csv=none to do without MOA"
    )
    assert sentence(small_bbbc021, moa_csv="none", labelled_only="true") == (
        "ROOT/BBBC021_v1_image.csv does not tell the moa, which target=moa needs; moa_col= names it"
    )


def test_channels_are_stacked_in_the_order_asked_for(small_bbbc021):
    stacked = bbbc021(small_bbbc021, scaling="none", bits=16)[3][0]
    for place, channel in enumerate(("Tubulin", "Actin", "DAPI")):
        np.testing.assert_array_equal(stacked[place].numpy(), raw(small_bbbc021, 3, channel))
    other = bbbc021(small_bbbc021, scaling="none", bits=16, channels_order="dapi, Tubulin", channels=2)
    np.testing.assert_array_equal(other[3][0].numpy(), stacked[[2, 0]].numpy())
    assert other.path(3).rpartition("_w1")[1] == "_w1"


def test_a_single_channel_is_given_once_or_repeated(small_bbbc021):
    grey = bbbc021(small_bbbc021, dapi_only="true", channels=1)[3][0]
    assert grey.shape == (1, 16, 24)
    assert torch.equal(grey[0], bbbc021(small_bbbc021)[3][0][2])
    assert torch.equal(bbbc021(small_bbbc021, dapi_only="true", channels=3)[3][0], grey.expand(3, -1, -1))


@pytest.mark.parametrize("percentiles", [(0.1, 99.9), (0, 100), (2, 50)])
def test_windows_are_numpys_percentiles(percentiles):
    values = np.random.default_rng(0).gamma(2, 900, (31, 47)).astype(np.uint16)
    window = percentile_window(histogram(values), percentiles)
    assert [window.low, window.high] == np.percentile(values, percentiles, method="inverted_cdf").tolist()


@pytest.mark.parametrize("bits", [8, 16])
def test_scaling_agrees_with_a_plain_reference(small_bbbc021, bits):
    image = bbbc021(small_bbbc021, low_pct=1, high_pct=99, bits=bits)[5][0]
    assert image.dtype == {8: torch.uint8, 16: torch.uint16}[bits]
    full_scale = 2**bits - 1
    for place, channel in enumerate(("Tubulin", "Actin", "DAPI")):
        values = raw(small_bbbc021, 5, channel).astype(np.float64)
        low, high = np.percentile(values, (1, 99), method="inverted_cdf")
        expected = np.round(np.clip((values - low) / (high - low), 0, 1) * full_scale)
        np.testing.assert_array_equal(image[place].numpy(), expected)


def test_a_blank_channel_becomes_black():
    assert not Window(300, 300).table(8).any()


def test_windows_of_a_plate_or_the_dataset_are_measured_once_and_kept(small_bbbc021, monkeypatch):
    table = pd.read_csv(small_bbbc021 / IMAGES)
    of_plate = table["Image_Metadata_Plate_DAPI"] == "Week2_24121"
    for scaling, rows in (("plate", np.flatnonzero(of_plate)), ("dataset", range(8))):
        values = np.stack([raw(small_bbbc021, row) for row in rows]).astype(np.float64)
        low, high = np.percentile(values, (0.1, 99.9), method="inverted_cdf")
        expected = np.round(np.clip((raw(small_bbbc021, 6) - low) / (high - low), 0, 1) * 255)
        image = bbbc021(small_bbbc021, scaling=scaling, cache_dir=small_bbbc021 / "cache")[6][0]
        np.testing.assert_array_equal(image[2].numpy(), expected)
    reads = []
    monkeypatch.setattr("data_adapters.bbbc021_scaling.histogram", lambda plane: reads.append(1) or histogram(plane))
    again = bbbc021(small_bbbc021, scaling="plate", cache_dir=small_bbbc021 / "cache", split="val", val_fraction=0.9)
    assert not reads
    bbbc021(small_bbbc021, scaling="plate", cache_dir=small_bbbc021 / "cache", controls="drop", labelled_only="true")
    assert not reads
    row = again.metadata()["path"].tolist().index(bbbc021(small_bbbc021).path(6))
    assert torch.equal(again[row][0], bbbc021(small_bbbc021, scaling="plate")[6][0])
    reads.clear()
    bbbc021(small_bbbc021, scaling="plate", cache_dir=small_bbbc021 / "cache", sample_size=2)
    assert len(reads) == 2 * 2 * 3
    bbbc021(small_bbbc021, scaling="plate", cache_dir=small_bbbc021 / "cache", high_pct=90)
    assert len(reads) == 12 + 8 * 3
    os.utime(bbbc021(small_bbbc021).path(6), ns=(1, 1))
    bbbc021(small_bbbc021, scaling="plate", cache_dir=small_bbbc021 / "cache")
    assert len(reads) == 12 + 24 + 24


def test_a_sample_may_hold_an_unreadable_image_but_not_only_such(small_bbbc021):
    paths = bbbc021(small_bbbc021).metadata()["path"]
    for path in paths[:3]:
        open(path, "wb").close()
    assert bbbc021(small_bbbc021, scaling="plate")[3][0].shape == (3, 16, 24)
    open(paths[3], "wb").close()
    name = os.path.basename(paths[0])
    assert sentence(small_bbbc021, scaling="plate") == (
        "none of the 4 images looked at to scale plate Week1_22123 can be read; the first: Tubulin file "
        f"Week1/Week1_22123/{name}: the file is empty"
    )


@pytest.mark.parametrize("split_by", ["compound", "plate", "treatment", "well", "batch", "image"])
def test_splits_share_nothing_and_stay_when_plates_come(tmp_path, split_by):
    plates = [f"Week{number}_{number}0000" for number in range(3, 12)]
    treatments = [(f"drug {number}", 1.0, "DMSO") for number in range(10)]

    def parts(count):
        make_bbbc021(tmp_path, plates=plates[:count], treatments=treatments, sites=2, writes_images=False)
        options = {"split_by": split_by, "val_fraction": 0.4, "test_fraction": 0.3}
        return {split: bbbc021(tmp_path, split=split, **options) for split in ("train", "VAL", "test", "all")}

    def keys(dataset):
        columns = dataset.metadata()
        if split_by == "image":
            return set(columns["path"])
        if split_by == "well":
            return set(zip(columns["plate"], columns["well"], strict=True))
        return set(columns[split_by])

    before = parts(7)
    found = {split: keys(dataset) for split, dataset in before.items()}
    assert sum(len(before[split]) for split in ("train", "VAL", "test")) == len(before["all"]) == 140
    assert not found["train"] & found["VAL"] and not found["VAL"] & found["test"] and not found["train"] & found["test"]
    assert before["train"].class_names == before["VAL"].class_names == ["DMSO"]
    if split_by != "image":
        assert len(set(before["train"].groups())) == len(found["train"])
        assert not set(before["train"].groups()) & set(before["VAL"].groups())
    shutil.rmtree(tmp_path)
    after = parts(9)
    for split in ("train", "VAL", "test"):
        kept = {key for key in keys(after[split]) if split_by != "image" or key in found["all"]}
        assert found[split] <= kept and (kept - found[split]).isdisjoint(found["all"])


def test_an_annotated_table_of_a_lab_needs_no_conversion(tmp_path):
    images = make_bbbc021(tmp_path, sites=1, size=(24, 16), nesting="archive")
    make_annotated_csv(tmp_path, images)
    (tmp_path / MOAS).unlink()
    options = {"csv": "BBBC021_annotated_fixed.csv", "path_prefix": "../datasets/bbbc021"}
    dataset = bbbc021(tmp_path, **options)
    assert len(dataset) == 18
    assert dataset.class_names == ["0", "1", "2", "3", "4"]
    assert dataset.get_targets().tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4] * 2
    columns = dataset.metadata()
    assert set(columns["batch"]) == {"0", "1"} and set(columns["plate"]) == {"0", "1"}
    assert columns["treatment"][1] == "1" and "concentration" not in columns
    assert torch.equal(dataset[4][0], bbbc021(tmp_path, moa_csv="none")[4][0])
    assert sentence(tmp_path, csv="BBBC021_annotated_fixed.csv") == (
        "ROOT/BBBC021_annotated_fixed.csv, line 2: Image_FileName_Tubulin gives "
        f"'../datasets/bbbc021/BBBC021_v1_images_Week1_22123/Week1_22123/{images['Image_FileName_Tubulin'][0]}', which "
        "leads upwards by ..; paths must stay below ROOT, and path_prefix= names a beginning to leave out"
    )
    made = make_annotated_csv(tmp_path, images, prefix=f"{tmp_path}/")
    assert torch.equal(bbbc021(tmp_path, csv=made.name)[4][0], dataset[4][0])


@pytest.mark.parametrize("kind", ["pages", "samples", "png"])
def test_one_file_may_hold_all_channels(small_bbbc021, kind):
    original = bbbc021(small_bbbc021, scaling="none", bits=16)
    rows = []
    for index in range(len(original)):
        pixels = original[index][0].numpy()
        file = f"{index}.png" if kind == "png" else f"{index}.tif"
        if kind == "png":
            Image.fromarray((pixels >> 8).astype(np.uint8).transpose(1, 2, 0)).save(small_bbbc021 / file)
        elif kind == "pages":
            tifffile.imwrite(small_bbbc021 / file, pixels, photometric="minisblack")
        else:
            tifffile.imwrite(small_bbbc021 / file, pixels.transpose(1, 2, 0), photometric="rgb", compression="zlib")
        rows.append({"tile": file, "drug": f"drug {index}", "dose": 1, "MoA": "a" if index % 2 else "b", "plate": 7})
    pd.DataFrame(rows).to_csv(small_bbbc021 / "flat.csv", index=False)
    options = {"csv": "flat.csv", "path_col": "tile", "compound_col": "drug", "concentration_col": "dose"}
    dataset = bbbc021(small_bbbc021, scaling="none", bits=16, **options)
    expected = original[5][0]
    if kind == "png":
        expected = ((expected.int() >> 8) * 257).to(torch.uint16)
    assert torch.equal(dataset[5][0], expected)
    assert dataset.class_names == ["a", "b"] and dataset[5][1] == 0
    assert dataset.metadata()["treatment"][5] == "drug 5 1"
    grey = bbbc021(small_bbbc021, scaling="none", bits=16, channels=1, dapi_only="true", **options)
    assert torch.equal(grey[5][0], expected[2:])
    options |= {"file_channels": "'DAPI,Actin,Tubulin'"}
    grey = bbbc021(small_bbbc021, scaling="none", bits=16, channels=1, dapi_only="true", **options)
    assert torch.equal(grey[5][0], expected[:1])
    assert bbbc021(small_bbbc021, csv="flat.csv", path_col="tile")[5][0].dtype == torch.uint8
    assert set(dataset.metadata()) == {
        *("path", "target", "group", "control", "moa", "compound", "concentration", "treatment", "plate")
    }


def test_files_with_other_numbers_of_channels_are_refused(small_bbbc021):
    tifffile.imwrite(small_bbbc021 / "a.tif", np.zeros((2, 9, 9), np.uint16), photometric="minisblack")
    tifffile.imwrite(small_bbbc021 / "b.tif", np.zeros((3, 9, 9), np.float32), photometric="minisblack")
    tifffile.imwrite(small_bbbc021 / "c.tif", np.zeros((3, 9, 9), np.uint8), photometric="minisblack")
    (small_bbbc021 / "d.tif").write_bytes((small_bbbc021 / "c.tif").read_bytes()[:200])
    pd.DataFrame({"file": ["a.tif", "b.tif", "c.tif", "d.tif"], "moa": "x"}).to_csv(
        small_bbbc021 / "flat.csv", index=False
    )
    dataset = bbbc021(small_bbbc021, csv="flat.csv", path_col="file")

    def reason(index, dataset=dataset):
        with pytest.raises(DatasetError) as error:
            dataset[index]
        return str(error.value).removeprefix(f"image {index} ({dataset.path(index)}) cannot be read: ")

    assert reason(0) == "image file a.tif: it holds 2 channels or pages, but must hold 3 (file_channels=)"
    assert reason(1) == "image file b.tif: its pixels are float32; they must be whole numbers of 8 or 16 bits"
    assert reason(3).startswith("image file d.tif: ")
    limited = bbbc021(small_bbbc021, csv="flat.csv", path_col="file", max_image_pixels=80)
    assert reason(2, limited) == (
        "image file c.tif: 9 x 9 pixels are more than data.max_image_pixels=80; raise it if the image is what it "
        "claims to be"
    )


def test_a_dataset_can_be_handed_to_workers(small_bbbc021):
    dataset = bbbc021(small_bbbc021, scaling="plate", cache_dir=small_bbbc021 / "cache")
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[5][0], dataset[5][0])
    assert copy.metadata()["path"].tolist() == dataset.metadata()["path"].tolist()


@pytest.mark.parametrize(("dapi_only", "bits"), [("true", 8), ("false", 16)])
def test_twenty_steps_of_training_with_k_nn(tmp_path, dapi_only, bits):
    make_bbbc021(tmp_path / "data", plates=("Week1_22123", "Week2_24121", "Week3_25421"), size=(48, 40))
    string = f"BBBC021:root={tmp_path / 'data'}:dapi_only={dapi_only}:bits={bits}:scaling=plate:split_by=plate"
    options = (
        f"train.dataset_path={string}:split=ALL",
        f"evaluation.knn.train_dataset_path={string}:split=train:val_fraction=0.4",
        f"evaluation.knn.val_dataset_path={string}:split=val:val_fraction=0.4",
        f"student.in_chans={1 if dapi_only == 'true' else 3}",
        "train.OFFICIAL_EPOCH_LENGTH=20",
        "train.batch_size_per_gpu=6",
        "evaluation.eval_period_iterations=20",
        "evaluation.knn.nb_knn=[5]",
    )
    assert train(tmp_path / "run", *options) == 0
    assert len(metrics_of(tmp_path / "run")) == 20
    assert np.isfinite(losses_of(tmp_path / "run").numpy()).all()
    result = json.loads((tmp_path / "run/eval/training_19/results_eval_knn.json").read_text())
    assert 0 <= result["knn5_top1_pct"] <= 100
