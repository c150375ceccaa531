import numpy as np
import pytest
from support.images import write_photos

from data_adapters.image_folder import ImageFolder
from dinov2.data import make_dataset
from dinov2.data.registry import known_datasets
from dinov2.errors import ConfigError

SHARED_KEYS = "split, val_fraction, test_fraction, split_by, one_per_group, bits"
FOLDER_KEYS = f"root, classes, exclude, label_level, {SHARED_KEYS}"


class Squares:
    """A user's own dataset."""

    def __init__(self, *, count: int, side: float = 2.0, loud: bool = False, note: str | None = "x", channels: int = 3):
        self.settings = (count, side, loud, note, channels)

    def __len__(self):
        return self.settings[0]

    def __getitem__(self, index):
        return np.zeros((3, 4, 4), dtype=np.uint8), None


def test_a_registered_name_builds_its_class(tmp_path):
    write_photos(tmp_path, 3)
    dataset = make_dataset(f"ImageFolder:root='{tmp_path}'", channels=1)
    assert isinstance(dataset, ImageFolder)
    assert dataset[0][0].mode == "L"


def test_a_dotted_name_builds_a_class_of_the_users_own(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    dataset = make_dataset("test_registry.Squares:count=3:side=1.5:loud=yes:note=null", channels=1)
    assert dataset.settings == (3, 1.5, True, None, 1)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "ImageFoldr:root=x",
            f"unknown dataset 'ImageFoldr'; did you mean ImageFolder? known are {', '.join(known_datasets())}; "
            "a class of your own is named package.module.Class",
        ),
        (
            "ImageFolder:rot=x",
            f"dataset ImageFolder has no key 'rot'; did you mean root? known are {FOLDER_KEYS}",
        ),
        ("ImageFolder:channels=1", f"dataset ImageFolder has no key 'channels'; known are {FOLDER_KEYS}"),
        ("ImageFolder", f"dataset ImageFolder needs root=...; its keys are {FOLDER_KEYS}"),
        ("ImageFolder:root=x:val_fraction=half", "dataset ImageFolder: val_fraction=half: must be a number"),
        (
            "no_such_package.Images",
            "dataset 'no_such_package.Images': no module named 'no_such_package' can be imported",
        ),
        ("dinov2.data.Images", "dataset 'dinov2.data.Images': module dinov2.data has no class Images"),
    ],
)
def test_an_unknown_name_key_or_value_is_named(text, sentence):
    with pytest.raises(ConfigError) as error:
        make_dataset(text)
    assert str(error.value) == sentence
