"""The difference to the start of a run, on the same images."""

import numpy as np
import pytest

from dinov2.eval.predictions import Measurements
from dinov2.eval.start_comparison import gain_over_start, read_measurements, write_measurements


def right(values, *, name="VAL", groups=None, places=None):
    values = np.asarray(values, dtype=np.float64)
    places = np.arange(len(values)) if places is None else np.asarray(places)
    return Measurements(name=name, values={"knn_top1_pct": values}, places=places, groups=groups)


START = [1, 0] * 50
LATER = [1, 0, 1, 1] * 25


def test_what_is_kept_of_the_start_is_read_again(tmp_path):
    path = tmp_path / "right.safetensors"
    path.write_bytes(write_measurements(right(START, groups=np.arange(100))))
    read = read_measurements(path)
    assert read.name == "VAL" and np.array_equal(read.values["knn_top1_pct"], START)
    assert np.array_equal(read.places, np.arange(100))


def test_the_sentence_and_what_is_written():
    gain = gain_over_start(right(LATER), right(START), score="knn_top1_pct")
    low, high = gain.difference.low_pct, gain.difference.high_pct
    assert gain.sentence() == (
        f"+25.0 points over start, 95 % interval {low:+.1f} to {high:+.1f} (knn_top1_pct 75.0, 50.0 at the start; "
        "100 images)"
    )
    assert 10 < low < 25 < high < 40  # binomial: 25 +- 2 * 4.3
    plain = gain.as_plain()
    assert plain["difference_points"] == pytest.approx(25) and plain["p_value"] < 0.01
    assert (plain["start_pct"], plain["n_images"], plain["n_groups"]) == (50.0, 100, 100)


def test_images_of_a_group_go_together():
    groups = np.arange(100) // 10
    gain = gain_over_start(right(LATER, groups=groups), right(START), score="knn_top1_pct")
    assert gain.num_units == 10 and "100 images in 10 groups" in gain.sentence()
    one = gain_over_start(right(LATER, groups=groups * 0), right(START), score="knn_top1_pct")
    assert one.sentence().startswith("+25.0 points over start, no interval with one group (")


def test_only_images_that_both_have_are_compared():
    gain = gain_over_start(right(LATER[:60]), right(START[:50], places=range(10, 60)), score="knn_top1_pct")
    assert gain.num_images == 50


def test_nothing_to_compare_with(tmp_path, caplog):
    assert gain_over_start(right(LATER), None, score="knn_top1_pct") is None
    assert gain_over_start(right(LATER), right(START, name="OTHER"), score="knn_top1_pct") is None
    assert gain_over_start(right(LATER), right(START, places=range(200, 300)), score="knn_top1_pct") is None
    assert gain_over_start(right(LATER), right(START), score="knn5_top1_pct") is None
    assert read_measurements(tmp_path / "missing") is None
    (tmp_path / "damaged").write_bytes(b"nothing")
    assert read_measurements(tmp_path / "damaged") is None
    assert "the comparison with the start is left out" in caplog.text
