import os
import pickle
import signal
from itertools import islice

import numpy as np
import pytest
import torch
from support.images import encode, photo, write_photos

from dinov2.data import DataAugmentationDINO, make_data_loader, make_dataset
from dinov2.data.random_streams import sample_seed
from dinov2.errors import ConfigError, DatasetError

AUGMENT = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 8)
KINDS = ("epoch", "infinite", "sharded_infinite")


class Numbers:
    """Dataset of constant images: image n has value n everywhere."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.full((3, 20, 20), index, dtype=torch.uint8), None


def loader(dataset, **options):
    settings = {"augmentation": AUGMENT, "batch_size": 4, "patch_size": 4, "seed": 3} | options
    return make_data_loader(dataset, **settings)


def batches(dataset, count, **options):
    return list(islice(loader(dataset, **options), count))


def assert_equal(ours, theirs):
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) if torch.is_tensor(value) else value == theirs[name], name


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 22, num_classes=2)
    return make_dataset(f"ImageFolder:root='{folder}'")


def test_a_batch_holds_what_training_needs(photos):
    (batch,) = batches(photos, 1)
    masks = batch["collated_masks"]
    assert batch["collated_global_crops"].shape == (8, 3, 16, 16)
    assert batch["collated_global_crops"].dtype == torch.uint8
    assert batch["collated_local_crops"].shape == (8, 3, 8, 8)
    assert masks.shape == (8, 16)
    assert masks.dtype == torch.bool
    assert batch["seeds"].tolist() == [sample_seed(3, position) for position in range(4)]
    assert torch.equal(batch["mask_indices_list"], masks.flatten().nonzero()[:, 0])
    assert batch["n_masked_patches"] == masks.sum()
    expected = [1 / masks[row].sum() for row, _ in masks.nonzero()]
    torch.testing.assert_close(batch["masks_weight"], torch.tensor(expected))
    assert batch["skipped"] == []


def test_crops_are_crop_major():
    (batch,) = batches(Numbers(9), 1)
    values = batch["collated_global_crops"].float().mean((1, 2, 3))
    assert torch.equal(values[:4], values[4:])
    assert len(values[:4].unique()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_workers_do_not_show(photos, kind):
    state = torch.random.get_rng_state()
    alone, with_workers = (batches(photos, 4, sampler=kind, num_workers=number) for number in (0, 2))
    for ours, theirs in zip(with_workers, alone, strict=True):
        assert_equal(ours, theirs)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_start_gives_the_rest(photos, kind):
    whole = batches(photos, 9, sampler=kind)
    for ours, theirs in zip(batches(photos, 5, sampler=kind, start_position=16), whole[4:], strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_accumulation_do_not_show(photos, kind):
    whole = batches(photos, 3, sampler=kind)
    by_rank = [batches(photos, 3, sampler=kind, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    steps = batches(photos, 6, sampler=kind, batch_size=2, accumulation_steps=2)
    for step, expected in enumerate(whole):
        for parts in ([by_rank[0][step], by_rank[1][step]], steps[2 * step : 2 * step + 2]):
            assert torch.equal(torch.cat([part["seeds"] for part in parts]), expected["seeds"])
            for name in ("collated_global_crops", "collated_local_crops", "collated_masks"):
                joined = torch.cat([part[name].unflatten(0, (2, 2)) for part in parts], 1).flatten(0, 1)
                assert torch.equal(joined, expected[name]), name


def test_the_masked_crops_of_a_global_batch_are_a_fixed_share(photos):
    for batch in batches(photos, 5, mask_sample_probability=0.5, mask_ratio_min_max=(0.3, 0.5)):
        assert (batch["collated_masks"].sum(1) > 0).sum() == 4
    (batch,) = batches(photos, 1, mask_sample_probability=0.0)
    assert batch["n_masked_patches"] == 0
    assert batch["mask_indices_list"].shape == batch["masks_weight"].shape == (0,)


def test_each_iteration_starts_at_the_same_position(photos):
    batches_again = loader(photos, num_workers=1)
    first, second = (next(iter(batches_again)) for _ in range(2))
    assert_equal(first, second)


def test_a_dataset_smaller_than_the_global_batch_is_a_config_error(photos):
    with pytest.raises(ConfigError, match="the dataset holds 22 images, fewer than the 24 of one global batch"):
        loader(photos, batch_size=4, world_size=3, accumulation_steps=2)


@pytest.fixture
def damaged(tmp_path):
    paths = write_photos(tmp_path, 12)
    paths[5].write_bytes(encode(photo(size=(200, 150)))[:3000])
    paths[7].write_bytes(b"")
    return make_dataset(f"ImageFolder:root='{tmp_path}'"), [str(paths[5]), str(paths[7])]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_stops_with_index_and_path(damaged, num_workers):
    dataset, paths = damaged
    with pytest.raises(DatasetError) as error:
        batches(dataset, 3, sampler="epoch", num_workers=num_workers)
    index = 5 if paths[0] in str(error.value) else 7
    assert str(error.value).startswith(f"image {index} ({paths[index == 7]}) cannot be read: ")
    assert "\n" not in str(error.value)


def test_skipping_replaces_damaged_images_the_same_way_everywhere(damaged):
    dataset, paths = damaged
    whole = batches(dataset, 3, sampler="epoch", on_bad_image="skip")
    assert sorted(path for batch in whole for path in batch["skipped"]) == paths
    by_rank = [
        batches(dataset, 3, sampler="epoch", on_bad_image="skip", batch_size=2, rank=rank, world_size=2, num_workers=1)
        for rank in range(2)
    ]
    for step, expected in enumerate(whole):
        crops = [ranks[step]["collated_global_crops"].unflatten(0, (2, 2)) for ranks in by_rank]
        assert torch.equal(torch.cat(crops, 1).flatten(0, 1), expected["collated_global_crops"])
        assert sum((ranks[step]["skipped"] for ranks in by_rank), []) == expected["skipped"]


def test_skipping_gives_up_when_nothing_can_be_read(tmp_path):
    paths = write_photos(tmp_path, 8)
    dataset = make_dataset(f"ImageFolder:root='{tmp_path}'")
    for path in paths:
        path.write_bytes(b"no image")
    with pytest.raises(DatasetError) as error:
        batches(dataset, 1, on_bad_image="skip")
    assert str(error.value).startswith("21 images drawn in a row are unreadable; the last: image ")
    assert str(error.value).endswith("cannot be read: not an image of a known format")


def test_a_file_that_has_gone_is_a_dataset_error(tmp_path):
    paths = write_photos(tmp_path, 4)
    dataset = make_dataset(f"ImageFolder:root='{tmp_path}'")
    paths[2].unlink()
    with pytest.raises(DatasetError) as error:
        dataset[2]
    assert str(error.value) == f"image 2 ({paths[2]}) cannot be read: No such file or directory"


class EndsItsProcess(Numbers):
    """Dataset whose image 0 sends its process signals."""

    def __init__(self, count, *signals):
        super().__init__(count)
        self.signals = signals

    def __getitem__(self, index):
        for number in self.signals:
            os.kill(os.getpid(), number)
        return super().__getitem__(index)


def test_a_killed_worker_is_a_dataset_error():
    with pytest.raises(DatasetError, match="^a loader worker process was killed, mostly for lack of memory"):
        batches(EndsItsProcess(8, signal.SIGKILL), 1, num_workers=1)


def test_workers_leave_interrupts_and_the_first_termination_to_the_main_process():
    (batch,) = islice(loader(EndsItsProcess(8, signal.SIGINT), num_workers=1), 1)
    assert len(batch["seeds"]) == 4
    with pytest.raises(DatasetError, match="was killed"):  # by the second of two
        batches(EndsItsProcess(8, signal.SIGTERM), 1, num_workers=1)


def test_a_dataset_can_be_sent_to_a_spawned_worker(photos):
    copy = pickle.loads(pickle.dumps(photos))
    assert copy.path(3) == photos.path(3)
    assert np.array_equal(copy.get_targets(), photos.get_targets())
