import pytest
from support.image_nets import IMAGENETTE_CLASSES, write_imagenette

from dinov2.data import make_dataset
from dinov2.errors import ConfigError, DatasetError


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "imagenette2-320"
    write_imagenette(root)
    return root


def imagenette(root, split):
    return make_dataset(f"Imagenette:root='{root}':split={split}")


@pytest.mark.parametrize(("split", "count"), [("TRAIN", 9), ("val", 6), ("all", 15)])
def test_each_split_has_its_images_and_the_names_of_its_classes(root, split, count):
    dataset = imagenette(root, split)
    assert len(dataset) == count
    assert dataset.class_names == ["tench", "church", "parachute"]
    folders = [dataset.path(index).split("/")[-2] for index in range(count)]
    assert dataset.get_targets().tolist() == [sorted(IMAGENETTE_CLASSES).index(name) for name in folders]
    assert dataset[count - 1][1] == 2
    assert dataset[0][0].size == (16, 12)


def test_a_wrong_root_is_named_with_what_was_expected(root):
    layout = "expected {0}/train/<class>/*.JPEG and {0}/val/<class>/*.JPEG"
    with pytest.raises(DatasetError) as error:
        imagenette(root / "no", "train")
    expected = layout.format(root / "no")
    assert str(error.value) == f"dataset Imagenette: folder {root}/no does not exist; {expected}"
    with pytest.raises(DatasetError) as error:
        imagenette(root.parent, "train")
    expected = layout.format(root.parent)
    assert str(error.value) == (
        f"dataset Imagenette: folder {root.parent} has no folder train; {expected}; did you mean root={root}?"
    )
    with pytest.raises(DatasetError, match="has no folder train; expected [^;]*$"):
        imagenette(root / "train", "train")


def test_splits_are_folders(root):
    with pytest.raises(ConfigError) as error:
        imagenette(root, "test")
    assert str(error.value) == "dataset Imagenette: split=test must be one of all, train, val"
    with pytest.raises(ConfigError, match="dataset Imagenette has no key 'val_fraction'; known are root, split, bits"):
        make_dataset(f"Imagenette:root='{root}':val_fraction=0.5")
