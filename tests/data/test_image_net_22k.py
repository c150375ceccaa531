import gzip
import pickle
import tarfile

import numpy as np
import pytest
from support.image_nets import add, write_image_net_22k
from support.images import encode, photo

from dinov2.data import make_dataset
from dinov2.data.datasets import ImageNet22k
from dinov2.errors import DatasetError


@pytest.fixture
def root(tmp_path):
    write_image_net_22k(tmp_path / "imagenet22k")
    return tmp_path / "imagenet22k"


def image_net_22k(root, **options):
    keys = "".join(f":{key}='{value}'" for key, value in options.items())
    return make_dataset(f"ImageNet22k:root='{root}'{keys}")


def test_images_come_out_of_the_archives(root, tmp_path):
    for dataset in (image_net_22k(root), image_net_22k(root, extra=tmp_path / "extra")):
        assert isinstance(dataset, ImageNet22k)
        assert dataset.class_names == ["n00004475", "n00005787"]
        assert dataset.get_targets().tolist() == [0, 0, 0, 1, 1, 1]
        assert dataset.path(4) == f"{root}/n00005787.tar/n00005787_1.JPEG"
        for index, number in enumerate([10, 11, 12, 0, 1, 2]):
            assert np.array_equal(np.array(dataset[index][0]), np.array(photo(number, size=(16, 12))))
    assert list((tmp_path / "extra").rglob("imagenet22k-*.index"))
    assert not list(root.rglob("*.index"))
    assert pickle.loads(pickle.dumps(dataset)).path(4) == dataset.path(4)
    assert len(pickle.dumps(dataset)) < 3000


def test_an_archive_that_changes_is_listed_anew(root, tmp_path):
    assert len(image_net_22k(root, extra=tmp_path / "extra")) == 6
    with tarfile.open(root / "n00004475.tar", "a") as archive:
        add(archive, "n00004475_7.JPEG", encode(photo()))
    assert len(image_net_22k(root, extra=tmp_path / "extra")) == 7


def test_parts_can_be_held_out(root):
    parts = [image_net_22k(root, split=split, val_fraction=0.5) for split in ("train", "val")]
    found = [part.path(index) for part in parts for index in range(len(part))]
    assert len(found) == len(set(found)) == 6


def test_wrong_layouts_and_damaged_archives_are_named(root, tmp_path):
    def sentence(folder):
        with pytest.raises(DatasetError) as error:
            image_net_22k(folder)
        return str(error.value)

    expected = f"expected one archive a class, such as {tmp_path}/no/n00004475.tar"
    assert sentence(tmp_path / "no") == f"dataset ImageNet22k: folder {tmp_path}/no does not exist; {expected}"
    assert sentence(tmp_path) == (
        f"dataset ImageNet22k: folder {tmp_path} holds no .tar files; expected one archive a class, such as "
        f"{tmp_path}/n00004475.tar; for folders of images, use ImageFolder:root={tmp_path}"
    )
    path = root / "n00004475.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:700])
    assert sentence(root) == f"archive {path} is cut off in n00004475_0.JPEG; copy it anew"
    path.write_bytes(b"no archive" * 100)
    assert sentence(root) == f"archive {path} cannot be read: invalid header"
    for name in ("n00004475.tar", "n00005787.tar"):
        with tarfile.open(root / name, "w"):
            pass
    assert sentence(root) == f"dataset ImageNet22k: the 2 archives in {root} are empty"


def test_damaged_gzip_data_are_named(root):
    with tarfile.open(root / "n00004475.tar", "w") as archive:
        add(archive, "a.JPEG", encode(photo()))
        add(archive, "b.JPEG", gzip.compress(encode(photo()))[:-30])
        add(archive, "c.JPEG", gzip.compress(encode(photo()))[:10] + b"x" * 40)
    dataset = image_net_22k(root)
    with pytest.raises(DatasetError) as error:
        dataset[1]
    assert str(error.value) == (
        f"image 1 ({root}/n00004475.tar/b.JPEG) cannot be read: its gzip data are cut off, or hold more than "
        "268435456 bytes"
    )
    with pytest.raises(DatasetError, match=r"image 2 \(.*c.JPEG\) cannot be read: damaged gzip data \("):
        dataset[2]
