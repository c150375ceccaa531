import numpy as np
import torch

from dinov2.data.random_streams import derive_seed, sample_seed, shuffled, uniforms

SAMPLE_SEED = 1279368494785126216
ORDER = [3, 2, 7, 5, 6, 1, 4, 0]
DRAWS = [0.3088500499725342, 0.5321982502937317, 0.41146910190582275]


def test_seeds_differ_by_every_number_and_their_order():
    seeds = {derive_seed(*numbers) for numbers in [(), (0,), (0, 0), (0, 1), (1, 0), (1, 1), (2**63, 5), (5, 2**63)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({sample_seed(7, position) for position in range(10_000)}) == 10_000


def test_seeds_and_orders_never_change():
    # Stored, not computed: a change would make every resumed run another run.
    assert sample_seed(0, 0) == SAMPLE_SEED
    assert shuffled(8, 3).tolist() == ORDER
    assert torch.equal(uniforms(torch.tensor([5]), torch.tensor([2]), count=3), torch.tensor([DRAWS]))


def test_shuffled_is_a_permutation_that_depends_on_the_seed():
    first, second = shuffled(1000, 1), shuffled(1000, 2)
    assert sorted(first) == list(range(1000))
    assert (first != second).mean() > 0.95
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1  # 3 standard deviations


def test_uniforms_are_uniform_and_independent():
    seeds = torch.tensor([sample_seed(0, position) for position in range(4000)])
    draws = torch.cat([uniforms(seeds, torch.full_like(seeds, stream), count=5) for stream in range(3)], 1)
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = torch.stack([torch.histc(column, 10, 0, 1) for column in draws.T])
    assert (histogram - 400).abs().max() < 5 * 400**0.5
    correlation = torch.corrcoef(draws.T) - torch.eye(15)
    assert correlation.abs().max() < 5 / 4000**0.5


def test_uniforms_of_a_row_do_not_depend_on_the_others():
    seeds = torch.tensor([3, 2**62 + 1, 99])
    streams = torch.tensor([0, 1, 9])
    whole = uniforms(seeds, streams, count=4)
    assert torch.equal(whole[1:2], uniforms(seeds[1:2], streams[1:2], count=4))
    assert torch.equal(whole[:, :2], uniforms(seeds, streams, count=2))
