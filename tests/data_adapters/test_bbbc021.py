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
from support.training import losses_of, metrics_of, train

from data_adapters.bbbc021_scaling import Window, histogram, percentile_window
from dinov2.data import make_dataset
from dinov2.errors import ConfigError, DatasetError

IMAGES, MOAS = "BBBC021_v1_image.csv", "BBBC021_v1_moa.csv"
FEW = TREATMENTS[:4]
MOA_NAMES = sorted({moa for _, _, moa in TREATMENTS})


def bbbc021(root, *, channels=3, cache_dir=None, max_image_pixels=None, **options):
    text = f"BBBC021:root='{root}'" + "".join(f":{key}={value}" for key, value in options.items())
    return make_dataset(text, channels=channels, cache_dir=cache_dir, max_image_pixels=max_image_pixels)


def sentence(root, kind=DatasetError, **options):
    with pytest.raises(kind) as error:
        bbbc021(root, **options)
    return str(error.value).replace(str(root), "ROOT")


def change(root, name=IMAGES, **values):
    """Change cells of a table: column=(row, value)."""
    table = pd.read_csv(root / name, dtype=str, keep_default_na=False)
    for column, (row, value) in values.items():
        table.loc[row, column] = value
    table.to_csv(root / name, index=False)


def raw(root, row, channel="DAPI"):
    """Values of one channel of an image, [H, W]."""
    table = pd.read_csv(root / IMAGES)
    folder, name = table[f"Image_PathName_{channel}"][row], table[f"Image_FileName_{channel}"][row]
    return tifffile.imread(root / folder / name)


@pytest.fixture
def small(tmp_path):
    """Two plates with four wells of one field of view."""
    make_bbbc021(tmp_path, treatments=FEW, sites=1, size=(24, 16))
    return tmp_path


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
def test_anything_known_can_be_the_target(small, target, first_names):
    dataset = bbbc021(small, target=target)
    assert dataset.class_names == first_names
    assert [first_names[label] for label in dataset.get_targets()] == dataset.metadata()[target].tolist()
    assert dataset[5][1] == dataset.get_targets()[5]


def test_concentrations_are_joined_as_numbers(small):
    change(small, Image_Metadata_Concentration=(3, "1e-1"))
    assert pd.read_csv(small / MOAS, dtype=str)["concentration"].tolist() == ["0.00", "10.00", "3.00", "0.10"]
    assert bbbc021(small).metadata()["moa"][3] == "Microtubule stabilizers"


def test_an_image_without_moa_has_no_label_and_can_be_left_out(tmp_path):
    make_bbbc021(tmp_path, treatments=[*FEW, ("new drug", 1.0, None)], sites=1, size=(24, 16))
    dataset = bbbc021(tmp_path)
    assert dataset[4][1] is None
    assert dataset.get_targets().tolist() == [1, 0, 0, 2, -1] * 2
    assert len(bbbc021(tmp_path, labelled_only="true")) == 8
    assert bbbc021(tmp_path, labelled_only="true", target="compound").class_names[-2:] == ["new drug", "taxol"]


def test_controls_can_be_left_out_or_kept_alone(small):
    assert bbbc021(small, controls="drop").class_names == ["Actin disruptors", "Microtubule stabilizers"]
    assert bbbc021(small, controls="only").metadata()["compound"].tolist() == ["DMSO", "DMSO"]
    change(small, Image_Metadata_Compound=(0, "taxol"), Image_Metadata_Concentration=(0, "0.1"))
    change(small, Image_Metadata_Compound=(4, "taxol"), Image_Metadata_Concentration=(4, "0.1"))
    assert sentence(small, controls="only") == "ROOT/BBBC021_v1_image.csv: no row is left with controls=only"


def test_training_without_the_moa_table_is_possible(small):
    (small / MOAS).unlink()
    dataset = bbbc021(small, moa_csv="none")
    assert dataset.get_targets() is None and dataset.class_names == [] and dataset[0][1] is None
    assert sentence(small) == (
        "ROOT/BBBC021_v1_moa.csv is missing, and ROOT/BBBC021_v1_image.csv has no column moa; copy it there, or set "
        "moa_csv= to another table, moa_col= to a column, or moa_csv=none to do without MOA"
    )
    assert sentence(small, moa_csv="none", labelled_only="true") == (
        "ROOT/BBBC021_v1_image.csv does not tell the moa, which target=moa needs; moa_col= names it"
    )


def test_channels_are_stacked_in_the_order_asked_for(small):
    stacked = bbbc021(small, scaling="none", bits=16)[3][0]
    for place, channel in enumerate(("Tubulin", "Actin", "DAPI")):
        np.testing.assert_array_equal(stacked[place].numpy(), raw(small, 3, channel))
    other = bbbc021(small, scaling="none", bits=16, channels_order="dapi, Tubulin", channels=2)
    np.testing.assert_array_equal(other[3][0].numpy(), stacked[[2, 0]].numpy())
    assert other.path(3).rpartition("_w1")[1] == "_w1"


def test_a_single_channel_is_given_once_or_repeated(small):
    grey = bbbc021(small, dapi_only="true", channels=1)[3][0]
    assert grey.shape == (1, 16, 24)
    assert torch.equal(grey[0], bbbc021(small)[3][0][2])
    assert torch.equal(bbbc021(small, dapi_only="true", channels=3)[3][0], grey.expand(3, -1, -1))


@pytest.mark.parametrize("percentiles", [(0.1, 99.9), (0, 100), (2, 50)])
def test_windows_are_numpys_percentiles(percentiles):
    values = np.random.default_rng(0).gamma(2, 900, (31, 47)).astype(np.uint16)
    window = percentile_window(histogram(values), percentiles)
    assert [window.low, window.high] == np.percentile(values, percentiles, method="inverted_cdf").tolist()


@pytest.mark.parametrize("bits", [8, 16])
def test_scaling_agrees_with_a_plain_reference(small, bits):
    image = bbbc021(small, low_pct=1, high_pct=99, bits=bits)[5][0]
    assert image.dtype == {8: torch.uint8, 16: torch.uint16}[bits]
    full_scale = 2**bits - 1
    for place, channel in enumerate(("Tubulin", "Actin", "DAPI")):
        values = raw(small, 5, channel).astype(np.float64)
        low, high = np.percentile(values, (1, 99), method="inverted_cdf")
        expected = np.round(np.clip((values - low) / (high - low), 0, 1) * full_scale)
        np.testing.assert_array_equal(image[place].numpy(), expected)


def test_a_blank_channel_becomes_black():
    assert not Window(300, 300).table(8).any()


def test_windows_of_a_plate_or_the_dataset_are_measured_once_and_kept(small, monkeypatch):
    table = pd.read_csv(small / IMAGES)
    of_plate = table["Image_Metadata_Plate_DAPI"] == "Week2_24121"
    for scaling, rows in (("plate", np.flatnonzero(of_plate)), ("dataset", range(8))):
        values = np.stack([raw(small, row) for row in rows]).astype(np.float64)
        low, high = np.percentile(values, (0.1, 99.9), method="inverted_cdf")
        expected = np.round(np.clip((raw(small, 6) - low) / (high - low), 0, 1) * 255)
        image = bbbc021(small, scaling=scaling, cache_dir=small / "cache")[6][0]
        np.testing.assert_array_equal(image[2].numpy(), expected)
    reads = []
    monkeypatch.setattr("data_adapters.bbbc021_scaling.histogram", lambda plane: reads.append(1) or histogram(plane))
    again = bbbc021(small, scaling="plate", cache_dir=small / "cache", split="val", val_fraction=0.9)
    assert not reads
    bbbc021(small, scaling="plate", cache_dir=small / "cache", controls="drop", labelled_only="true")
    assert not reads
    row = again.metadata()["path"].tolist().index(bbbc021(small).path(6))
    assert torch.equal(again[row][0], bbbc021(small, scaling="plate")[6][0])
    reads.clear()
    bbbc021(small, scaling="plate", cache_dir=small / "cache", sample_size=2)
    assert len(reads) == 2 * 2 * 3
    bbbc021(small, scaling="plate", cache_dir=small / "cache", high_pct=90)
    assert len(reads) == 12 + 8 * 3
    os.utime(bbbc021(small).path(6), ns=(1, 1))
    bbbc021(small, scaling="plate", cache_dir=small / "cache")
    assert len(reads) == 12 + 24 + 24


def test_a_sample_may_hold_an_unreadable_image_but_not_only_such(small):
    paths = bbbc021(small).metadata()["path"]
    for path in paths[:3]:
        open(path, "wb").close()
    assert bbbc021(small, scaling="plate")[3][0].shape == (3, 16, 24)
    open(paths[3], "wb").close()
    name = os.path.basename(paths[0])
    assert sentence(small, scaling="plate") == (
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
def test_one_file_may_hold_all_channels(small, kind):
    original = bbbc021(small, scaling="none", bits=16)
    rows = []
    for index in range(len(original)):
        pixels = original[index][0].numpy()
        file = f"{index}.png" if kind == "png" else f"{index}.tif"
        if kind == "png":
            Image.fromarray((pixels >> 8).astype(np.uint8).transpose(1, 2, 0)).save(small / file)
        elif kind == "pages":
            tifffile.imwrite(small / file, pixels, photometric="minisblack")
        else:
            tifffile.imwrite(small / file, pixels.transpose(1, 2, 0), photometric="rgb", compression="zlib")
        rows.append({"tile": file, "drug": f"drug {index}", "dose": 1, "MoA": "a" if index % 2 else "b", "plate": 7})
    pd.DataFrame(rows).to_csv(small / "flat.csv", index=False)
    options = {"csv": "flat.csv", "path_col": "tile", "compound_col": "drug", "concentration_col": "dose"}
    dataset = bbbc021(small, scaling="none", bits=16, **options)
    expected = original[5][0]
    if kind == "png":
        expected = ((expected.int() >> 8) * 257).to(torch.uint16)
    assert torch.equal(dataset[5][0], expected)
    assert dataset.class_names == ["a", "b"] and dataset[5][1] == 0
    assert dataset.metadata()["treatment"][5] == "drug 5 1"
    grey = bbbc021(small, scaling="none", bits=16, channels=1, dapi_only="true", **options)
    assert torch.equal(grey[5][0], expected[2:])
    options |= {"file_channels": "'DAPI,Actin,Tubulin'"}
    grey = bbbc021(small, scaling="none", bits=16, channels=1, dapi_only="true", **options)
    assert torch.equal(grey[5][0], expected[:1])
    assert bbbc021(small, csv="flat.csv", path_col="tile")[5][0].dtype == torch.uint8
    assert set(dataset.metadata()) == {
        *("path", "target", "group", "control", "moa", "compound", "concentration", "treatment", "plate")
    }


def test_files_with_other_numbers_of_channels_are_refused(small):
    tifffile.imwrite(small / "a.tif", np.zeros((2, 9, 9), np.uint16), photometric="minisblack")
    tifffile.imwrite(small / "b.tif", np.zeros((3, 9, 9), np.float32), photometric="minisblack")
    tifffile.imwrite(small / "c.tif", np.zeros((3, 9, 9), np.uint8), photometric="minisblack")
    (small / "d.tif").write_bytes((small / "c.tif").read_bytes()[:200])
    pd.DataFrame({"file": ["a.tif", "b.tif", "c.tif", "d.tif"], "moa": "x"}).to_csv(small / "flat.csv", index=False)
    dataset = bbbc021(small, csv="flat.csv", path_col="file")

    def reason(index, dataset=dataset):
        with pytest.raises(DatasetError) as error:
            dataset[index]
        return str(error.value).removeprefix(f"image {index} ({dataset.path(index)}) cannot be read: ")

    assert reason(0) == "image file a.tif: it holds 2 channels or pages, but must hold 3 (file_channels=)"
    assert reason(1) == "image file b.tif: its pixels are float32; they must be whole numbers of 8 or 16 bits"
    assert reason(3).startswith("image file d.tif: ")
    limited = bbbc021(small, csv="flat.csv", path_col="file", max_image_pixels=80)
    assert reason(2, limited) == (
        "image file c.tif: 9 x 9 pixels are more than data.max_image_pixels=80; raise it if the image is what it "
        "claims to be"
    )


def test_a_missing_column_is_named_with_the_nearest(small):
    table = pd.read_csv(small / IMAGES)
    table.rename(columns={"Image_FileName_Actin": "Image_FileName_Acitn"}).to_csv(small / IMAGES, index=False)
    known = ", ".join(table.columns).replace("Image_FileName_Actin", "Image_FileName_Acitn")
    assert sentence(small) == (
        "ROOT/BBBC021_v1_image.csv has no column 'Image_FileName_Actin'; did you mean Image_FileName_Acitn? known are "
        f"{known}; dapi_col=, tubulin_col=, actin_col= or path_col= names it"
    )
    assert len(bbbc021(small, actin_col="Image_FileName_Acitn")) == 8
    assert sentence(small, actin_col="Image_FileName_Acitn", plate_col="plates").endswith("; plate_col= names it")
    moas = pd.read_csv(small / MOAS).rename(columns={"moa": "MOA class"})
    moas.to_csv(small / MOAS, index=False)
    assert sentence(small, dapi_only="true") == (
        "ROOT/BBBC021_v1_moa.csv has no column 'moa'; did you mean MOA class? known are compound, concentration, "
        "MOA class"
    )


def test_a_target_or_split_that_the_table_does_not_tell_is_refused(small):
    table = pd.read_csv(small / IMAGES).drop(columns=["Image_Metadata_Well_DAPI", "Image_Metadata_Plate_DAPI"])
    table.to_csv(small / IMAGES, index=False)
    does_not_tell = "ROOT/BBBC021_v1_image.csv does not tell the"
    assert sentence(small, target="well") == f"{does_not_tell} well, which target=well needs; well_col= names it"
    expected = f"{does_not_tell} plate, which split_by=plate needs; plate_col= names it"
    assert sentence(small, split="val", split_by="plate") == expected
    assert bbbc021(small, split_by="plate").groups() is None
    assert sentence(small, scaling="plate") == expected.replace("split_by", "scaling")
    assert bbbc021(small).metadata()["batch"].tolist() == ["Week1"] * 4 + ["Week2"] * 4
    table.drop(columns="Image_Metadata_Compound").to_csv(small / IMAGES, index=False)
    assert sentence(small).endswith("; compound_col= names it, moa_csv=none does without MOA")


def test_an_moa_join_that_matches_nothing_is_refused(small):
    table = pd.read_csv(small / MOAS)
    table["compound"] = table["compound"].str.upper() + "-1"
    table.to_csv(small / MOAS, index=False)
    assert sentence(small) == (
        "ROOT/BBBC021_v1_moa.csv has no treatment of ROOT/BBBC021_v1_image.csv: compound and concentration are "
        "DMSO-1 0, CYTOCHALASIN B-1 10, LATRUNCULIN B-1 3, ... there and DMSO 0, cytochalasin B 10, latrunculin B 3, "
        "... here; both must be written alike, or set moa_csv=none to do without MOA"
    )


def test_an_moa_table_that_contradicts_itself_is_refused(small):
    with open(small / MOAS, "a") as file:
        file.write("taxol,1e-1,Actin disruptors\n")
    assert sentence(small) == (
        "ROOT/BBBC021_v1_moa.csv, line 6: the MOA of taxol 0.1 is 'Actin disruptors', but 'Microtubule stabilizers' "
        "further up; keep one of them"
    )


def test_a_concentration_that_is_no_number_is_refused(small):
    change(small, Image_Metadata_Concentration=(2, "3 uM"))
    assert sentence(small) == (
        "ROOT/BBBC021_v1_image.csv, line 4: Image_Metadata_Concentration is '3 uM'; it must be a number"
    )


def test_duplicate_rows_are_refused(small):
    table = pd.read_csv(small / IMAGES)
    pd.concat([table, table.iloc[[2]]]).to_csv(small / IMAGES, index=False)
    assert sentence(small) == (
        "ROOT/BBBC021_v1_image.csv, line 10: Image_FileName_Tubulin names "
        f"Week1/Week1_22123/{table['Image_FileName_Tubulin'][2]} again, as line 4 does; an image has one row"
    )


def test_two_names_of_one_folder_are_no_way_to_two_rows_of_one_image(small):
    table = pd.read_csv(small / IMAGES)
    other = table.iloc[[2]].replace("Week1/Week1_22123", "Week1_22123")
    pd.concat([table, other.assign(**{f"Image_FileName_{name}": "x.tif" for name in ("Tubulin", "Actin")})]).to_csv(
        small / IMAGES, index=False
    )
    (small / "Week1" / "Week1_22123").rename(small / "Week1_22123")
    (small / "Week1_22123" / "x.tif").touch()
    assert sentence(small) == (
        "ROOT/BBBC021_v1_image.csv, line 10: Image_FileName_DAPI names "
        f"Week1_22123/{table['Image_FileName_DAPI'][2]} again, as line 4 does; an image has one row"
    )


def test_a_missing_channel_file_is_named_and_its_row_can_be_left_out(small, caplog):
    table = pd.read_csv(small / IMAGES)
    path = small / "Week1/Week1_22123" / table["Image_FileName_Actin"][1]
    path.unlink()
    assert sentence(small) == (
        f"ROOT/BBBC021_v1_image.csv, line 3: the Actin file ROOT/Week1/Week1_22123/{path.name} is missing; copy it "
        "there, or set missing=skip to leave out rows without all their files"
    )
    assert len(bbbc021(small, dapi_only="true")) == 8
    assert len(bbbc021(small, missing="skip")) == 7
    assert "1 of 8 rows lack a file and are left out" in caplog.text
    shutil.rmtree(small / "Week2")
    assert "Tubulin file ROOT/Week2/Week2_24121/" in sentence(small)
    assert " is missing, as are 3 more of this channel; " in sentence(small)
    assert bbbc021(small, missing="skip").metadata()["plate"].tolist() == ["Week1_22123"] * 3
    for path in (small / "Week1/Week1_22123").iterdir():
        path.unlink()
    assert sentence(small, missing="skip") == (
        "no row of ROOT/BBBC021_v1_image.csv has all its files below ROOT; check root= and images="
    )


def test_channel_files_of_different_size_are_refused_when_read(small):
    dataset = bbbc021(small)
    path = dataset.path(2)
    tifffile.imwrite(path, np.zeros((16, 20), np.uint16), photometric="minisblack")
    with pytest.raises(DatasetError) as error:
        dataset[2]
    assert str(error.value) == (
        f"image 2 ({path}) cannot be read: its channel files differ in size: Tubulin has 20 x 16 px, Actin 24 x 16; "
        "all channels of an image need one size"
    )


def test_an_unreadable_tiff_is_named_when_read(small):
    dataset = bbbc021(small)
    table = pd.read_csv(small / IMAGES)
    names = table["Image_FileName_Actin"]
    paths = [small / "Week1/Week1_22123" / name for name in names[:4]]
    paths[0].write_bytes(b"no image")
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    paths[2].unlink()
    tifffile.imwrite(paths[3], np.zeros((16, 24), np.float32), photometric="minisblack")

    def reason(index, dataset=dataset):
        with pytest.raises(DatasetError) as error:
            dataset[index]
        start = f"image {index} ({dataset.path(index)}) cannot be read: Actin file Week1/Week1_22123/{names[index]}: "
        assert str(error.value).startswith(start)
        return str(error.value).removeprefix(start)

    assert reason(0) == "not an image of a known format"
    assert reason(1).startswith("damaged file (")
    assert reason(2) == "No such file or directory"
    assert reason(3) == "pixels of Pillow's mode F have no known range; store 8 or 16 bits a channel"
    tifffile.imwrite(paths[3], np.zeros((40, 40), np.uint16), photometric="minisblack")
    limited = bbbc021(small, missing="skip", max_image_pixels=1000)
    with pytest.raises(DatasetError, match="40 x 40 pixels are more than data.max_image_pixels=1000; raise it if"):
        limited[2]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("../outside", "which leads upwards by .."), ("/outside", "which is an absolute path")],
)
def test_a_path_that_leaves_the_root_is_refused(small, folder, reason):
    change(small, Image_PathName_DAPI=(1, folder), Image_FileName_DAPI=(1, "x.tif"))
    assert sentence(small) == (
        f"ROOT/BBBC021_v1_image.csv, line 3: Image_FileName_DAPI gives '{folder}/x.tif', {reason}; paths must stay "
        "below ROOT, and path_prefix= names a beginning to leave out"
    )


def test_a_link_out_of_the_root_is_refused(small, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.tif"
    dataset = bbbc021(small)
    path = dataset.path(4)
    os.rename(path, outside)
    os.symlink(outside, path)
    expected = f"link {path} leaves the dataset's folder; copy the files, or set root= above both"
    assert sentence(small) == expected.replace(str(small), "ROOT")
    with pytest.raises(DatasetError) as error:
        dataset[4]
    assert str(error.value) == f"image 4 ({path}) cannot be read: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "ROOT/t.csv is empty; it needs a line with the names of its columns"),
        ("moa,file\n", "ROOT/t.csv has a header and no rows"),
        (
            "moa,file\na,b\na,b,c\n",
            "ROOT/t.csv, line 3: more cells than the header has; put texts that hold a comma in",
        ),
        ('moa,file\na,"b\n', "ROOT/t.csv: a quote is opened and not closed; close it"),
        ("moa,file\na,\n", "ROOT/t.csv, line 2: file is empty; it must name an image file"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, text, expected):
    (tmp_path / "t.csv").write_text(text)
    assert sentence(tmp_path, csv="t.csv", path_col="file").startswith(expected)


def test_a_table_that_is_not_there_is_named(tmp_path):
    assert sentence(tmp_path) == (
        "ROOT/BBBC021_v1_image.csv is missing; set root= to the folder that holds it, or csv= to the table of images"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target": "drug"}, "target=drug must be one of moa, compound, treatment, plate, well, batch"),
        ({"scaling": "max"}, "scaling=max must be one of image, plate, dataset, none"),
        ({"controls": "no"}, "controls=no must be one of keep, drop, only"),
        ({"missing": "no"}, "missing=no must be one of error, skip"),
        ({"split_by": "site"}, "split_by=site must be one of compound, treatment, plate, well, batch, image"),
        ({"channels_order": "DAPI,GFP"}, "channels_order=DAPI,GFP must be some of Tubulin, Actin, DAPI, each once"),
        (
            {"low_pct": 99, "high_pct": 1},
            "low_pct=99 and high_pct=1 must be percentages, the first below the second",
        ),
        ({"sample_size": 0, "scaling": "plate"}, "sample_size=0 must be at least 1 image"),
        ({"sample_size": 9}, "sample_size=9 has no effect with scaling=image; remove it"),
        ({"scaling": "none", "low_pct": 2}, "low_pct=2.0 has no effect with scaling=none; remove it"),
        (
            {"file_channels": "DAPI"},
            "file_channels=DAPI has no effect with a file for each channel; path_col= names a column of files with "
            "all; remove it",
        ),
        (
            {"path_col": "x", "file_channels": "DAPI,Actin"},
            "file_channels=DAPI,Actin lacks Tubulin, which channels_order or dapi_only asks for",
        ),
    ],
)
def test_wrong_options_are_config_errors(tmp_path, options, expected):
    assert sentence(tmp_path, ConfigError, **options) == f"dataset BBBC021: {expected}"


def test_a_network_for_another_number_of_channels_is_refused(small):
    assert sentence(small, ConfigError, channels=1) == (
        "student.in_chans=1: dataset BBBC021 gives 3 channels (Tubulin, Actin, DAPI); set student.in_chans=3, or "
        "choose with channels_order= or dapi_only=true"
    )


def test_a_dataset_can_be_handed_to_workers(small):
    dataset = bbbc021(small, scaling="plate", cache_dir=small / "cache")
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
