"""Images that choose hyper-parameters are never those that are reported."""

import numpy as np
import pytest
import torch

from dinov2.data.splits import in_split
from dinov2.errors import DatasetError
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.held_out import held_out


def features(num_images, *, groups=None, name="Photos:split=TRAIN", targets=None, paths=None):
    columns = {"path": np.array([f"{n}.png" for n in range(num_images)]) if paths is None else np.array(paths)}
    if groups is not None:
        columns["group"] = np.array(groups)
    return FeatureSet(
        name=name,
        values=torch.arange(num_images)[:, None].float(),
        targets=np.arange(num_images) % 2 if targets is None else np.array(targets),
        places=np.arange(num_images),
        columns=columns,
    )


def test_a_fifth_is_held_out_whatever_the_order():
    train = features(1000)
    is_out = held_out(train)
    assert 150 < is_out.sum() < 250
    order = np.random.default_rng(0).permutation(1000)
    assert (held_out(train.take(order)) == is_out[order]).all()


def test_groups_stay_together():
    groups = [f"part {n // 7}" for n in range(700)]
    is_out = held_out(features(700, groups=groups)).reshape(100, 7)
    assert (is_out.all(axis=1) | ~is_out.any(axis=1)).all()
    assert 10 < is_out[:, 0].sum() < 30


def test_the_training_split_of_a_dataset_can_be_split_again():
    paths = np.array([f"{n}.png" for n in range(500)])
    train = paths[in_split(paths, "train", val_fraction=0.2)]
    assert 50 < held_out(features(len(train), paths=train)).sum() < 120


@pytest.mark.parametrize("number", range(20))
def test_two_groups_are_split_one_to_one(number):
    is_out = held_out(features(6, groups=[f"{number} a"] * 3 + [f"{number} b"] * 3))
    assert is_out.tolist() in ([True] * 3 + [False] * 3, [False] * 3 + [True] * 3)


def test_every_class_keeps_images_to_be_fitted_on():
    targets = [0] * 50 + [1] * 50 + list(range(2, 12)) * 2
    groups = [f"part {n}" for n in range(110)] + [f"other {n}" for n in range(10)]
    train = features(120, targets=targets, groups=groups)
    is_out = held_out(train)
    assert is_out.any() and set(train.targets[~is_out]) == set(range(12))


def test_images_without_a_label_stay():
    train = features(200, targets=[-1, 0, -1, 1] * 50)
    is_out = held_out(train)
    assert is_out.any() and (train.targets[is_out] >= 0).all()


def test_what_cannot_be_spared_is_refused():
    with pytest.raises(DatasetError) as caught:
        held_out(features(4, groups=["slide 1"] * 4))
    assert str(caught.value) == (
        "Photos:split=TRAIN: its groups with labels, 1, are too few to hold some of them out and keep all classes; "
        "name a --test-dataset, then hyper-parameters are chosen on the validation set"
    )
    with pytest.raises(DatasetError, match="its images with labels, 2, are too few"):
        held_out(features(2))


def test_the_folder_of_the_images_does_not_matter():
    names = [f"class {n % 2}/{n}.png" for n in range(200)]
    here, there = (held_out(features(200, paths=[f"{root}/{name}" for name in names])) for root in ("/a/b", "c"))
    assert here.any() and (here == there).all()
