import os
import pickle
import re
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
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
        ({"split": "half"}, "split=half must be one of all, train, val, test"),
        ({"split": "test"}, "test_fraction=0 must be above 0 for split=test"),
        ({"val_fraction": 1.5}, "val_fraction=1.5 must be at least 0 and below 1"),
        ({"test_fraction": -1}, "test_fraction=-1.0 must be at least 0 and below 1"),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            "val_fraction=0.5 and test_fraction=0.5 together must be below 1",
        ),
        ({"bits": 12}, "bits=12 must be 8 or 16"),
        ({"label_level": -1}, "label_level=-1 must be at least 0"),
        ({"label_level": 0, "classes": "a"}, "classes= needs labels; leave out label_level=0"),
        ({"classes": "a,,b"}, "classes=a,,b: must be names with a comma between two"),
        ({"exclude": ""}, "exclude=: must be names with a comma between two"),
        ({"split_by": "level0"}, "split_by=level0 must be path, folder, or level1, level2, ..."),
    ],
)
def test_wrong_options_are_config_errors(tmp_path, options, sentence):
    write_photos(tmp_path, 2)
    with pytest.raises(ConfigError) as error:
        folder(tmp_path, **options)
    assert str(error.value) == f"dataset ImageFolder: {sentence}"


def tree(root, names):
    """Write a photograph under each name."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(number, size=(8, 8)), "PNG"))


NESTED = [
    f"site_{site}/{kind}/slide_{slide}/{number}.png"
    for site in (1, 2)
    for kind in ("cat", "dog")
    for slide in (1, 2, 3)
    for number in (1, 2)
]


def test_folders_of_any_level_give_the_labels(tmp_path):
    tree(tmp_path, [*NESTED, "site_1/stray.png"])
    assert folder(tmp_path).class_names == ["site_1", "site_2"]
    second = folder(tmp_path, label_level=2)
    assert second.class_names == ["cat", "dog"]
    assert second.get_targets().tolist() == [0] * 6 + [1] * 6 + [-1] + [0] * 6 + [1] * 6
    none = folder(tmp_path, label_level=0)
    assert (none.get_targets(), none.class_names, none[0][1]) == (None, [], None)


def test_classes_choose_images(tmp_path):
    tree(tmp_path, ["ant/1.png", "bee/1.png", "bee/2.png", "cow/1.png", "0.png"])
    dataset = folder(tmp_path, classes="cow, bee")
    assert names(dataset) == ["bee/1.png", "bee/2.png", "cow/1.png"]
    assert dataset.class_names == ["bee", "cow"]
    assert [dataset[index][1] for index in range(3)] == dataset.get_targets().tolist() == [0, 0, 1]
    with pytest.raises(DatasetError) as error:
        folder(tmp_path, classes="bee,cwo")
    assert str(error.value) == (
        f"dataset ImageFolder: classes=cwo: no folder of that name holds images of {tmp_path}; did you mean cow? "
        "known are ant, bee, cow"
    )


def test_excluded_files_and_folders_are_left_out(tmp_path):
    tree(tmp_path, ["a/1.png", "a/1_mask.png", "a/thumbs/1.png", "b/old/1.png", "b/new/old/1.png", "b/2.png"])
    assert names(folder(tmp_path, exclude="thumbs,*_mask.*")) == [
        "a/1.png",
        "b/2.png",
        "b/new/old/1.png",
        "b/old/1.png",
    ]
    assert names(folder(tmp_path, exclude="b/*/old,a/*")) == ["b/2.png", "b/old/1.png"]
    with pytest.raises(DatasetError) as error:
        folder(tmp_path, exclude="*.png")
    assert str(error.value) == f"folder {tmp_path}: all its images are left out by exclude=*.png"
    (tmp_path / "broken").symlink_to("/")
    assert len(folder(tmp_path, exclude="broken")) == 6


@pytest.mark.parametrize(("split_by", "num_groups"), [("folder", 12), ("level1", 2), ("level3", 12), ("level9", 12)])
def test_groups_stay_together(tmp_path, split_by, num_groups):
    tree(tmp_path, NESTED)
    options = {"split_by": split_by, "val_fraction": 0.3, "test_fraction": 0.3}
    whole = folder(tmp_path, split_by=split_by)
    groups, group_names = whole.groups(), whole.metadata()["group"]
    assert len(set(groups)) == len(set(group_names)) == num_groups
    assert len(set(zip(groups.tolist(), group_names.tolist(), strict=True))) == num_groups
    found = []
    for split in ("train", "val", "test"):
        try:
            found.append(set(folder(tmp_path, split=split, **options).metadata()["group"].tolist()))
        except DatasetError:
            assert num_groups == 2  # two groups cannot fill three splits
    assert sum(len(part) for part in found) == num_groups == len(set().union(*found))


def test_images_that_stand_alone_have_no_groups(tmp_path):
    tree(tmp_path, NESTED)
    for dataset in (folder(tmp_path), folder(tmp_path, split_by="path")):
        assert dataset.groups() is None
        assert "group" not in dataset.metadata()


def test_16_bit_files_keep_their_bits_on_request(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    tree(tmp_path, ["plain.png"])
    deep, plain = (image for image, _ in (folder(tmp_path, bits=16)[index] for index in (0, 1)))
    assert deep.dtype == plain.dtype == torch.uint16
    assert np.array_equal(deep[0].numpy(), values)
    assert folder(tmp_path)[0][0].mode == "RGB"


def test_files_of_every_kind_simply_work(tmp_path):
    colour = photo(size=(16, 12))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        b"alpha.png": encode(colour.convert("RGBA"), "PNG"),
        b"bilevel.png": encode(colour.convert("1"), "PNG"),
        b"caf\xe9.png": encode(colour, "PNG"),
        b"cmyk.jpg": encode(colour.convert("CMYK")),
        b"deep.png": encode(Image.fromarray(np.arange(192, dtype=np.uint16).reshape(12, 16) * 300), "PNG"),
        b"palette.png": encode(colour.convert("P"), "PNG"),
        b"turned.jpg": encode(colour, exif=exif),
    }
    for name, data in files.items():
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(data)
    tifffile.imwrite(tmp_path / "wide.tif", np.arange(192, dtype=np.uint32).reshape(12, 16) * 10**7)
    for bits, channels in ((8, 1), (8, 3), (16, 1), (16, 3)):
        dataset = make_dataset(f"ImageFolder:root='{tmp_path}':bits={bits}", channels=channels)
        assert [os.path.basename(os.fsencode(dataset.path(index))) for index in range(8)] == [
            *sorted(files),
            b"wide.tif",
        ]
        for index, name in enumerate(sorted(files)):
            pixels = dataset.encoded_image(index).to_tensor()
            assert pixels.shape == (channels, *((16, 12) if name == b"turned.jpg" else (12, 16)))
            assert pixels.dtype == (torch.uint8 if bits == 8 else torch.uint16)
            assert pixels.float().std() > 0.1 * 2**bits


def test_broken_files_are_named_with_what_is_wrong(tmp_path):
    write_photos(tmp_path, 1)
    (tmp_path / "x1.jpg").write_bytes(b"")
    whole = encode(photo(size=(200, 150)))
    (tmp_path / "x2.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x3.png").write_bytes(png_header(100_000, 100_000))
    dataset = folder(tmp_path)
    sentences = []
    for index in (1, 2, 3):
        with pytest.raises(DatasetError) as error:
            dataset[index]
        sentences.append(str(error.value).partition(" cannot be read: ")[2])
    assert sentences[0] == "the file is empty"
    assert re.fullmatch(r"damaged file \(image file is truncated \([0-9]+ bytes not processed\)\)", sentences[1])
    assert sentences[2] == (
        "100000 x 100000 pixels are more than data.max_image_pixels=178956970; "
        "raise it if the image is what it claims to be"
    )


def png_header(width, height):
    """Start of a PNG file of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = struct.pack(">I", 8) + b"IDAT" + bytes(12)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + data


def cached(root, cache, **options):
    keys = "".join(f":{key}={value}" for key, value in options.items())
    return make_dataset(f"ImageFolder:root='{root}'{keys}", cache_dir=str(cache))


@pytest.fixture
def settled(monkeypatch):
    """Let scans take place 3 s later, when a folder's last change can be told from the next one."""
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 3 * 10**9)


def listed(monkeypatch, root):
    """Folders of the data that are listed from now on."""
    folders, scandir = [], os.scandir

    def listing(path="."):
        if os.fsdecode(path).startswith(str(root)):
            folders.append(os.fsdecode(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listing)
    return folders


def test_what_was_found_is_kept_and_found_anew_when_a_folder_changes(tmp_path, monkeypatch, settled):
    root, cache = tmp_path / "photos", tmp_path / "cache"
    tree(root, ["a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png", "c.png"])
    fresh = [names(cached(root, cache, split=split)) for split in ("all", "train", "val")]
    with monkeypatch.context() as patch:
        folders = listed(patch, root)
        kept = [cached(root, cache, split=split) for split in ("all", "train", "val")]
    assert folders == []
    assert [names(dataset) for dataset in kept] == fresh
    assert kept[0].get_targets().tolist() == [0, 0, 1, 1, 1, -1]
    assert kept[0].class_names == ["a", "b"]
    tree(root, ["b/6.png"])
    assert names(cached(root, cache)) == [*fresh[0][:5], "b/6.png", "c.png"]
    os.remove(root / "a/1.png")
    (root / "d").mkdir()
    assert names(cached(root, cache)) == ["a/2.png", "b/3.png", "b/4.png", "b/5.png", "b/6.png", "c.png"]
    tree(root, ["d/7.png"])
    assert cached(root, cache).class_names == ["a", "b", "d"]
    assert not [path for path in root.rglob("*") if path.suffix != ".png" and not path.is_dir()]


def test_a_folder_that_has_just_changed_is_gone_through_again(tmp_path, monkeypatch):
    root, cache = tmp_path / "photos", tmp_path / "cache"
    tree(root, ["1.png"])
    cached(root, cache)
    folders = listed(monkeypatch, root)
    assert names(cached(root, cache)) == ["1.png"]
    assert folders == [str(root)]
    assert len(list(cache.rglob("folder-*.index"))) == 1  # the same content has the same name


def test_a_dataset_that_is_kept_can_be_sent_to_other_processes(tmp_path):
    root, cache = tmp_path / "photos", tmp_path / "cache"
    tree(root, [f"{kind}/{number}.png" for kind in "ab" for number in range(200)])
    dataset = cached(root, cache, split="train", split_by="path")
    message = pickle.dumps(dataset)
    assert len(message) < 3000  # the names of files, not what stands in them
    copy = pickle.loads(message)
    assert names(copy) == names(dataset)
    assert copy.get_targets().tolist() == dataset.get_targets().tolist()
    shutil.rmtree(cache)
    with pytest.raises(DatasetError, match="index .*cache.* cannot be read any more: .*; start the program again"):
        pickle.loads(message)


def test_an_index_outside_is_an_index_error(tmp_path):
    write_photos(tmp_path, 2)
    with pytest.raises(IndexError, match="index 2 of a dataset of 2 images"):
        folder(tmp_path)[2]
