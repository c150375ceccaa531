from collections import Counter
from itertools import islice

import numpy as np
import pytest

from dinov2.data.samplers import RankBatchSampler, SamplerType, make_sampler
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
