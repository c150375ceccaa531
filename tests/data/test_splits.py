import pytest

from dinov2.data.splits import in_split, require_disjoint_groups
from dinov2.errors import DatasetError

KEYS = [f"plate_{number // 4}" for number in range(4000)]


def split_of(split, keys=KEYS, val=0.2, test=0.1):
    return in_split(keys, split, val_fraction=val, test_fraction=test)


def test_every_image_is_in_one_split_and_groups_stay_together():
    masks = {split: split_of(split) for split in ("train", "val", "test")}
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()
    assert split_of("all").all()
    for mask in masks.values():
        assert (mask.reshape(-1, 4) == mask[::4, None]).all()
    assert abs(masks["val"].mean() - 0.2) < 0.04
    assert abs(masks["test"].mean() - 0.1) < 0.03


def test_a_group_stays_when_others_come():
    assert (split_of("val", KEYS[:100]) == split_of("val")[:100]).all()


def test_a_larger_val_takes_from_train_only_and_test_lies_behind_it():
    small, large = split_of("val", val=0.1, test=0.0), split_of("val", val=0.3, test=0.0)
    assert (large | ~small).all()
    assert (split_of("val", val=0.2, test=0.3) == split_of("val", val=0.2, test=0.0)).all()


def test_names_as_bytes_and_as_text_agree():
    keys = [b"caf\xe9/1.png", b"a.png"] * 20
    texts = [key.decode("utf-8", "surrogateescape") for key in keys]
    assert (split_of("val", keys, val=0.5) == split_of("val", texts, val=0.5)).all()


def test_a_known_key_has_its_place_for_ever():
    places = [key for key in ("a.png", "b.png", "c.png", "d.png", "e.png", "f.png") if split_of("val", [key], 0.5)[0]]
    assert places == ["b.png", "e.png", "f.png"]


def test_common_groups_are_named():
    require_disjoint_groups(["a", "b"], ["c", "d"])
    with pytest.raises(DatasetError) as error:
        require_disjoint_groups(["b", "a", "c", "b"], ["c", "b", "d"], names=("train", "test"), kind="plate")
    assert str(error.value) == (
        "plate 'b' and 1 more has images both in train and in test, which lets one split give the other's answers "
        "away; move each plate to one of them"
    )
    with pytest.raises(DatasetError, match="^group 'x' has images both in train and in val, which"):
        require_disjoint_groups(["x"], ["x"])
