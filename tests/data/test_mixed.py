import numpy as np
import pytest
from support.images import encode, photo, write_photos

from dinov2.data import DataAugmentationDINO, make_data_loader, make_dataset
from dinov2.data.datasets.mixed import MixedDataset
from dinov2.data.registry import known_datasets
from dinov2.errors import ConfigError, DatasetError


class Plain:
    """A dataset of the user's own."""

    def __init__(self, targets, class_names=(), columns=None, groups=None):
        self.targets = targets
        self.class_names = list(class_names)
        self.columns = columns or {}
        self._groups = groups

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return photo(index), None if self.targets[index] < 0 else self.targets[index]

    def get_targets(self):
        return None if max(self.targets) < 0 else np.array(self.targets)

    def metadata(self):
        return {name: np.array(values) for name, values in self.columns.items()}

    def groups(self):
        return None if self._groups is None else np.array(self._groups)


def mix(*parts):
    return MixedDataset(parts, [f"part_{number}" for number in range(len(parts))])


def test_a_plus_joins_folders(tmp_path):
    write_photos(tmp_path / "one", 4, num_classes=2)
    write_photos(tmp_path / "two" / "class_1", 2)
    write_photos(tmp_path / "two" / "other", 1)
    text = f"ImageFolder:root='{tmp_path}/one'+ImageFolder:root='{tmp_path}/two'"
    dataset = make_dataset(text, channels=1, transform=lambda image: image.mode)
    assert len(dataset) == 7
    assert dataset.class_names == ["class_0", "class_1", "other"]
    assert dataset.get_targets().tolist() == [target for _, target in dataset] == [0, 0, 1, 1, 1, 1, 2]
    assert dataset[6][0] == "L"
    assert dataset.path(6) == f"{tmp_path}/two/other/photo_0000.jpg"
    columns = dataset.metadata()
    assert columns["dataset"].tolist() == [text.split("+")[0]] * 4 + [text.split("+")[1]] * 3
    assert columns["path"].tolist() == [dataset.path(index) for index in range(7)]
    assert columns["target"].tolist() == dataset.get_targets().tolist()
    assert make_dataset(f"3*ImageFolder:root='{tmp_path}/one'+1*Digits").weights == [0.75, 0.25]
    with pytest.raises(IndexError, match="index 7 of a dataset of 7 images"):
        dataset[7]


def test_labels_are_matched_by_name_and_absent_ones_stay_absent():
    dataset = mix(Plain([1, 0], ["cat", "dog"]), Plain([-1, -1]), Plain([0, 1, -1], ["dog", "cow"]))
    assert dataset.class_names == ["cat", "dog", "cow"]
    assert dataset.get_targets().tolist() == [1, 0, -1, -1, 1, 2, -1]
    assert [dataset[index][1] for index in range(7)] == [1, 0, None, None, 1, 2, None]


def test_labels_of_one_part_need_no_names():
    dataset = mix(Plain([-1]), Plain([3, -1]))
    assert dataset.class_names == []
    assert dataset.get_targets().tolist() == [-1, 3, -1]
    assert mix(Plain([-1]), Plain([-1, -1])).get_targets() is None


def test_labels_without_names_are_left_out_with_a_warning(caplog):
    dataset = mix(Plain([0, 1], ["cat", "dog"]), Plain([0, 1]))
    assert dataset.get_targets() is None
    assert dataset[0][1] is None
    assert "target" not in dataset.metadata()
    assert [record.message for record in caplog.records] == [
        "the labels of this mixture of datasets are left out: part_1 has labels but no class names, so that they "
        "cannot be matched with those of the other parts"
    ]


def test_columns_of_any_part_are_kept():
    dataset = mix(
        Plain([-1, -1], columns={"plate": ["p", "q"], "dose": [0.5, 1.0], "mixed": [1, 2]}),
        Plain([-1], columns={"week": [7], "mixed": ["x"]}),
        range(1),
    )
    columns = dataset.metadata()
    assert list(columns) == ["path", "dataset", "plate", "dose", "mixed", "week"]
    assert columns["plate"].tolist() == ["p", "q", "", ""]
    assert np.array_equal(columns["dose"], [0.5, 1.0, np.nan, np.nan], equal_nan=True)
    assert columns["mixed"].tolist() == ["1", "2", "x", ""]
    assert columns["week"].tolist() == [-1, -1, 7, -1]
    assert columns["path"].tolist() == ["item 0", "item 1", "item 0", "item 0"]


def test_groups_of_several_parts_are_different_groups():
    dataset = mix(Plain([-1] * 3, groups=[4, 4, 2]), Plain([-1] * 2), Plain([-1] * 2, groups=[4, 4]))
    groups = dataset.groups().tolist()
    assert [groups.count(group) for group in groups] == [2, 2, 1, 1, 1, 2, 2]
    assert dataset.pass_groups() is None
    assert mix(Plain([-1]), Plain([-1])).groups() is None


def test_training_takes_images_of_every_part_in_their_shares(tmp_path):
    write_photos(tmp_path, 3)
    (tmp_path / "broken.jpg").write_bytes(encode(photo())[:300])
    dataset = make_dataset(f"0.75*ImageFolder:root='{tmp_path}':exclude=broken*+0.25*Digits")
    augmentation = DataAugmentationDINO((0.3, 1.0), (0.1, 0.3), 1, 32, 16)
    loader = make_data_loader(dataset, augmentation=augmentation, batch_size=8, patch_size=8)
    assert next(iter(loader))["collated_global_crops"].shape == (16, 3, 32, 32)
    broken = make_dataset(f"1*ImageFolder:root='{tmp_path}'+1*Digits")
    with pytest.raises(DatasetError, match=r"image 0 \(.*broken.jpg\) cannot be read: damaged file"):
        next(iter(make_data_loader(broken, augmentation=augmentation, batch_size=64, patch_size=8)))


def test_one_image_of_each_folder_is_drawn_where_the_dataset_asks_for_it(tmp_path):
    write_photos(tmp_path, 12, num_classes=4)
    dataset = make_dataset(f"ImageFolder:root='{tmp_path}':split_by=folder:one_per_group=true")
    assert sorted(dataset.pass_groups().tolist()) == sorted([0, 1, 2, 3] * 3)
    with pytest.raises(ConfigError) as error:
        make_dataset(f"ImageFolder:root='{tmp_path}':one_per_group=true")
    assert str(error.value) == (
        "dataset ImageFolder: one_per_group=true needs groups, and there are none; set split_by"
    )


def test_an_unknown_part_is_named_with_a_hint():
    with pytest.raises(ConfigError) as error:
        make_dataset("Digits:split=1+2")
    assert str(error.value).startswith(f"unknown dataset '2'; known are {known_datasets()[0]}, ")
    assert str(error.value).endswith("; a value that holds a plus stands in single quotes")
