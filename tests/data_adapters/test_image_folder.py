import os

import numpy as np
import pytest
from support.images import encode, photo, write_photos

from dinov2.data import make_dataset
from dinov2.errors import ConfigError, DatasetError


def folder(path, **options):
    return make_dataset(f"ImageFolder:root='{path}'" + "".join(f":{key}={value}" for key, value in options.items()))


def names(dataset):
    return [os.path.relpath(dataset.path(index), dataset.root) for index in range(len(dataset))]


def test_images_of_any_depth_case_and_format_are_found_in_order(tmp_path):
    files = [
        "b/2.JPG",
        "b/1.png",
        "a/deep/er/x.TiFF",
        "a/y.bmp",
        "a/z.webp",
        "b/3.jpeg",
        "b/4.tif",
        "b/5.ppm",
        "b/6.pgm",
    ]
    for number, name in enumerate(files):
        write_photos(tmp_path / str(number), 1, suffix=os.path.splitext(name)[1])
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / str(number)).joinpath(f"photo_0000{os.path.splitext(name)[1]}").rename(tmp_path / "all" / name)
    for other in ("notes.txt", ".hidden.jpg", "b/.cache/1.png", "b/1.png.part"):
        path = tmp_path / "all" / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    dataset = folder(tmp_path / "all")
    assert names(dataset) == sorted(files)
    assert dataset.class_names == ["a", "b"]
    assert dataset.get_targets().tolist() == [0] * 3 + [1] * 6
    assert [dataset[index][1] for index in range(9)] == [0] * 3 + [1] * 6
    assert all(dataset[index][0].mode == "RGB" for index in range(9))


def test_without_folders_there_are_no_labels(tmp_path):
    write_photos(tmp_path, 3)
    dataset = folder(tmp_path)
    assert dataset.get_targets() is None
    assert dataset.class_names == []
    assert dataset[1][1] is None
    assert list(dataset.metadata()) == ["path"]


def test_an_image_beside_the_class_folders_has_no_label(tmp_path):
    write_photos(tmp_path, 4, num_classes=2)
    (tmp_path / "stray.png").write_bytes(encode(photo(), "PNG"))
    dataset = folder(tmp_path)
    assert dataset.get_targets().tolist() == [0, 0, 1, 1, -1]
    assert dataset[4][1] is None
    assert dataset.metadata()["target"].tolist() == [0, 0, 1, 1, -1]


def test_train_and_val_share_nothing_and_stay_put_when_images_come(tmp_path):
    write_photos(tmp_path, 90, num_classes=3, size=(8, 8))
    splits = {split: names(folder(tmp_path, split=split)) for split in ("train", "VAL", "all")}
    assert sorted(splits["train"] + splits["VAL"]) == splits["all"]
    assert 20 <= len(splits["VAL"]) <= 40
    assert folder(tmp_path, split="val").class_names == ["class_0", "class_1", "class_2"]
    few = names(folder(tmp_path, split="val", val_fraction=0.1))
    assert set(few) < set(splits["VAL"])
    write_photos(tmp_path / "class_1" / "new", 30, size=(8, 8))
    after = names(folder(tmp_path, split="val"))
    assert [name for name in after if "new" not in name] == splits["VAL"]


def test_labels_go_with_their_images_in_a_split(tmp_path):
    write_photos(tmp_path, 60, num_classes=3, size=(8, 8))
    dataset = folder(tmp_path, split="train")
    expected = [int(name.split("/")[0][-1]) for name in names(dataset)]
    assert dataset.get_targets().tolist() == expected
    assert dataset.get_targets().dtype == np.int64


def test_names_may_hold_any_bytes(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9:+'.jpg"
    with open(path, "wb") as file:
        file.write(encode(photo()))
    assert folder(tmp_path)[0][0].size == (64, 48)


def test_links_inside_are_followed_and_links_out_or_round_are_refused(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    write_photos(root / "a", 2)
    write_photos(outside, 1)
    (root / "b").symlink_to(root / "a", target_is_directory=True)
    assert names(folder(root)) == ["a/photo_0000.jpg", "a/photo_0001.jpg", "b/photo_0000.jpg", "b/photo_0001.jpg"]
    (root / "c").symlink_to(outside, target_is_directory=True)
    with pytest.raises(DatasetError) as error:
        folder(root)
    assert str(error.value) == (f"link {root}/c leaves the dataset's folder; copy the files, or set root= above both")
    (root / "c").unlink()
    (root / "d.jpg").symlink_to(outside / "photo_0000.jpg")
    with pytest.raises(DatasetError, match="d.jpg leaves the dataset's folder"):
        folder(root)
    (root / "d.jpg").unlink()
    (root / "a" / "up").symlink_to(root, target_is_directory=True)
    with pytest.raises(DatasetError) as error:
        folder(root)
    assert str(error.value) == f"link {root}/a/up leads back to a folder it lies in; remove it"


def test_a_root_that_is_a_link_is_followed(tmp_path):
    write_photos(tmp_path / "real", 2)
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert len(folder(tmp_path / "link")) == 2


def test_missing_empty_and_useless_folders_are_named(tmp_path):
    def sentence(path):
        with pytest.raises(DatasetError) as error:
            folder(path)
        return str(error.value)

    assert sentence(tmp_path / "no") == f"folder {tmp_path}/no does not exist; check root= in the dataset string"
    assert sentence(tmp_path) == f"folder {tmp_path} is empty"
    (tmp_path / "a.txt").write_text("x")
    assert sentence(tmp_path / "a.txt") == f"folder {tmp_path}/a.txt is not a folder; check root= in the dataset string"
    (tmp_path / "b.csv").write_text("x")
    assert sentence(tmp_path) == (
        f"folder {tmp_path} holds 2 files but no image (.jpg .jpeg .png .tif .tiff .bmp .webp .ppm .pgm); "
        f"the first: {tmp_path}/a.txt"
    )
    for name in ("c.jpg", "d.jpg"):
        (tmp_path / name).write_bytes(b"")
    assert sentence(tmp_path) == (
        f"folder {tmp_path}: none of the first 2 of its 2 images can be read; "
        f"the first: image 0 ({tmp_path}/c.jpg) cannot be read: the file is empty"
    )


def test_one_readable_image_is_enough(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(encode(photo()))
    assert len(folder(tmp_path)) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"split": "half"}, "dataset ImageFolder: split=half must be one of all, train, val, test"),
        ({"split": "test"}, "dataset ImageFolder: test_fraction=0 must be above 0 for split=test"),
        ({"val_fraction": 1.5}, "dataset ImageFolder: val_fraction=1.5 must be at least 0 and below 1"),
        ({"test_fraction": -1}, "dataset ImageFolder: test_fraction=-1.0 must be at least 0 and below 1"),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            "dataset ImageFolder: val_fraction=0.5 and test_fraction=0.5 together must be below 1",
        ),
        ({"bits": 12}, "dataset ImageFolder: bits=12 must be 8 or 16"),
    ],
)
def test_wrong_options_are_config_errors(tmp_path, options, sentence):
    with pytest.raises(ConfigError) as error:
        folder(tmp_path, **options)
    assert str(error.value) == sentence


def test_an_index_outside_is_an_index_error(tmp_path):
    write_photos(tmp_path, 2)
    with pytest.raises(IndexError, match="index 2 of a dataset of 2 images"):
        folder(tmp_path)[2]
