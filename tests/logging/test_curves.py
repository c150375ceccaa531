"""Curves of a run as a picture."""

import json
import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from dinov2.errors import DatasetError
from dinov2.logging import plot_training_curves
from dinov2.logging.curves import draw_curves


def write(path, num_steps):
    with path.open("w") as file:
        for step in range(num_steps):
            values = {"total_loss": 9 * math.exp(-step / 50), "koleo_loss": None if step == 3 else 0.1, "lr": 1e-3}
            if step % 50 == 49:
                values["knn_top1_pct"] = 70.0 + step / 100
            file.write(json.dumps({"iteration": step, **values, "anything_else": 1.0}) + "\n")
    return path


@pytest.mark.parametrize("num_steps", [1, 5003])
def test_a_picture_is_drawn(tmp_path, num_steps):
    metrics = write(tmp_path / "training_metrics.json", num_steps)
    plot_training_curves(metrics, tmp_path / "curves.png", start_scores={"knn_top1_pct": 60.0})
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[1] > 1000 and 0.005 < (pixels < 128).mean() < 0.5


def test_no_metrics_no_picture(tmp_path):
    with pytest.raises(DatasetError, match="no such metrics file"):
        plot_training_curves(tmp_path / "none.json", tmp_path / "curves.png")
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(DatasetError, match="holds no metrics to draw"):
        plot_training_curves(tmp_path / "empty.json", tmp_path / "curves.png")


HEALTH = {"rankme": 9.0, "effective_rank": 8.0, "uniformity": -1.0, "alignment": 0.3, "nn_overlap_with_start_pct": 60.0}


def test_measures_of_health_have_panels_and_the_ranks_share_one(monkeypatch, tmp_path):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, title, **style: titles.append(title))
    curves = {name: (np.arange(1, 4), np.full(3, value)) for name, value in HEALTH.items()}
    draw_curves(curves, tmp_path / "curves.png")
    assert titles == [
        "directions in use",
        "uniformity (0 = collapsed)",
        "alignment of two views (lower = stabler)",
        "neighbours kept since the start, %",
    ]
