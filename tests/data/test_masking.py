import random

import numpy as np
import pytest
from lightly.models.utils import random_block_mask, random_block_mask_image

from dinov2.data import MaskingGenerator, MaskPlan


def masks(wanted, *, side=14, count=300, **options):
    rng = random.Random(0)
    generator = MaskingGenerator(side, **options)
    return np.stack([generator(wanted, rng=rng) for _ in range(count)])


@pytest.mark.parametrize("wanted", [0, 4, 20, 60, 98])
def test_never_more_and_seldom_fewer_patches_are_masked_than_wanted(wanted):
    counts = masks(wanted, max_num_patches=98).sum((1, 2))
    assert counts.max() <= wanted
    assert counts.mean() >= 0.93 * wanted
    assert (counts >= wanted - 8).all()


@pytest.mark.parametrize("wanted", [20, 60, 98])
def test_masks_are_distributed_as_lightlys(wanted):
    random.seed(0)
    ours = masks(wanted, count=1500)
    theirs = np.stack([random_block_mask_image((14, 14), wanted).numpy() for _ in range(1500)])
    for statistic in (_count, _num_edges, _share_of_border):
        values, reference = statistic(ours), statistic(theirs)
        tolerance = 5 * reference.std() * (2 / 1500) ** 0.5 + 1e-9
        assert abs(values.mean() - reference.mean()) < tolerance, statistic.__name__
        assert abs(values.std() - reference.std()) < max(tolerance, 0.12 * reference.std()), statistic.__name__
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 5 * (0.5 / 1500) ** 0.5


def _count(drawn):
    return drawn.sum((1, 2))


def _num_edges(drawn):
    """Neighbouring patches of which one is masked: many for scattered masks, few for compact ones."""
    return (drawn[:, 1:] != drawn[:, :-1]).sum((1, 2)) + (drawn[:, :, 1:] != drawn[:, :, :-1]).sum((1, 2))


def _share_of_border(drawn):
    return drawn[:, [0, -1]].mean((1, 2)) + drawn[:, :, [0, -1]].mean((1, 2))


def test_the_largest_block_is_bounded():
    drawn = masks(10, max_num_patches=10, min_num_patches=9, side=(9, 20), count=50)
    assert drawn.shape == (50, 9, 20)
    assert (drawn.sum((1, 2)) <= 10).all()


def test_a_mask_depends_on_its_generator_alone():
    generator = MaskingGenerator(14)
    first = [generator(50, rng=random.Random(5)) for _ in range(2)]
    assert np.array_equal(*first)
    assert not np.array_equal(first[0], generator(50, rng=random.Random(6)))


def test_the_number_of_masked_patches_can_be_fixed_at_construction():
    generator = MaskingGenerator(14, 40)
    assert 30 <= generator(rng=random.Random(0)).sum() <= 40


def test_a_plan_masks_the_share_of_crops_and_spreads_their_ratios():
    plan = MaskPlan(0, 64, probability=0.5, ratio_min_max=(0.1, 0.5))
    ratios = np.stack([plan.ratios(step) for step in range(50)])
    assert ratios.shape == (50, 2, 64)
    assert ((ratios > 0).sum((1, 2)) == 64).all()
    edges = np.linspace(0.1, 0.5, 65)
    for batch in ratios:
        drawn = np.sort(batch[batch > 0])
        assert ((drawn >= edges[:-1]) & (drawn <= edges[1:])).all()
    assert np.abs((ratios > 0).mean(0) - 0.5).max() < 5 * 0.5 / 50**0.5
    assert not np.array_equal(plan.ratios(0), plan.ratios(1))
    assert np.array_equal(plan.ratios(3), MaskPlan(0, 64).ratios(3))
    assert not np.array_equal(plan.ratios(3), MaskPlan(1, 64).ratios(3))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_plan_may_mask_none_or_all(probability):
    ratios = MaskPlan(0, 5, probability=probability, ratio_min_max=(0.2, 0.2)).ratios(0)
    np.testing.assert_allclose(ratios, 0.2 * probability)


def test_masked_patches_of_batches_are_as_many_as_lightlys():
    random.seed(0)
    generator, rng, plan = MaskingGenerator(14, max_num_patches=98), random.Random(0), MaskPlan(0, 16)
    ours = [
        np.stack([generator(int(196 * ratio), rng=rng) for ratio in plan.ratios(step).ravel()]) for step in range(40)
    ]
    theirs = [random_block_mask((32, 14, 14), batch_mask_ratio=0.5).numpy() for _ in range(40)]
    ours, theirs = (np.array([batch.sum() for batch in batches]) for batches in (ours, theirs))
    assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() * (2 / 40) ** 0.5
    assert abs(ours.mean() - 16 * 0.3 * 196) < 0.05 * ours.mean()  # 16 of 32 crops, 0.1 to 0.5 of 196 patches each
