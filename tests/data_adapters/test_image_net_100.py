import pytest
from support.image_nets import IMAGE_NET_100_FOLDERS, write_image_net_100

from dinov2.data import make_dataset
from dinov2.errors import ConfigError, DatasetError

NAMES = ["tench, Tinca tinca", "cock", "crane (n02012849)", "n02500267", "crane (n03126707)"]


@pytest.fixture
def root(tmp_path):
    write_image_net_100(tmp_path)
    return tmp_path


def image_net_100(root, split):
    return make_dataset(f"ImageNet100:root='{root}':split={split}")


@pytest.mark.parametrize(("split", "count"), [("TRAIN", 10), ("val", 5), ("all", 15)])
def test_the_four_folders_of_training_are_one_split(root, split, count):
    dataset = image_net_100(root, split)
    assert len(dataset) == count
    assert dataset.class_names == NAMES
    folders = [dataset.path(index).split("/")[-2] for index in range(count)]
    assert dataset.get_targets().tolist() == [sorted(IMAGE_NET_100_FOLDERS).index(name) for name in folders]


def test_without_titles_classes_have_the_names_of_their_folders(root):
    (root / "Labels.json").unlink()
    assert image_net_100(root, "val").class_names == sorted(IMAGE_NET_100_FOLDERS)


def test_broken_titles_and_layouts_are_named(root):
    (root / "Labels.json").write_text('{"n01440764": ')
    with pytest.raises(DatasetError) as error:
        image_net_100(root, "val")
    assert str(error.value) == (
        f"dataset ImageNet100: {root}/Labels.json is not JSON (Expecting value: line 1 column 15 (char 14)); "
        "mend it or remove it"
    )
    (root / "Labels.json").write_text('["tench"]')
    with pytest.raises(DatasetError) as error:
        image_net_100(root, "val")
    assert str(error.value) == (
        f"dataset ImageNet100: {root}/Labels.json does not map class names to titles; mend it or remove it"
    )
    with pytest.raises(ConfigError, match="dataset ImageNet100: split=test must be one of all, train, val"):
        image_net_100(root, "test")
    (root / "train.X3").rename(root / "train.3")
    with pytest.raises(DatasetError) as error:
        image_net_100(root, "train")
    assert str(error.value) == (
        f"dataset ImageNet100: folder {root} has no folder train.X3; expected {root}/train.X1 to train.X4 and "
        f"{root}/val.X, each with a folder for each class"
    )
