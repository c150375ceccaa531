import pytest
from support.image_nets import IMAGE_NET_CLASSES, write, write_image_net

from dinov2.data import make_dataset
from dinov2.data.datasets import ImageNet
from dinov2.errors import ConfigError, DatasetError


@pytest.fixture
def root(tmp_path):
    write_image_net(tmp_path / "imagenet")
    return tmp_path / "imagenet"


def image_net(root, split, **options):
    keys = "".join(f":{key}='{value}'" for key, value in options.items())
    return make_dataset(f"ImageNet:split={split}:root='{root}'{keys}")


@pytest.mark.parametrize(("split", "count"), [("TRAIN", 6), ("VAL", 3), ("ALL", 9)])
def test_labelled_splits(root, split, count):
    dataset = image_net(root, split)
    assert isinstance(dataset, ImageNet)
    assert len(dataset) == count
    assert dataset.class_names == ["tench", "crane (n02012849)", "crane (n03126707)"]
    folders = [dataset.path(index).split("/")[-2] for index in range(count)]
    assert dataset.get_targets().tolist() == [sorted(IMAGE_NET_CLASSES).index(name) for name in folders]


def test_the_test_split_has_no_labels(root):
    dataset = image_net(root, "TEST")
    assert (len(dataset), dataset.get_targets(), dataset[0][1]) == (1, None, None)


def test_what_was_found_is_kept_in_extra_and_not_beside_the_images(root, tmp_path):
    before = sorted(root.rglob("*"))
    image_net(root, "TRAIN", extra=tmp_path / "extra")
    assert sorted(path.suffix for path in (tmp_path / "extra").rglob("*.*")) == [".index", ".index", ".lock", ".lock"]
    assert sorted(root.rglob("*")) == before
    dataset = make_dataset(f"ImageNet:split=VAL:root='{root}'", cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 3
    assert list((tmp_path / "cache").rglob("*.index"))


def test_wrong_layouts_are_named(root):
    with pytest.raises(ConfigError) as error:
        image_net(root, "x")
    assert str(error.value) == "dataset ImageNet: split=x must be one of train, val, test, all"
    with pytest.raises(DatasetError) as error:
        image_net(root.parent, "TRAIN")
    assert str(error.value) == (
        f"dataset ImageNet: folder {root.parent} has no folder train; expected {root.parent}/train/<class>/*.JPEG; "
        f"did you mean root={root}?"
    )
    with pytest.raises(DatasetError) as error:
        image_net(root / "no", "TEST")
    assert str(error.value) == (f"dataset ImageNet: folder {root}/no does not exist; expected {root}/no/test/*.JPEG")
    write(root / "val" / "ILSVRC2012_val_00000099.JPEG")
    with pytest.raises(DatasetError) as error:
        image_net(root, "VAL")
    assert str(error.value) == (
        f"dataset ImageNet: {root}/val/ILSVRC2012_val_00000099.JPEG lies in no class folder; "
        f"expected {root}/val/<class>/*.JPEG"
    )


def test_a_broken_list_of_titles_is_named(root):
    (root / "labels.txt").write_text("n01440764,tench\nn02012849\n")
    with pytest.raises(DatasetError) as error:
        image_net(root, "TRAIN")
    assert str(error.value) == (
        f"dataset ImageNet: {root}/labels.txt: line 2 is not <class>,<title>; mend it or remove it"
    )
    (root / "labels.txt").unlink()
    assert image_net(root, "TRAIN").class_names == sorted(IMAGE_NET_CLASSES)
