import numpy as np
import pytest
import torch
from PIL import Image
from support.images import encode

from dinov2.data.datasets.extended import ExtendedVisionDataset, LazyColumns
from dinov2.data.datasets.image_source import ImageSource
from dinov2.errors import ConfigError, DatasetError

RAMP = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)


class Files(ExtendedVisionDataset):
    """Three files; the second one is broken."""

    def __len__(self):
        return 3

    def path(self, index):
        return f"file_{index}"

    def get_target(self, index):
        return None

    def get_image_data(self, index):
        if index == 1:
            raise FileNotFoundError(2, "No such file or directory")
        return encode(Image.fromarray(RAMP), "PNG")


class ManyChannels(Files):
    """Images of a source of its own."""

    def require_channels(self):
        if self.channels not in (4, 5):
            raise ConfigError(f"student.in_chans={self.channels}: these images have 4 or 5 channels")

    def encoded_image(self, index):
        return Planes(self.channels)


class Planes:
    width, height = 8, 6

    def __init__(self, channels):
        self.channels = channels

    def to_tensor(self, *, reduce=1.0):
        return torch.zeros(self.channels, self.height, self.width, dtype=torch.uint16)


def test_items_have_8_bits_as_pillow_images_and_16_as_tensors():
    assert Files()[0][0].mode == "RGB"
    wide, target = Files(bits=16, channels=1)[0]
    assert target is None
    assert wide.dtype == torch.uint16
    assert np.array_equal(wide[0].numpy(), RAMP)
    assert Files(bits=16, transform=lambda image: image.shape)[2][0] == (3, 6, 8)
    assert isinstance(Files().encoded_image(0), ImageSource)


def test_a_file_that_cannot_be_opened_is_named():
    with pytest.raises(DatasetError) as error:
        Files()[1]
    assert str(error.value) == "image 1 (file_1) cannot be read: No such file or directory"


def test_a_source_of_its_own_has_its_own_channels():
    assert ManyChannels(channels=5)[0][0].shape == (5, 6, 8)
    with pytest.raises(ConfigError, match="student.in_chans=3: these images have 4 or 5 channels"):
        ManyChannels()
    with pytest.raises(ConfigError, match="student.in_chans=4: image files of this dataset are read with 1 or 3"):
        Files(channels=4)


def test_columns_are_computed_when_they_are_looked_up_once():
    calls = []
    columns = LazyColumns({name: lambda name=name: calls.append(name) or np.array([name]) for name in ("a", "b")})
    assert list(columns) == ["a", "b"]
    assert "a" in columns
    assert len(columns) == 2
    assert calls == []
    assert columns["b"].tolist() == columns["b"].tolist() == ["b"]
    assert calls == ["b"]
    with pytest.raises(KeyError):
        columns["c"]
    assert Files().metadata()["path"].tolist() == ["file_0", "file_1", "file_2"]


def test_a_split_without_images_is_named():
    assert Files(split="TRAIN").split == "train"
    with pytest.raises(DatasetError) as error:
        Files(split="val", val_fraction=0.01).own_rows(["x"] * 3)
    assert str(error.value) == (
        "dataset Files: none of its 3 images falls into split=val; "
        "change val_fraction or test_fraction, or split by smaller groups"
    )
    with pytest.raises(ConfigError) as error:
        Files(split="VAL", val_fraction=0).own_rows(["x"])
    assert str(error.value) == "dataset Files: val_fraction=0 must be above 0 for split=val"
