import os
import pickle

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from support.images import encode, photo, write_photos
from support.training import losses_of, metrics_of, train

from dinov2.data import make_dataset
from dinov2.data.stain import TARGET_MEANS_LAB, TARGET_STDS_LAB, reinhard, tissue_statistics
from dinov2.errors import ConfigError, DatasetError

RGB_RUN = ("student.in_chans=3", "train.OFFICIAL_EPOCH_LENGTH=20", "train.batch_size_per_gpu=6")
SPLITS = ("train", "val", "test")


def histology(**options):
    channels = options.pop("channels", 3)
    pairs = "".join(f":{key}='{str(value).replace(chr(39), chr(39) * 2)}'" for key, value in options.items())
    return make_dataset(f"Histology{pairs}", channels=channels)


def names(dataset):
    return [os.path.relpath(dataset.path(index), dataset.root) for index in range(len(dataset))]


def sentence(error_class=DatasetError, *, hide="", **options):
    with pytest.raises(error_class) as error:
        histology(**options)
    return str(error.value).replace(str(hide), "DIR") if hide else str(error.value)


def write_table(folder, rows, name="files.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(",".join(row) + "\n" for row in rows), encoding="utf-8")
    return folder / name


@pytest.fixture
def table(tmp_path):
    """Ten tiles of five slides below tiles/, named by files.csv beside it; the last tile has no label."""
    paths = [os.path.relpath(path, tmp_path / "tiles") for path in write_photos(tmp_path / "tiles", 10, num_classes=2)]
    rows = [["tile", "label", "slide", "patient"]]
    for number, path in enumerate(paths):
        label = "" if number == 9 else ("stroma", "tumour")[number % 2]
        rows.append([path, label, f"s{number // 2}", f"p{number // 4}"])
    write_table(tmp_path, rows)
    return rows


def class_folders(root, classes=("ADI", "STR", "TUM"), slides=6, tiles=2):
    for name in classes:
        for slide in range(slides):
            write_photos(root / name / f"s{slide}", tiles, size=(20, 16), suffix=".tif")


def test_paths_start_from_the_root_and_the_table_lies_below_it_or_anywhere(tmp_path, table):
    options = {"label_col": "label", "slide_col": "slide", "root": tmp_path / "tiles"}
    dataset = histology(csv=tmp_path / "files.csv", **options)
    assert names(dataset) == [row[0] for row in table[1:]]
    assert dataset.class_names == ["stroma", "tumour"]
    assert dataset.get_targets().tolist() == [0, 1] * 4 + [0, -1]
    assert dataset[1][1] == 1 and dataset[9][1] is None
    assert dataset[0][0].size == (64, 48)
    assert dataset.groups().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    columns = dataset.metadata()
    assert set(columns) == {"path", "target", "slide", "group"}
    assert columns["slide"].tolist() == columns["group"].tolist() == [row[2] for row in table[1:]]
    (tmp_path / "files.csv").rename(tmp_path / "tiles" / "files.csv")
    assert names(histology(csv="files.csv", **options)) == names(dataset)
    # without root, paths start from the table's folder
    assert names(histology(csv=tmp_path / "tiles" / "files.csv")) == names(dataset)


def test_without_columns_of_labels_and_slides_there_are_none(tmp_path, table):
    dataset = histology(csv=tmp_path / "files.csv", root=tmp_path / "tiles")
    assert dataset.get_targets() is None and dataset.groups() is None and dataset[0][1] is None
    assert set(dataset.metadata()) == {"path"}


@pytest.mark.parametrize("column", ["slide", "patient"])
def test_splits_keep_slides_or_patients_together(tmp_path, table, column):
    def part(split):
        return histology(
            csv=tmp_path / "files.csv",
            root=tmp_path / "tiles",
            slide_col="slide",
            split_by=column,
            split=split,
            val_fraction=0.3,
            test_fraction=0.4,
        )

    groups = {}
    for split in SPLITS:
        try:
            groups[split] = set(part(split).metadata()["group"])
        except DatasetError as error:
            assert "none of its 10 images falls into" in str(error)
            groups[split] = set()
    assert sum(len(found) for found in groups.values()) == len(set().union(*groups.values()))
    assert set().union(*groups.values()) == (
        {"s0", "s1", "s2", "s3", "s4"} if column == "slide" else {"p0", "p1", "p2"}
    )
    assert sum(bool(found) for found in groups.values()) >= 2


def test_new_tiles_leave_the_others_in_their_split(tmp_path, table):
    options = {"csv": tmp_path / "files.csv", "root": tmp_path / "tiles", "slide_col": "slide", "split": "train"}
    before = names(histology(**options))
    write_photos(tmp_path / "tiles" / "new", 2)
    write_table(tmp_path, [*table, ["new/photo_0000.jpg", "", "s9", ""], ["new/photo_0001.jpg", "", "s1", ""]])
    assert [name for name in names(histology(**options)) if not name.startswith("new")] == before


def test_a_column_of_splits_is_taken_at_its_word_and_checked(tmp_path, table):
    splits = ["train"] * 4 + ["Validation"] * 2 + ["test"] * 4
    rows = [[*row, split] for row, split in zip(table, ["split", *splits], strict=True)]
    csv = write_table(tmp_path, rows)
    options = {"csv": csv, "root": tmp_path / "tiles", "slide_col": "slide", "split_col": "split"}
    assert [len(histology(**options, split=split)) for split in (*SPLITS, "all")] == [4, 2, 4, 10]
    rows[3][-1] = "val"
    write_table(tmp_path, rows)
    assert sentence(**options, split="train") == (
        "slide 's1' has images both in train and in val, which lets one split give the other's answers away; move each "
        "slide to one of them"
    )
    rows[3][-1] = "holdout"
    write_table(tmp_path, rows)
    assert sentence(**options) == f"{csv}, line 4: split is 'holdout'; it must be train, val or test"


def test_rows_without_a_file_are_an_error_or_left_out(tmp_path, table):
    (tmp_path / "tiles" / table[3][0]).unlink()
    options = {"csv": tmp_path / "files.csv", "root": tmp_path / "tiles", "label_col": "label", "slide_col": "slide"}
    assert sentence(**options, hide=tmp_path) == (
        f"DIR/files.csv, line 4: the tile DIR/tiles/{table[3][0]} is missing; check root=, or set missing=skip to "
        "leave out rows without a file"
    )
    dataset = histology(**options, missing="skip")
    assert names(dataset) == [row[0] for row in table[1:] if row is not table[3]]
    assert dataset.get_targets().tolist() == [0, 1, 1, 0, 1, 0, 1, 0, -1]
    assert dataset.groups().tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("../secret.png", "which leads upwards by .."),
        ("/etc/passwd", "which is an absolute path"),
        ("C:\\tile.png", "which is an absolute path"),
    ],
)
def test_no_path_leaves_the_root(tmp_path, table, cell, reason):
    csv = write_table(tmp_path, [["tile"], ["class_0/photo_0000.jpg"], [cell]])
    shown = cell.replace("\\", "/")
    assert sentence(csv=csv, root=tmp_path / "tiles", hide=tmp_path) == (
        f"DIR/files.csv, line 3: tile gives {shown!r}, {reason}; paths must stay below DIR/tiles, and path_prefix= "
        "names a beginning to leave out"
    )


def test_no_link_leaves_the_root(tmp_path, table):
    (tmp_path / "outside.jpg").write_bytes(encode(photo()))
    (tmp_path / "tiles" / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    csv = write_table(tmp_path, [["tile"], ["link.jpg"]])
    assert sentence(csv=csv, root=tmp_path / "tiles", hide=tmp_path) == (
        "link DIR/tiles/link.jpg leaves the dataset's folder; copy the files, or set root= above both"
    )


def test_beginnings_of_paths_can_be_left_out(tmp_path, table):
    rows = [["tile"], ["D:\\scans\\class_0\\photo_0000.jpg"], [f"{tmp_path}/tiles/class_1/photo_0001.jpg"]]
    csv = write_table(tmp_path, rows)
    dataset = histology(csv=csv, root=tmp_path / "tiles", path_prefix="D:\\scans\\")
    assert names(dataset) == ["class_0/photo_0000.jpg", "class_1/photo_0001.jpg"]


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        (
            [["tiles"], ["a.jpg"]],
            {},
            "DIR/files.csv has no column 'tile'; did you mean tiles? known are tiles; tile_col= names the one with the "
            "tiles",
        ),
        (
            [["tile", "lable"], ["class_0/photo_0000.jpg", "x"]],
            {"label_col": "label"},
            "DIR/files.csv has no column 'label'; did you mean lable? known are tile, lable; label_col= names it",
        ),
        (
            [["tile", "x"], ["class_0/photo_0000.jpg", ""], ["", "x"]],
            {},
            "DIR/files.csv, line 3: tile is empty; it must name an image file",
        ),
        (
            [["tile"], ["class_0/photo_0000.jpg"], ["./class_0/photo_0000.jpg"]],
            {},
            "DIR/files.csv, line 3: tile names class_0/photo_0000.jpg again, as DIR/files.csv, line 2 does; a tile has "
            "one row",
        ),
        (
            [["tile", "slide"], ["class_0/photo_0000.jpg", "a"], ["class_1/photo_0001.jpg", ""]],
            {"slide_col": "slide"},
            "DIR/files.csv, line 3: slide is empty; tiles are split by it, so each needs one",
        ),
    ],
)
def test_a_wrong_table_has_a_sentence(tmp_path, table, rows, options, expected):
    csv = write_table(tmp_path, rows)
    assert sentence(csv=csv, root=tmp_path / "tiles", hide=tmp_path, **options) == expected


def test_class_folders_are_the_labels_and_some_can_be_chosen(tmp_path):
    class_folders(tmp_path)
    dataset = histology(root=tmp_path)
    assert dataset.class_names == ["ADI", "STR", "TUM"] and len(dataset) == 36
    assert names(dataset)[0] == "ADI/s0/photo_0000.tif"
    some = histology(root=tmp_path, classes="TUM,ADI")
    assert some.class_names == ["ADI", "TUM"] and some.get_targets().tolist() == [0] * 12 + [1] * 12
    assert sentence(root=tmp_path, classes="TUM,TUMOR") == (
        f"classes=TUMOR: no folder of that name holds tiles of {tmp_path}; did you mean TUM? known are ADI, STR, TUM"
    )
    assert len(histology(root=tmp_path, exclude="s1,STR/*")) == 20


@pytest.mark.parametrize("rule", [{"slide_level": 2}, {"slide_pattern": r"/(s\d)/"}])
def test_a_slide_whose_tiles_have_two_classes_stays_in_one_split(tmp_path, rule):
    class_folders(tmp_path)
    train_slides, val_slides = (
        set(histology(root=tmp_path, split=split, val_fraction=0.5, **rule).metadata()["slide"])
        for split in ("train", "val")
    )
    assert train_slides | val_slides == {"s0", "s1", "s2", "s3", "s4", "s5"}
    assert not train_slides & val_slides
    assert histology(root=tmp_path, **rule).groups().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5] * 3


def test_tiles_without_a_slide_are_named(tmp_path):
    class_folders(tmp_path, slides=1)
    assert sentence(root=tmp_path, slide_pattern=r"(case_\d+)") == (
        r"tile ADI/s0/photo_0000.tif has no slide by slide_pattern=(case_\d+); tiles are split by slide, so each needs "
        "one"
    )
    assert sentence(root=tmp_path, slide_level=3) == (
        "tile ADI/s0/photo_0000.tif has no slide by slide_level=3; tiles are split by slide, so each needs one"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "dataset Histology needs csv=... or root=...: a table of tiles, or class folders"),
        ({"stain_norm": "macenko"}, "dataset Histology: stain_norm=macenko must be none or reinhard"),
        (
            {"stain_norm": "reinhard", "stain_target_means_lab": "60,20"},
            "dataset Histology: stain_target_means_lab=60,20 must be three numbers L,a,b with commas, the stds above 0",
        ),
        (
            {"stain_norm": "reinhard", "stain_target_stds_lab": "6,0,3"},
            "dataset Histology: stain_target_stds_lab=6,0,3 must be three numbers L,a,b with commas, the stds above 0",
        ),
        (
            {"stain_target_stds_lab": "6,4,3"},
            "dataset Histology: stain_norm=none must be reinhard where a target is named",
        ),
        (
            {"stain_norm": "reinhard", "channels": 1},
            "dataset Histology: stain_norm=reinhard works on colours, but student.in_chans=1; leave it out, or use 3 "
            "channels",
        ),
        (
            {"stain_norm": "reinhard", "bits": 16},
            "dataset Histology: bits=16 must be 8 with stain_norm=reinhard",
        ),
        ({"missing": "ignore"}, "dataset Histology: missing=ignore must be error or skip"),
        ({"root": "x", "label_col": "y"}, "dataset Histology: label_col=y needs csv=, the table it speaks of"),
        ({"csv": "x.csv", "classes": "A"}, "dataset Histology: classes=A does not go with csv="),
        (
            {"root": "x", "split_by": "patient"},
            "dataset Histology: split_by=patient must be slide or path without csv=",
        ),
        (
            {"root": "x", "slide_pattern": "s("},
            "dataset Histology: slide_pattern=s( is no regular expression (missing ), unterminated subpattern at "
            "position 1)",
        ),
        (
            {"root": "x", "slide_pattern": "s1"},
            "dataset Histology: slide_pattern=s1 must be an expression with the slide in parentheses",
        ),
        ({"root": "x", "slide_level": 0}, "dataset Histology: slide_level=0 must be at least 1"),
    ],
)
def test_wrong_options_are_config_errors(options, expected):
    assert sentence(ConfigError, **options) == expected


def test_splitting_by_slide_needs_slides(tmp_path):
    class_folders(tmp_path, slides=1)
    assert sentence(ConfigError, root=tmp_path, split_by="slide") == (
        "dataset Histology: split_by=slide needs to know the slides; name them by slide_col=, or, without csv=, by "
        "slide_level= or slide_pattern="
    )


def test_tiles_of_which_none_can_be_read_are_an_error(tmp_path):
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "x.png").write_bytes(b"")
    assert sentence(root=tmp_path, hide=tmp_path) == (
        "none of the first 1 of 1 tiles below DIR can be read; the first: image 0 (DIR/A/x.png) cannot be read: the "
        "file is empty"
    )


def test_stain_is_normalised_before_the_crops_and_by_the_named_target(tmp_path):
    class_folders(tmp_path, slides=1)
    for options, target in (
        ({}, (TARGET_MEANS_LAB, TARGET_STDS_LAB)),
        (
            {"stain_target_means_lab": "70,15,-10", "stain_target_stds_lab": "9,5,4"},
            ((70.0, 15.0, -10.0), (9.0, 5.0, 4.0)),
        ),
    ):
        dataset = histology(root=tmp_path, stain_norm="reinhard", **options)
        with Image.open(dataset.path(0)) as image:
            pixels = np.array(image.convert("RGB"))
        expected = torch.from_numpy(reinhard(pixels, means_lab=target[0], stds_lab=target[1])).permute(2, 0, 1)
        source = dataset.encoded_image(0)
        assert (source.height, source.width, source.channels) == expected.shape[1:] + (3,)
        assert torch.equal(source.to_tensor(reduce=4.0), expected)
        assert torch.equal(dataset[0][0], expected)
        assert torch.equal(dataset.raw_image(0).to_tensor(), torch.from_numpy(pixels).permute(2, 0, 1))
        assert tissue_statistics(pixels) != tissue_statistics(expected.permute(1, 2, 0).numpy())


def test_colour_of_sixteen_bits_is_normalised_too(tmp_path):
    values = np.array(photo(size=(20, 16)).convert("RGB"))
    (tmp_path / "A").mkdir()
    tifffile.imwrite(tmp_path / "A" / "x.tif", values.astype(np.uint16) * 257, photometric="rgb")
    found = histology(root=tmp_path, stain_norm="reinhard")[0][0]
    assert torch.equal(found, torch.from_numpy(reinhard(values)).permute(2, 0, 1))


def test_a_white_tile_trains_along(tmp_path):
    class_folders(tmp_path, slides=1)
    Image.new("RGB", (20, 16), (255, 255, 255)).save(tmp_path / "ADI" / "s0" / "white.png")
    dataset = histology(root=tmp_path, stain_norm="reinhard")
    white = next(index for index in range(len(dataset)) if dataset.path(index).endswith("white.png"))
    assert (dataset[white][0] == 255).all()


def test_a_dataset_goes_to_workers(tmp_path):
    class_folders(tmp_path)
    dataset = histology(root=tmp_path, stain_norm="reinhard", slide_pattern=r"/(s\d)/", split="train")
    copy = pickle.loads(pickle.dumps(dataset))
    assert names(copy) == names(dataset)
    assert torch.equal(copy[3][0], dataset[3][0])


def test_it_trains_twenty_steps(tmp_path):
    class_folders(tmp_path / "data")
    string = f"Histology:root='{tmp_path / 'data'}':slide_level=2:stain_norm=reinhard:split=train"
    assert train(tmp_path / "run", *RGB_RUN, f"train.dataset_path={string}") == 0
    assert len(metrics_of(tmp_path / "run")) == 20
    assert torch.isfinite(losses_of(tmp_path / "run")).all()
