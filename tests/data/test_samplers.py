from collections import Counter
from itertools import islice

import numpy as np
import pytest

from dinov2.data.datasets.mixed import MixedDataset
from dinov2.data.samplers import RankBatchSampler, SamplerType, make_sampler, make_stream, pass_size
from dinov2.errors import ConfigError

KINDS = ("epoch", "infinite", "sharded_infinite")


def indices(kind, first, count, *, dataset_size=103, seed=0, global_batch_size=10):
    stream = make_sampler(kind, dataset_size=dataset_size, seed=seed, global_batch_size=global_batch_size)
    return [stream.index_at(position) for position in range(first, first + count)]


@pytest.mark.parametrize("kind", ["infinite", "sharded_infinite"])
@pytest.mark.parametrize("dataset_size", [10, 16, 17, 103, 1025])
def test_each_pass_visits_each_image_once(kind, dataset_size):
    for number in range(3):
        order = indices(kind, number * dataset_size, dataset_size, dataset_size=dataset_size)
        assert sorted(order) == list(range(dataset_size))


def test_an_epoch_drops_what_does_not_fill_a_global_batch_and_not_always_the_same():
    left_out = []
    for number in range(4):
        order = indices("epoch", number * 100, 100)
        assert max(Counter(order).values()) == 1
        left_out.append(frozenset(range(103)) - set(order))
    assert len(set(left_out)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_passes_and_seeds_differ_and_no_order_shows(kind):
    first, second, other = (indices(kind, *place, dataset_size=1000, seed=seed) for place, seed in PASSES)
    for order, reference in ((first, second), (first, other), (first, range(1000))):
        assert sum(a == b for a, b in zip(order, reference, strict=True)) < 12
        assert abs(np.corrcoef(order, reference)[0, 1]) < 0.15  # 4.7 standard deviations
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.15


PASSES = (((0, 1000), 0), ((1000, 1000), 0), ((0, 1000), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_any_position_can_be_read_first(kind):
    whole = indices(kind, 0, 300)
    for first in (1, 99, 100, 207):
        assert indices(kind, first, 300 - first) == whole[first:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 24, 31])
def test_ranks_together_read_what_one_would(kind, start):
    def batches(rank, world_size):
        stream = make_sampler(kind, dataset_size=103, seed=0, global_batch_size=12)
        sampler = RankBatchSampler(
            stream, batch_size=12 // world_size, start_position=start, rank=rank, world_size=world_size
        )
        return list(islice(sampler, 20))

    alone = batches(0, 1)
    ranks = [batches(rank, 3) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == alone
    assert [position for batch in alone for position, _ in batch] == list(range(start, start + 240))


def test_a_huge_dataset_needs_no_memory():
    order = indices("sharded_infinite", 7 * 10**11, 1000, dataset_size=10**11)
    assert len(set(order)) == 1000
    assert 0.4e11 < np.mean(order) < 0.6e11


def test_a_dataset_smaller_than_the_global_batch_is_a_config_error():
    with pytest.raises(ConfigError) as error:
        make_sampler(SamplerType.EPOCH, dataset_size=100, seed=0, global_batch_size=256)
    assert str(error.value) == (
        "the dataset holds 100 images, fewer than the 256 of one global batch; "
        "lower train.batch_size_per_gpu or train.global_batch_size"
    )


class Grouped:
    """Images in groups, of which a pass draws one image each."""

    def __init__(self, groups):
        self.groups = np.array(groups)

    def __len__(self):
        return len(self.groups)

    def pass_groups(self):
        return self.groups


def drawn(dataset, count, *, kind="sharded_infinite", first=0, seed=0, global_batch_size=1):
    stream = make_stream(dataset, kind, seed=seed, global_batch_size=global_batch_size)
    return [stream.index_at(position) for position in range(first, first + count)]


GROUPS = [7, 3, 7, 7, 9, 3, 5, 9, 7, 9]  # 4 groups of 4, 2, 3 and 1 images


@pytest.mark.parametrize("kind", ["infinite", "sharded_infinite"])
def test_a_pass_draws_one_image_of_each_group_and_all_images_have_their_turn(kind):
    dataset = Grouped(GROUPS)
    assert pass_size(dataset) == 4
    passes = np.array(drawn(dataset, 4 * 12, kind=kind)).reshape(12, 4)
    assert all(sorted(dataset.groups[images]) == [3, 5, 7, 9] for images in passes)
    for group, size in ((7, 4), (3, 2), (9, 3), (5, 1)):
        turns = np.array([image for images in passes for image in images if dataset.groups[image] == group])
        for turn in turns.reshape(-1, size):
            assert len(set(turn.tolist())) == size
    assert len({tuple(images) for images in passes}) > 6


def test_an_epoch_of_groups_drops_some_groups_and_not_always_the_same():
    passes = np.array(drawn(Grouped(GROUPS), 3 * 20, kind="epoch", global_batch_size=3)).reshape(20, 3)
    found = [frozenset(np.array(GROUPS)[images].tolist()) for images in passes]
    assert {len(groups) for groups in found} == {3}
    assert len(set(found)) > 1


def test_too_few_groups_for_a_batch_are_a_config_error():
    with pytest.raises(ConfigError) as error:
        make_stream(Grouped(GROUPS), "infinite", seed=0, global_batch_size=5)
    assert str(error.value) == (
        "the dataset holds 4 groups with one_per_group=true, fewer than the 5 of one global batch; "
        "lower train.batch_size_per_gpu or train.global_batch_size"
    )


def mixture(weights):
    return MixedDataset([range(30), Grouped([0, 0, 1, 1, 1]), range(1000)], ["a", "b", "c"], weights=weights)


def test_parts_with_weights_have_their_shares():
    order = np.array(drawn(mixture([6, 1, 3]), 20_000))
    part = np.searchsorted([30, 35], order, side="right")
    assert np.bincount(part).tolist() == [12_000, 2_000, 6_000]
    assert np.bincount(part[:1000]) == pytest.approx([600, 100, 300], abs=60)
    first = order[part == 0]
    assert all(sorted(turn) == list(range(30)) for turn in first.reshape(-1, 30))
    second = order[part == 1]
    assert all((pair < 32).sum() == 1 for pair in second.reshape(-1, 2))  # one of each of its groups
    last = order[part == 2]
    assert np.bincount(last - 35, minlength=1000).tolist() == [6] * 1000


def test_a_mixture_without_weights_draws_each_image_once_a_pass():
    dataset = mixture(None)
    assert pass_size(dataset) == 30 + 2 + 1000
    order = drawn(dataset, pass_size(dataset))
    assert len(set(order)) == len(order)
    assert sum(30 <= image < 35 for image in order) == 2
    plain = MixedDataset([range(30), range(70)], ["a", "b"])
    assert sorted(drawn(plain, 100)) == list(range(100))


@pytest.mark.parametrize(
    "dataset", [mixture([1, 1, 8]), mixture(None), Grouped(GROUPS)], ids=["shares", "sum", "groups"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_mixtures_can_be_read_from_anywhere(dataset, kind):
    whole = drawn(dataset, 300, kind=kind, first=9_900)
    for skipped in (1, 100, 207):
        assert drawn(dataset, 300 - skipped, kind=kind, first=9_900 + skipped) == whole[skipped:]
    assert drawn(dataset, 300, kind=kind, first=9_900, seed=1) != whole


def test_a_share_too_small_to_be_drawn_is_a_config_error():
    with pytest.raises(ConfigError) as error:
        make_stream(mixture([1, 1e-5, 1]), "infinite", seed=0, global_batch_size=1)
    assert str(error.value) == (
        "part 2 of the mixture of datasets has a share of 4.99998e-06, too small to be drawn at all; "
        "give it at least 0.0001"
    )
    with pytest.raises(ConfigError, match="the dataset holds 1032 images, fewer than the 2000 of one global batch"):
        make_stream(mixture([1, 1, 1]), "infinite", seed=0, global_batch_size=2000)
