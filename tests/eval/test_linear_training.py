"""Training of the linear grid on augmented images: the same for any number of processes, and when resumed."""

import json

import numpy as np
import pytest
import torch
from support.dist import run_distributed
from torch import nn

from dinov2.data import make_dataset
from dinov2.errors import CheckpointError, DatasetError
from dinov2.eval.classifier_sets import Part
from dinov2.eval.feature_set import FeatureSet
from dinov2.eval.linear_grid import LinearGrid, make_grid
from dinov2.eval.linear_training import (
    AugmentedImages,
    BatchPlan,
    load_state,
    save_state,
    train_on_features,
    train_on_images,
)

CPU = torch.device("cpu")
BATCH, STEPS = 80, 4  # 3 passes of the backbone
SETTINGS = {"size_px": 8, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def digits_part(dataset, count=100):
    targets = np.asarray(dataset.get_targets())[:count]
    values = torch.randn(count, 12, generator=torch.Generator().manual_seed(0))
    source = FeatureSet(name="digits", values=values, targets=targets, places=np.arange(3, count + 3), pool="cls+mean")
    return Part(source=source, rows=np.arange(count), classes=targets)


class Backbone(nn.Module):
    """Images to 12 features."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 12, bias=False)
        with torch.no_grad():
            self.linear.weight.normal_(generator=torch.Generator().manual_seed(1), std=0.1)

    def forward(self, images):
        assert images.shape == (32, 3, 8, 8)  # whole passes
        return self.linear(images.flatten(1))


def new_grid():
    candidates = make_grid("cls+mean", num_blocks=[1], learning_rates=[1.0, 0.1], batch_size=BATCH)
    return LinearGrid(candidates, pool="cls+mean", num_features=12, num_classes=10, total_steps=STEPS, device=CPU)


def train(grid, *, num_workers=0, after_step=lambda: None, dataset=None):
    dataset = dataset or make_dataset("Digits:split=TRAIN")
    part = digits_part(make_dataset("Digits:split=TRAIN"))
    images = AugmentedImages(dataset, part, BatchPlan(100, batch_size=BATCH, seed=0), **SETTINGS)
    train_on_images(
        grid,
        Backbone(),
        images,
        num_features=12,
        num_workers=num_workers,
        device=CPU,
        dtype=torch.float32,
        after_step=after_step,
    )
    return [grid.classifier(number)[0] for number in range(len(grid.candidates))]


def train_on_rank():
    return torch.stack([weight[:, :6] for weight in train(new_grid())])


def test_workers_do_not_change_what_is_learned():
    for one, other in zip(train(new_grid()), train(new_grid(), num_workers=2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.dist
def test_processes_do_not_change_what_is_learned():
    alone = train_on_rank()
    for weights in run_distributed(train_on_rank, num_processes=4):  # the last has no pass to compute
        assert torch.equal(weights, alone)


def test_a_training_that_was_killed_ends_as_if_it_had_not_been(tmp_path):
    class Killed(Exception):
        pass

    path = tmp_path / "state.pth"
    whole = train(new_grid())
    grid = new_grid()

    def save_or_die():
        if grid.step == 2:
            save_state(path, grid)
        if grid.step == 3:
            raise Killed

    with pytest.raises(Killed):
        train(grid, after_step=save_or_die)
    resumed = new_grid()
    resumed.load_state_dict(load_state(path))
    assert resumed.step == 2 and [file.name for file in tmp_path.iterdir()] == ["state.pth"]
    for one, other in zip(whole, train(resumed), strict=True):
        assert torch.equal(one, other)


def test_a_damaged_state_is_named(tmp_path):
    path = tmp_path / "state.pth"
    assert load_state(path) is None
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="is damaged; delete it, or pass --no-resume"):
        load_state(path)
    with pytest.raises(CheckpointError, match="state of the training cannot be written"):
        save_state(tmp_path / "none" / "state.pth", new_grid())


def test_an_unreadable_image_ends_the_training_with_its_name():
    class Broken:
        def __getitem__(self, index):
            raise DatasetError(f"image {index} cannot be read")

    with pytest.raises(DatasetError, match=r"image \d+ cannot be read"):
        train(new_grid(), dataset=Broken())


def test_crops_are_those_of_the_position_and_images_those_of_the_part():
    dataset = make_dataset("Digits:split=TRAIN")
    part = digits_part(dataset)
    images = AugmentedImages(dataset, part, BatchPlan(100, batch_size=BATCH, seed=0), **SETTINGS)
    crop, target = images[7]
    assert crop.shape == (3, 8, 8) and crop.dtype == torch.float32 and -2 <= crop.min() < crop.max() <= 2
    assert torch.equal(crop, images[7][0]) and not torch.equal(crop, images[107][0])
    assert target == part.classes[images.plan.row(7)]
    seen = {images.plan.row(position) for position in range(100)}
    assert seen == set(range(100))  # one pass visits each image once


def test_features_of_a_cache_are_learned():
    part = digits_part(make_dataset("Digits:split=TRAIN"))
    part.source.values[:, :10] += 3 * nn.functional.one_hot(part.targets, 10)
    grid = new_grid()
    grid.total_steps = 60
    train_on_features(grid, part, BatchPlan(100, batch_size=BATCH, seed=0))
    right = [(logits.argmax(dim=1) == part.targets).float().mean().item() for logits in grid.logits(part.values())]
    assert grid.step == 60 and max(right) > 0.9, json.dumps(right)
