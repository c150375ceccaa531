import json
import os
import pickle
import shutil

import numpy as np
import pytest
import tifffile
import torch
from support.industrial_json import make_grouped_json, write_annotations
from support.training import losses_of, metrics_of, train

from dinov2.data import make_dataset
from dinov2.errors import ConfigError, DatasetError

RGB_RUN = (
    "student.in_chans=3",
    "train.OFFICIAL_EPOCH_LENGTH=20",
    "train.batch_size_per_gpu=6",
    "evaluation.eval_period_iterations=20",
    "evaluation.knn.nb_knn=[3]",
)


def grouped(root, **options):
    cache_dir = options.pop("cache_dir", None)
    text = f"GroupedJSON:root='{root}'" + "".join(f":{key}={value}" for key, value in options.items())
    return make_dataset(text, cache_dir=cache_dir)


def names(dataset):
    return [os.path.relpath(dataset.path(index), dataset.root) for index in range(len(dataset))]


def sentence(root, **options):
    with pytest.raises(DatasetError) as error:
        grouped(root, **options)
    return str(error.value).replace(f"{root}/annotations", "ANN").replace(str(root), "ROOT")


def sentence_about(tmp_path, content):
    """Sentence about a train.json of this content, beside a good val.json."""
    write_annotations(tmp_path, "train", content)
    return sentence(tmp_path)


@pytest.fixture
def contents(tmp_path):
    return make_grouped_json(tmp_path, groups=4, images_of_group=2, size=(24, 16))


def test_a_split_is_its_annotation_file_in_any_case(tmp_path, contents):
    dataset = grouped(tmp_path, split="TRAIN")
    entries = contents["train"]["data_list"]
    assert names(dataset) == [entry["img_path"] for entry in entries]
    assert dataset.get_targets().tolist() == [entry["gt_label"] for entry in entries] == [0, 0, 1, 1] * 2
    assert dataset.class_names == ["negative", "positive"]
    image, target = dataset[3]
    assert (image.mode, image.size, target) == ("RGB", (24, 16), 1)
    assert dataset.metadata()["group"].tolist() == [entry["group_id"] for entry in entries]
    assert set(dataset.metadata()) == {"path", "target", "group", "split"}
    together = names(dataset) + names(grouped(tmp_path, split="val")) + names(grouped(tmp_path, split="Test"))
    everything = grouped(tmp_path, split="all")
    assert names(everything) == names(grouped(tmp_path)) == together
    assert everything.metadata()["split"].tolist() == ["train"] * 8 + ["val"] * 8 + ["test"] * 8


def test_groups_are_numbered_alike_in_every_split(tmp_path, contents):
    assert grouped(tmp_path, split="train").groups().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert grouped(tmp_path, split="val").groups().tolist() == [4, 4, 5, 5, 6, 6, 7, 7]
    assert grouped(tmp_path).groups().tolist() == [number for number in range(12) for _ in range(2)]


def test_paths_may_start_from_the_folder_of_the_split(tmp_path):
    contents = make_grouped_json(tmp_path, groups=2, size=(24, 16), is_below_root=False)
    assert contents["val"]["data_list"][0]["img_path"] == "1015372/1015372-0.jpeg"
    dataset = grouped(tmp_path, split="val")
    assert names(dataset)[0] == "val/1015372/1015372-0.jpeg"
    assert dataset[0][0].size == (24, 16)


def test_paths_with_backslashes_dots_and_double_slashes_are_understood(tmp_path, contents):
    entries = contents["train"]["data_list"]
    expected = [entry["img_path"] for entry in entries]
    for entry, change in zip(entries, (("/", "\\"), ("/", "//"), ("/", "/./"), ("train", "./train")), strict=False):
        entry["img_path"] = entry["img_path"].replace(*change)
    write_annotations(tmp_path, "train", contents["train"])
    assert names(grouped(tmp_path, split="train")) == expected


def test_group_ids_may_be_numbers_and_labels_null(tmp_path, contents):
    for entry in contents["train"]["data_list"]:
        entry["group_id"] = int(entry["group_id"])
    contents["train"]["data_list"][2]["gt_label"] = None
    write_annotations(tmp_path, "train", contents["train"])
    dataset = grouped(tmp_path, split="train")
    assert dataset.metadata()["group"][0] == "1015272"
    assert dataset[2][1] is None
    assert dataset.get_targets().tolist() == [0, 0, -1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("name", ["train", "everything"])
def test_one_file_alone_is_split_by_its_groups(tmp_path, name):
    make_grouped_json(tmp_path, splits=[name], groups=40, images_of_group=2, size=(8, 8))
    splits = {split: grouped(tmp_path, split=split) for split in ("train", "val", "test")}
    groups = {split: set(dataset.metadata()["group"]) for split, dataset in splits.items()}
    assert sorted(group for found in groups.values() for group in found) == sorted(
        set(grouped(tmp_path).metadata()["group"])
    )
    assert 15 <= len(groups["train"]) <= 32 and 3 <= len(groups["val"]) <= 14 and 3 <= len(groups["test"]) <= 14
    assert sum(len(dataset) for dataset in splits.values()) == 80
    make_grouped_json(tmp_path, splits=[name], groups=60, images_of_group=2, size=(8, 8))
    for split, before in groups.items():
        assert before <= set(grouped(tmp_path, split=split).metadata()["group"])
    assert len(grouped(tmp_path, split="val", val_fraction=0.01, test_fraction=0.9)) < len(splits["val"])


def test_files_of_other_formats_keep_what_they_hold(tmp_path, contents):
    pixels = np.arange(24 * 16 * 3, dtype=np.uint16).reshape(16, 24, 3) * 50
    tifffile.imwrite(tmp_path / "train" / "deep.tif", pixels, photometric="rgb")
    contents["train"]["data_list"][0]["img_path"] = "train/deep.tif"
    write_annotations(tmp_path, "train", contents["train"])
    deep = grouped(tmp_path, split="train", bits=16)[0][0]
    np.testing.assert_array_equal(deep.permute(1, 2, 0).numpy(), pixels)
    assert grouped(tmp_path, split="train", bits=16)[1][0].dtype == torch.uint16


def test_a_dataset_is_indexed_once_and_handed_to_workers_by_name(tmp_path, contents):
    dataset = grouped(tmp_path, split="val", cache_dir=tmp_path / "cache")
    for split in ("train", "val", "test"):
        shutil.rmtree(tmp_path / split)
    again = grouped(tmp_path, split="val", cache_dir=tmp_path / "cache")
    assert names(again) == names(dataset)
    pickled = pickle.dumps(dataset)
    assert names(pickle.loads(pickled)) == names(dataset)
    assert len(pickled) < 2000
    with pytest.raises(DatasetError) as error:
        again[1]
    assert str(error.value) == f"image 1 ({dataset.path(1)}) cannot be read: No such file or directory"
    write_annotations(tmp_path, "val", contents["val"] | {"comment": "changed"})
    assert "is missing" in sentence(tmp_path, split="val", cache_dir=tmp_path / "cache")


def test_a_syntax_error_is_named_by_file_and_line(tmp_path, contents):
    path = tmp_path / "annotations" / "val.json"
    lines = path.read_text().splitlines()
    lines[9] = lines[9].replace(",", "")
    path.write_text("\n".join(lines))
    assert sentence(tmp_path, split="train") == (
        "ANN/val.json, line 11, column 7: not JSON (Expecting ',' delimiter); correct the file there"
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xff\xfe", "is not UTF-8 text (byte 0); save it as UTF-8"),
        (b"[" * 100_000, "is not an annotation file: nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "is not an annotation file: a number in it is too long"),
        (b"[]", "holds a list; it must be an object with metainfo and data_list"),
        (b"3", "holds a number; it must be an object with metainfo and data_list"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, contents, data, expected):
    (tmp_path / "annotations" / "test.json").write_bytes(data)
    assert sentence(tmp_path) == f"ANN/test.json {expected}"


@pytest.mark.parametrize("key", ["img_path", "gt_label", "group_id"])
def test_a_missing_key_is_named_with_its_entry(tmp_path, contents, key):
    del contents["train"]["data_list"][5][key]
    assert sentence_about(tmp_path, contents["train"]) == (
        f"ANN/train.json: data_list[5] has no key {key}; an image needs img_path, gt_label, group_id"
    )


@pytest.mark.parametrize("label", [2, -1, True, 1.0, "positive", [1]])
def test_a_label_outside_the_classes_is_refused(tmp_path, contents, label):
    contents["train"]["data_list"][1]["gt_label"] = label
    assert sentence_about(tmp_path, contents["train"]) == (
        f"ANN/train.json: data_list[1] has gt_label={json.dumps(label)}; metainfo.classes has 2 classes, so it must be "
        "a whole number from 0 to 1, or null without a label"
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret.jpeg", "which leads upwards by .."),
        ("train\\..\\..\\secret.jpeg", "which leads upwards by .."),
        ("train/../../secret.jpeg", "which leads upwards by .."),
        ("/etc/passwd", "which is an absolute path"),
        ("C:\\images\\1.jpeg", "which is an absolute path"),
        ("train/a\0.jpeg", "which holds a NUL character"),
    ],
)
@pytest.mark.parametrize("entry", [0, 3])
def test_a_path_that_leaves_the_root_is_refused(tmp_path, contents, path, reason, entry):
    contents["train"]["data_list"][entry]["img_path"] = path
    assert sentence_about(tmp_path, contents["train"]) == (
        f"ANN/train.json: data_list[{entry}] has img_path={json.dumps(path)}, {reason}; paths must stay below the "
        "dataset's folder"
    )


def test_links_out_of_the_root_are_refused_and_links_inside_are_followed(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    contents = make_grouped_json(root, groups=4, images_of_group=2, size=(24, 16))
    file = root / contents["train"]["data_list"][2]["img_path"]
    file.rename(root / "kept.jpeg")
    file.symlink_to(root / "kept.jpeg")
    assert grouped(root, split="train")[2][0].size == (24, 16)
    outside.mkdir()
    (root / "kept.jpeg").rename(outside / "kept.jpeg")
    file.unlink()
    file.symlink_to(outside / "kept.jpeg")
    assert sentence(root) == (
        "link ROOT/train/1015273/1015273-0.jpeg leaves the dataset's folder; copy the files, or set root= above both"
    )
    file.unlink()
    (outside / "kept.jpeg").rename(file)
    dataset = grouped(root, split="train")
    file.parent.rename(outside / "1015273")
    file.parent.symlink_to(outside / "1015273")
    assert "link ROOT/train/1015273 leaves the dataset's folder" in sentence(root)
    with pytest.raises(DatasetError, match="1015273-0.jpeg leaves the dataset's folder"):
        dataset[2]


def test_an_image_of_two_splits_or_entries_is_refused(tmp_path, contents):
    train = contents["train"]["data_list"]
    train.append(dict(train[2]))
    assert sentence_about(tmp_path, contents["train"]) == (
        "ANN/train.json: data_list[8] names the image train/1015273/1015273-0.jpeg again, after data_list[2] of "
        "train.json; an image belongs to one entry of one split"
    )
    train.pop()
    write_annotations(tmp_path, "train", contents["train"])
    contents["val"]["data_list"][1]["img_path"] = "train/1015272/./1015272-1.jpeg"
    write_annotations(tmp_path, "val", contents["val"])
    expected = (
        "ANN/val.json: data_list[1] names the image train/1015272/1015272-1.jpeg again, after data_list[1] of "
        "train.json; an image belongs to one entry of one split"
    )
    assert [sentence(tmp_path, split=split) for split in ("train", "val", "test")] == [expected] * 3


def test_a_group_in_two_splits_is_refused(tmp_path, contents):
    contents["test"]["data_list"][7]["group_id"] = "1015273"
    write_annotations(tmp_path, "test", contents["test"])
    expected = (
        "ANN/test.json: data_list[7] is of group '1015273', as is ANN/train.json: data_list[2]; all images of a group "
        "belong to one split"
    )
    assert [sentence(tmp_path, split=split) for split in ("train", "val", "test")] == [expected] * 3


def test_a_missing_image_is_named_with_its_entry(tmp_path, contents):
    (tmp_path / "train/1015274/1015274-1.jpeg").unlink()
    assert sentence(tmp_path, split="val") == (
        "ANN/train.json: data_list[5] names the image ROOT/train/1015274/1015274-1.jpeg, which is missing; "
        "copy it there or remove the entry"
    )
    shutil.rmtree(tmp_path / "val")
    assert sentence(tmp_path) == (
        "ANN/train.json: data_list[5] names the image ROOT/train/1015274/1015274-1.jpeg, which is missing, as are 8 "
        "others; copy it there or remove the entry"
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data_list": []}, ": data_list is empty; list at least one image or remove the file"),
        ({"data_list": {"0": 1}}, ": data_list holds an object; it must be a list of images"),
        ({"data_list": [7]}, ": data_list[0] is a number; it must be an object with img_path, gt_label, group_id"),
        (
            {"metainfo": {"classes": ["ok", "ok"]}},
            ": metainfo.classes names 'ok' twice; each class needs its own name",
        ),
        ({"metainfo": {"classes": "ok"}}, ': metainfo.classes is "ok"; it must be a list of names'),
        ({"metainfo": {}}, ' has no metainfo.classes; it must name the classes, as {"classes": ["ok", "bad"]}'),
    ],
)
def test_other_mistakes_of_a_file_are_sentences(tmp_path, contents, change, expected):
    assert sentence_about(tmp_path, contents["train"] | change) == f"ANN/train.json{expected}"


def test_a_file_without_images_is_refused(tmp_path, contents):
    del contents["train"]["data_list"]
    assert sentence_about(tmp_path, contents["train"]) == (
        "ANN/train.json has no data_list; it must list the images, each with img_path, gt_label, group_id"
    )


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("img_path", 3, "has img_path=3; it must be the path of an image file"),
        ("img_path", "", 'has img_path=""; it must be the path of an image file'),
        ("img_path", "\ud800.jpeg", 'has img_path="\\ud800.jpeg", which no file can be called'),
        ("group_id", None, "has group_id=null; it must be a name or a whole number"),
        ("group_id", 1.5, "has group_id=1.5; it must be a name or a whole number"),
    ],
)
def test_other_mistakes_of_an_entry_are_sentences(tmp_path, contents, key, value, expected):
    contents["train"]["data_list"][4][key] = value
    assert sentence_about(tmp_path, contents["train"]) == f"ANN/train.json: data_list[4] {expected}"


def test_splits_with_other_classes_are_refused(tmp_path, contents):
    contents["val"]["metainfo"]["classes"] = ["positive", "negative"]
    write_annotations(tmp_path, "val", contents["val"])
    assert sentence(tmp_path) == (
        'ANN/val.json: metainfo.classes is ["positive", "negative"], but in train.json it is ["negative", "positive"]; '
        "all splits need the same classes in the same order"
    )


def test_missing_files_and_folders_are_named(tmp_path, contents):
    (tmp_path / "annotations/val.json").unlink()
    assert sentence(tmp_path, split="val") == "ANN has train.json and test.json, but no val.json for split=val"
    (tmp_path / "annotations/train.json").rename(tmp_path / "annotations/a.json")
    (tmp_path / "annotations/test.json").rename(tmp_path / "annotations/b.json")
    assert sentence(tmp_path) == (
        "ANN holds a.json, b.json; it needs train.json, val.json and test.json, some of them, or one file"
    )
    shutil.rmtree(tmp_path / "annotations")
    assert sentence(tmp_path) == "folder ROOT has no folder annotations; check root= in the dataset string"
    assert sentence(tmp_path / "no") == "folder ROOT does not exist; check root= in the dataset string"


def test_wrong_options_are_config_errors(tmp_path, contents):
    with pytest.raises(ConfigError) as error:
        grouped(tmp_path, split_by="image")
    assert str(error.value) == "dataset GroupedJSON: split_by=image must be group"
    with pytest.raises(ConfigError) as error:
        grouped(tmp_path, split="val", val_fraction=0.1)
    assert str(error.value) == (
        f"dataset GroupedJSON: val_fraction has no effect, as {tmp_path}/annotations has 3 files, each of which is a "
        "split; remove it"
    )
    with pytest.raises(ConfigError) as error:
        grouped(tmp_path, split="training")
    assert str(error.value) == "dataset GroupedJSON: split=training must be one of all, train, val, test"


def test_twenty_steps_of_training_with_k_nn_on_val(tmp_path):
    make_grouped_json(tmp_path / "data", groups=8)
    string = f"GroupedJSON:root={tmp_path / 'data'}"
    options = (
        f"train.dataset_path={string}:split=TRAIN:one_per_group=true",
        f"evaluation.knn.train_dataset_path={string}:split=TRAIN",
        f"evaluation.knn.val_dataset_path={string}:split=VAL",
    )
    assert train(tmp_path / "run", *RGB_RUN, *options) == 0
    assert len(metrics_of(tmp_path / "run")) == 20
    assert np.isfinite(losses_of(tmp_path / "run").numpy()).all()
    result = json.loads((tmp_path / "run/eval/training_19/results_eval_knn.json").read_text())
    assert 0 <= result["knn3_top1_pct"] <= 100
    assert 0 <= result["knn_group_top1_pct"] == result["knn3_group_top1_pct"] <= 100
    assert os.listdir(tmp_path / "run/cache/index")
    assert sorted(os.listdir(tmp_path / "data")) == ["annotations", "test", "train", "val"]
