"""BBBC021: what can be wrong with tables, files and settings, a sentence each."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile
from support.small_bbbc021 import IMAGES, MOAS, bbbc021, change, sentence

from dinov2.errors import ConfigError, DatasetError


def test_a_missing_column_is_named_with_the_nearest(small_bbbc021):
    table = pd.read_csv(small_bbbc021 / IMAGES)
    table.rename(columns={"Image_FileName_Actin": "Image_FileName_Acitn"}).to_csv(small_bbbc021 / IMAGES, index=False)
    known = ", ".join(table.columns).replace("Image_FileName_Actin", "Image_FileName_Acitn")
    assert sentence(small_bbbc021) == (
        "ROOT/BBBC021_v1_image.csv has no column 'Image_FileName_Actin'; did you mean Image_FileName_Acitn? known are "
        f"{known}; dapi_col=, tubulin_col=, actin_col= or path_col= names it"
    )
    assert len(bbbc021(small_bbbc021, actin_col="Image_FileName_Acitn")) == 8
    assert sentence(small_bbbc021, actin_col="Image_FileName_Acitn", plate_col="plates").endswith(
        "; plate_col= names it"
    )
    moas = pd.read_csv(small_bbbc021 / MOAS).rename(columns={"moa": "MOA class"})
    moas.to_csv(small_bbbc021 / MOAS, index=False)
    assert sentence(small_bbbc021, dapi_only="true") == (
        "ROOT/BBBC021_v1_moa.csv has no column 'moa'; did you mean MOA class? known are compound, concentration, "
        "MOA class"
    )


def test_a_target_or_split_that_the_table_does_not_tell_is_refused(small_bbbc021):
    table = pd.read_csv(small_bbbc021 / IMAGES).drop(columns=["Image_Metadata_Well_DAPI", "Image_Metadata_Plate_DAPI"])
    table.to_csv(small_bbbc021 / IMAGES, index=False)
    does_not_tell = "ROOT/BBBC021_v1_image.csv does not tell the"
    assert (
        sentence(small_bbbc021, target="well") == f"{does_not_tell} well, which target=well needs; well_col= names it"
    )
    expected = f"{does_not_tell} plate, which split_by=plate needs; plate_col= names it"
    assert sentence(small_bbbc021, split="val", split_by="plate") == expected
    assert bbbc021(small_bbbc021, split_by="plate").groups() is None
    assert sentence(small_bbbc021, scaling="plate") == expected.replace("split_by", "scaling")
    assert bbbc021(small_bbbc021).metadata()["batch"].tolist() == ["Week1"] * 4 + ["Week2"] * 4
    table.drop(columns="Image_Metadata_Compound").to_csv(small_bbbc021 / IMAGES, index=False)
    assert sentence(small_bbbc021).endswith("; compound_col= names it, moa_csv=none does without MOA")


def test_an_moa_join_that_matches_nothing_is_refused(small_bbbc021):
    table = pd.read_csv(small_bbbc021 / MOAS)
    table["compound"] = table["compound"].str.upper() + "-1"
    table.to_csv(small_bbbc021 / MOAS, index=False)
    assert sentence(small_bbbc021) == (
        "ROOT/BBBC021_v1_moa.csv has no treatment of ROOT/BBBC021_v1_image.csv: compound and concentration are "
        "DMSO-1 0, CYTOCHALASIN B-1 10, LATRUNCULIN B-1 3, ... there and DMSO 0, cytochalasin B 10, latrunculin B 3, "
        "... here; both must be written alike, or set moa_csv=none to do without MOA"
    )


def test_an_moa_table_that_contradicts_itself_is_refused(small_bbbc021):
    with open(small_bbbc021 / MOAS, "a") as file:
        file.write("taxol,1e-1,Actin disruptors\n")
    assert sentence(small_bbbc021) == (
        "ROOT/BBBC021_v1_moa.csv, line 6: the MOA of taxol 0.1 is 'Actin disruptors', but 'Microtubule stabilizers' "
        "further up; keep one of them"
    )


def test_a_concentration_that_is_no_number_is_refused(small_bbbc021):
    change(small_bbbc021, Image_Metadata_Concentration=(2, "3 uM"))
    assert sentence(small_bbbc021) == (
        "ROOT/BBBC021_v1_image.csv, line 4: Image_Metadata_Concentration is '3 uM'; it must be a number"
    )


def test_duplicate_rows_are_refused(small_bbbc021):
    table = pd.read_csv(small_bbbc021 / IMAGES)
    pd.concat([table, table.iloc[[2]]]).to_csv(small_bbbc021 / IMAGES, index=False)
    assert sentence(small_bbbc021) == (
        "ROOT/BBBC021_v1_image.csv, line 10: Image_FileName_Tubulin names "
        f"Week1/Week1_22123/{table['Image_FileName_Tubulin'][2]} again, as line 4 does; an image has one row"
    )


def test_two_names_of_one_folder_are_no_way_to_two_rows_of_one_image(small_bbbc021):
    table = pd.read_csv(small_bbbc021 / IMAGES)
    other = table.iloc[[2]].replace("Week1/Week1_22123", "Week1_22123")
    pd.concat([table, other.assign(**{f"Image_FileName_{name}": "x.tif" for name in ("Tubulin", "Actin")})]).to_csv(
        small_bbbc021 / IMAGES, index=False
    )
    (small_bbbc021 / "Week1" / "Week1_22123").rename(small_bbbc021 / "Week1_22123")
    (small_bbbc021 / "Week1_22123" / "x.tif").touch()
    assert sentence(small_bbbc021) == (
        "ROOT/BBBC021_v1_image.csv, line 10: Image_FileName_DAPI names "
        f"Week1_22123/{table['Image_FileName_DAPI'][2]} again, as line 4 does; an image has one row"
    )


def test_a_missing_channel_file_is_named_and_its_row_can_be_left_out(small_bbbc021, caplog):
    table = pd.read_csv(small_bbbc021 / IMAGES)
    path = small_bbbc021 / "Week1/Week1_22123" / table["Image_FileName_Actin"][1]
    path.unlink()
    assert sentence(small_bbbc021) == (
        f"ROOT/BBBC021_v1_image.csv, line 3: the Actin file ROOT/Week1/Week1_22123/{path.name} is missing; copy it "
        "there, or set missing=skip to leave out rows without all their files"
    )
    assert len(bbbc021(small_bbbc021, dapi_only="true")) == 8
    assert len(bbbc021(small_bbbc021, missing="skip")) == 7
    assert "1 of 8 rows lack a file and are left out" in caplog.text
    shutil.rmtree(small_bbbc021 / "Week2")
    assert "Tubulin file ROOT/Week2/Week2_24121/" in sentence(small_bbbc021)
    assert " is missing, as are 3 more of this channel; " in sentence(small_bbbc021)
    assert bbbc021(small_bbbc021, missing="skip").metadata()["plate"].tolist() == ["Week1_22123"] * 3
    for path in (small_bbbc021 / "Week1/Week1_22123").iterdir():
        path.unlink()
    assert sentence(small_bbbc021, missing="skip") == (
        "no row of ROOT/BBBC021_v1_image.csv has all its files below ROOT; check root= and images="
    )


def test_channel_files_of_different_size_are_refused_when_read(small_bbbc021):
    dataset = bbbc021(small_bbbc021)
    path = dataset.path(2)
    tifffile.imwrite(path, np.zeros((16, 20), np.uint16), photometric="minisblack")
    with pytest.raises(DatasetError) as error:
        dataset[2]
    assert str(error.value) == (
        f"image 2 ({path}) cannot be read: its channel files differ in size: Tubulin has 20 x 16 px, Actin 24 x 16; "
        "all channels of an image need one size"
    )


def test_an_unreadable_tiff_is_named_when_read(small_bbbc021):
    dataset = bbbc021(small_bbbc021)
    table = pd.read_csv(small_bbbc021 / IMAGES)
    names = table["Image_FileName_Actin"]
    paths = [small_bbbc021 / "Week1/Week1_22123" / name for name in names[:4]]
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
    limited = bbbc021(small_bbbc021, missing="skip", max_image_pixels=1000)
    with pytest.raises(DatasetError, match="40 x 40 pixels are more than data.max_image_pixels=1000; raise it if"):
        limited[2]


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("../outside", "which leads upwards by .."), ("/outside", "which is an absolute path")],
)
def test_a_path_that_leaves_the_root_is_refused(small_bbbc021, folder, reason):
    change(small_bbbc021, Image_PathName_DAPI=(1, folder), Image_FileName_DAPI=(1, "x.tif"))
    assert sentence(small_bbbc021) == (
        f"ROOT/BBBC021_v1_image.csv, line 3: Image_FileName_DAPI gives '{folder}/x.tif', {reason}; paths must stay "
        "below ROOT, and path_prefix= names a beginning to leave out"
    )


def test_a_link_out_of_the_root_is_refused(small_bbbc021, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.tif"
    dataset = bbbc021(small_bbbc021)
    path = dataset.path(4)
    os.rename(path, outside)
    os.symlink(outside, path)
    expected = f"link {path} leaves the dataset's folder; copy the files, or set root= above both"
    assert sentence(small_bbbc021) == expected.replace(str(small_bbbc021), "ROOT")
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


def test_a_network_for_another_number_of_channels_is_refused(small_bbbc021):
    assert sentence(small_bbbc021, ConfigError, channels=1) == (
        "student.in_chans=1: dataset BBBC021 gives 3 channels (Tubulin, Actin, DAPI); set student.in_chans=3, or "
        "choose with channels_order= or dapi_only=true"
    )
