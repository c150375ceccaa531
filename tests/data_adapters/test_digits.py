import pytest

from dinov2.data import make_dataset
from dinov2.errors import ConfigError


def test_digits_are_real_labelled_images():
    dataset = make_dataset("Digits", channels=1)
    image, target = dataset[0]
    assert len(dataset) == 1797
    assert (image.mode, image.size, target) == ("L", (8, 8), 0)
    assert image.getextrema() == (0, 239)  # 15 of 16
    assert make_dataset("Digits")[0][0].mode == "RGB"
    assert dataset.class_names == list("0123456789")
    assert set(dataset.get_targets()) == set(range(10))


def test_train_and_val_are_disjoint_and_together_all():
    parts = [make_dataset(f"Digits:split={split}") for split in ("TRAIN", "val", "ALL")]
    paths = [part.metadata()["path"].tolist() for part in parts]
    assert paths[0] + paths[1] == paths[2]
    assert [len(part) for part in parts] == [1198, 599, 1797]
    assert parts[1][0][1] == parts[2][1198][1]


def test_a_transform_is_applied_to_the_image():
    assert make_dataset("Digits", transform=lambda image: image.size)[3][0] == (8, 8)


def test_wrong_options_are_config_errors():
    with pytest.raises(ConfigError, match="dataset Digits: split=x must be one of TRAIN, VAL, ALL"):
        make_dataset("Digits:split=x")
    with pytest.raises(
        ConfigError, match="student.in_chans=4: image files of this dataset are read with 1 or 3 channels"
    ):
        make_dataset("Digits", channels=4)
