"""Intervals and comparisons: against slow references, and what must not change them."""

import numpy as np
import pytest
from support.eval_predictions import random_predictions

from dinov2.eval import bootstrap
from dinov2.eval.bootstrap import interval, intervals, joined, resamples, resampling_units
from dinov2.eval.comparison import Difference, compare
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.predictions import Measurements, Predictions


def slow_intervals(found, *, num_resamples, seed=0):
    """Draw groups with replacement and compute the metrics of the images anew, each time."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(found.groups == group) for group in np.unique(found.groups)]
    resampled = []
    for _ in range(num_resamples):
        drawn = generator.integers(len(members), size=len(members))
        rows = np.concatenate([members[number] for number in drawn])
        resampled.append(classification_metrics(found.take(rows)).scores)
    return {name: interval(np.array([scores[name] for scores in resampled])) for name in resampled[0]}


def test_intervals_are_those_of_a_slow_reference():
    groups = np.sort(np.random.default_rng(2).integers(30, size=120))
    found = random_predictions(120, 3, groups=groups)
    # the same draws: groups are numbered by their first place, which rises with the group here
    fast, slow = intervals(found, num_resamples=40), slow_intervals(found, num_resamples=40)
    assert set(fast) == set(slow) and len(fast) == 11
    for name, span in fast.items():
        assert span == pytest.approx(slow[name]), name


def test_intervals_of_accuracy_are_those_of_the_binomial():
    found = random_predictions(2000, 2, ties=False)
    low, high = intervals(found, num_resamples=1000)["top1_pct"]
    share = (found.predicted() == found.targets).mean()
    half = 1.96 * 100 * np.sqrt(share * (1 - share) / 2000)
    assert (low, high) == pytest.approx((100 * share - half, 100 * share + half), abs=0.35)  # 3.5 standard errors


def test_intervals_over_groups_are_wider():
    half = random_predictions(100, 3)
    twice = half.take(np.repeat(np.arange(100), 4))
    alone = Predictions(**vars_of(twice) | {"places": np.arange(400)})
    grouped = Predictions(**vars_of(alone) | {"groups": np.repeat(np.arange(100), 4)})
    widths = [np.diff(intervals(found, num_resamples=500)["top1_pct"])[0] for found in (alone, grouped)]
    assert widths[1] > 1.6 * widths[0]  # about 2 = the root of 4


def vars_of(found):
    names = ("name", "targets", "scores", "class_names", "places", "groups", "paths")
    return {name: getattr(found, name) for name in names}


def test_the_order_of_files_does_not_matter():
    paths = np.array([f"{n:03}.png" for n in range(80)])
    groups = np.random.default_rng(0).integers(9, size=80)
    found, other = (random_predictions(80, 3, seed=seed, paths=paths, groups=groups) for seed in range(2))
    other = Predictions(**vars_of(other) | {"targets": found.targets})
    order = np.random.default_rng(1).permutation(80)
    moved, moved_other = (
        Predictions(**vars_of(one.take(order)) | {"places": np.arange(80), "groups": 100 - groups[order]})
        for one in (found, other)
    )
    spans = intervals(found, num_resamples=100)
    for name, span in intervals(moved, num_resamples=100).items():
        assert span == pytest.approx(spans[name], abs=1e-9)
    for name, difference in compare(found, other, num_resamples=100).differences.items():
        same = compare(moved, moved_other, num_resamples=100).differences[name]
        assert (same.low_pct, same.p_value) == pytest.approx((difference.low_pct, difference.p_value), abs=1e-9)


def test_draws_do_not_depend_on_the_size_of_blocks(monkeypatch):
    whole = np.concatenate(list(resamples(7, num_images=7, num_resamples=50, seed=3)), axis=1)
    assert whole.shape == (7, 50) and (whole.sum(axis=0) == 7).all()
    monkeypatch.setattr("dinov2.eval.weighted_metrics._AT_ONCE", 30)
    blocks = list(resamples(7, num_images=7, num_resamples=50, seed=3))
    assert len(blocks) > 10 and (np.concatenate(blocks, axis=1) == whole).all()


def test_units_are_numbered_by_path():
    found = random_predictions(4, 2, paths=np.array(["d", "a", "c", "b"]), groups=np.array([7, 9, 9, 7]))
    assert resampling_units(found).tolist() == [1, 0, 0, 1]
    alone = random_predictions(4, 2, paths=np.array(["d", "a", "c", "b"]))
    assert resampling_units(alone).tolist() == [3, 0, 2, 1]


def test_one_group_has_no_interval():
    found = random_predictions(10, 2, groups=np.zeros(10, dtype=int))
    assert intervals(found, num_resamples=100) == {}
    assert compare(found, found, num_resamples=100).differences["top1_pct"].sentence().endswith("no interval, p=1.000")


def test_too_much_work_leaves_rankings_out(monkeypatch):
    monkeypatch.setattr(bootstrap, "_MOST_RANKED", 100)
    names = intervals(random_predictions(20, 2), num_resamples=100)
    assert "top1_pct" in names and not [name for name in names if "roc" in name or "average_precision" in name]


def test_the_same_predictions_do_not_differ():
    found = random_predictions(50, 3)
    comparison = compare(found, found, num_resamples=200)
    assert (comparison.num_images, comparison.num_units, comparison.num_left_out) == (50, 50, 0)
    for difference in comparison.differences.values():
        assert (difference.difference_pct, difference.low_pct, difference.high_pct, difference.p_value) == (0, 0, 0, 1)


def test_all_swaps_by_hand():
    """Two groups better, one worse: differences +2, +1, -1 images of 6; 4 of 8 sign patterns are as far from 0."""
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    groups = np.array([0, 0, 1, 1, 2, 2])
    arrays = {"targets": np.zeros(6, dtype=int), "class_names": ("a", "b"), "places": np.arange(6), "groups": groups}
    value = Predictions(name="val", scores=np.array([right, right, right, wrong, wrong, wrong]), **arrays)
    reference = Predictions(name="val", scores=np.array([wrong, wrong, wrong, wrong, right, wrong]), **arrays)
    difference = compare(value, reference, num_resamples=100).differences["top1_pct"]
    assert difference.difference_pct == pytest.approx(100 * 2 / 6)
    # sums of +-2 +-1 +-1: 4, 2, 2, 0 and their opposites
    assert difference.p_value == 6 / 8


def test_p_values_of_equally_good_backbones_are_uniform():
    p_values = []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        values = [{"score": generator.random(20)} for _ in range(2)]
        pair = [Measurements(name="val", values=value, places=np.arange(20)) for value in values]
        p_values.append(compare(*pair, num_resamples=100, seed=seed).differences["score"].p_value)
    assert 0.4 < np.mean(p_values) < 0.6
    assert np.mean(np.array(p_values) <= 0.05) <= 0.1  # 0.05, and twice its spread among 150


def test_a_clear_difference_is_seen():
    better, worse = random_predictions(200, 2, ties=False), random_predictions(200, 2, ties=False, seed=1)
    worse = Predictions(**vars_of(worse) | {"targets": better.targets})  # its scores know nothing of these
    difference = compare(better, worse, num_resamples=500).differences["top1_pct"]
    assert difference.low_pct > 0 and difference.p_value == pytest.approx(1 / 501)


def test_images_that_one_lacks_are_left_out():
    found = random_predictions(50, 3)
    comparison = compare(found.take(np.arange(45)), found.take(np.arange(2, 50)), num_resamples=100)
    assert (comparison.num_images, comparison.num_left_out) == (43, 7)
    with pytest.raises(ValueError, match="have no image in common"):
        compare(found.take(np.arange(5)), found.take(np.arange(5, 10)), num_resamples=100)
    other = Predictions(**vars_of(found) | {"targets": 2 - found.targets})
    with pytest.raises(ValueError, match="scored against other classes"):
        compare(found, other, num_resamples=100)


def test_measurements_count_where_both_do():
    values = [np.array([1, 0, np.nan, 1]), np.array([0, 0, 1, np.nan])]
    pair = [Measurements(name="val", values={"recall": value}, places=np.arange(4)) for value in values]
    difference = compare(*pair, num_resamples=100).differences["recall"]
    assert (difference.value_pct, difference.reference_pct) == (50, 0)
    low, high = intervals(pair[0], num_resamples=200)["recall"]
    assert 0 <= low < 100 * 2 / 3 < high <= 100


def test_sentence():
    settings = {"name": "top1_pct", "value_pct": 83.1, "reference_pct": 81.0, "difference_pct": 2.1}
    found = Difference(**settings, low_pct=0.6, high_pct=3.6, p_value=0.006)
    assert found.sentence() == "top1_pct 83.1 vs 81.0: +2.1, 95 % interval 0.6 to 3.6, p=0.006"
    assert Difference(**settings, low_pct=1, high_pct=3, p_value=0.0004).sentence().endswith("1.0 to 3.0, p<0.001")


def test_joined_puts_blocks_behind_each_other():
    blocks = iter([np.ones((2, 3)), np.ones((2, 1))])
    assert joined(lambda weights: {"sum": weights.sum(axis=0)}, blocks)["sum"].tolist() == [2] * 4
