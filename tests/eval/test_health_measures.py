"""Label-free measures of features against plain references, and on features whose values are known."""

import math

import numpy as np
import pytest
import torch

from dinov2.eval.health_measures import (
    alignment,
    effective_rank,
    feature_std,
    mean_cosine,
    neighbour_overlap_pct,
    participation_ratio,
    rankme,
    singular_values,
)
from dinov2.eval.health_views import TwoViews, choose_images


def features(num, dim=24, *, seed=0, shift=3.0):
    """Features of unequal directions with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator) * torch.linspace(0.1, 2, dim)
    return torch.randn(num, dim, generator=generator) @ mix + shift


@pytest.mark.parametrize("num", [5, 24, 100, 5000])
@pytest.mark.parametrize("is_centred", [False, True])
def test_singular_values_are_those_of_numpy(num, is_centred):
    values = features(num)
    matrix = values.double().numpy()
    matrix = matrix - matrix.mean(axis=0) * is_centred
    found = singular_values(values, is_centred=is_centred).numpy()
    expected = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-7 * expected[0])  # squared: half the digits


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_ranks_follow_their_formulas(shift):
    values = features(500, shift=shift).double().numpy()
    share = np.linalg.svd(values, compute_uv=False)
    share = share / share.sum() + 1e-7
    expected = math.exp(-(share * np.log(share)).sum())
    assert rankme(singular_values(torch.from_numpy(values), is_centred=False)) == pytest.approx(expected, rel=1e-9)
    centred = singular_values(torch.from_numpy(values), is_centred=True)
    share = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    share = share / share.sum()
    assert effective_rank(centred) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-9)
    variances = np.linalg.eigvalsh(np.cov(values.T))
    assert participation_ratio(centred) == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), rel=1e-9)


def test_equally_strong_directions_count_fully():
    values = torch.cat([torch.eye(6, 10), -torch.eye(6, 10)])
    for is_centred in (False, True):
        singular = singular_values(values, is_centred=is_centred)
        assert rankme(singular) == pytest.approx(6, abs=1e-3)  # the paper's 1e-7 in each share
        assert effective_rank(singular) == pytest.approx(6, abs=1e-5)  # rounding noise in the other directions
        assert participation_ratio(singular) == pytest.approx(6)


def test_features_that_are_all_the_same():
    same = torch.ones(50, 8)
    assert rankme(singular_values(same, is_centred=False)) == pytest.approx(1, abs=1e-4)
    centred = singular_values(same, is_centred=True)
    assert effective_rank(centred) == participation_ratio(centred) == 0
    assert (feature_std(same), mean_cosine(same)) == (pytest.approx(0, abs=1e-7), pytest.approx(1))
    assert rankme(singular_values(torch.zeros(5, 3), is_centred=False)) == 0


def test_a_small_spread_around_a_large_mean_is_seen():
    """The directions of a new network with LayerScale 1e-5, all of whose cosines are nearly 1."""
    spread = features(400, shift=0).double()
    expected = effective_rank(singular_values(spread, is_centred=True))
    assert effective_rank(singular_values(1000 + 0.01 * spread, is_centred=True)) == pytest.approx(expected, rel=1e-6)


def test_spread_and_mean_cosine():
    values = features(5000)
    unit = torch.nn.functional.normalize(values.double(), dim=1)
    assert feature_std(values) == pytest.approx(unit.var(dim=0, correction=0).sum().sqrt().item())
    cosines = (unit @ unit.T).fill_diagonal_(0)
    assert mean_cosine(values) == pytest.approx(cosines.sum().item() / (5000 * 4999))
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert (feature_std(opposite), mean_cosine(opposite)) == (1, -1)


def test_alignment_is_the_distance_of_unit_features():
    one = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert alignment(one, 7 * one) == 0
    assert alignment(one, one.flip(1)) == pytest.approx(2)
    assert alignment(one, -one) == pytest.approx(4)
    assert alignment(one, torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == pytest.approx(1)


def test_overlap_counts_common_neighbours_in_any_order():
    one = torch.tensor([[1, 2, 3], [0, 2, 3]])
    assert neighbour_overlap_pct(one, one.flip(1)) == 100
    assert neighbour_overlap_pct(one, torch.tensor([[3, 4, 5], [4, 5, 6]])) == pytest.approx(100 / 6)


def test_chosen_images_are_always_the_same_and_stay_when_others_come():
    chosen = choose_images(10_000, at_most=500)
    assert len(chosen) == len(set(chosen.tolist())) == 500 and (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, choose_images(10_000, at_most=500))
    more = choose_images(10_500, at_most=500)
    assert len(np.intersect1d(chosen, more)) > 450
    assert np.histogram(chosen, bins=5, range=(0, 10_000))[0].min() > 70  # from everywhere
    for at_most in (0, 7, 20):
        assert np.array_equal(choose_images(7, at_most=at_most), np.arange(7))


def test_the_two_views_are_the_corners_enlarged():
    class Means(torch.nn.Module):
        def forward(self, images):
            assert images.shape[1:] == (1, 8, 8)
            return images.mean(dim=(2, 3))

    image = torch.zeros(2, 1, 8, 8)
    image[0, :, :6, :6] = 1
    image[1, :, 6:, 6:] = 1
    views = TwoViews(Means())(image)
    assert views.shape == (2, 2)
    assert views[0, 0] == 1 and 0 < views[0, 1] < 0.6
    assert views[1, 0] == 0 and 0 < views[1, 1] < 0.2
