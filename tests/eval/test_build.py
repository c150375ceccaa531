"""Sets that share images or groups are found before anything is computed."""

import logging

import pytest
from support.images import write_photos
from support.industrial_json import make_grouped_json

from dinov2.configs import load_config
from dinov2.errors import DatasetError
from dinov2.eval.build import open_eval_dataset, require_separate

HASHED = "split_by=path:val_fraction=0.5"


@pytest.fixture
def open_set(tmp_path):
    cfg = load_config(None, [f"train.output_dir={tmp_path / 'out'}"])
    return lambda name: open_eval_dataset(cfg, name)


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos", 12, num_classes=2)
    return tmp_path / "photos"


def warnings_of(caplog, train, val):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        require_separate(train, val)
    return [record.getMessage() for record in caplog.records]


def test_images_that_both_sets_have_are_counted(photos, open_set, caplog):
    everything, val = open_set(f"ImageFolder:root={photos}"), open_set(f"ImageFolder:root={photos}:split=val:{HASHED}")
    count = len(val.dataset)
    assert 0 < count < 12
    tail = "the score says little about other images; choose separate splits or folders"
    assert warnings_of(caplog, everything, val) == [
        f"{count} of the {count} images of {val.name} are in {everything.name}, too: {tail}"
    ]
    same = open_set(f"ImageFolder:root={photos}/../photos/")  # written in another way
    assert warnings_of(caplog, everything, same) == [
        f"12 of the 12 images of {same.name} are in {everything.name}, too: {tail}"
    ]
    assert warnings_of(caplog, val, val) == [
        f"{val.name} is learned from and reported on: the score says nothing about other images"
    ]
    train = open_set(f"ImageFolder:root={photos}:split=train:{HASHED}")
    assert warnings_of(caplog, train, val) == []
    assert warnings_of(caplog, open_set("Digits:split=train"), open_set("Digits:split=val")) == []


def test_groups_in_both_sets_are_found_however_the_folder_is_written_and_in_mixtures(tmp_path, photos, open_set):
    root = tmp_path / "parts"
    make_grouped_json(root)
    val = open_set(f"GroupedJSON:root={root}:split=val")
    for train in (f"GroupedJSON:root={root}/", f"ImageFolder:root={photos}+GroupedJSON:root={root}"):
        with pytest.raises(DatasetError, match=r"has images both in .* which lets one split give the other's answers"):
            require_separate(open_set(train), val)
    require_separate(open_set(f"ImageFolder:root={photos}+GroupedJSON:root={root}:split=train"), val)
