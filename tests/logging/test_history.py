"""The history of a run: recorded, read back, as a table and as curves."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from dinov2.errors import ConfigError, DatasetError
from dinov2.logging.history import History, plot_loss_history


def recorded(**settings):
    history = History(**settings)
    for iteration in range(6):
        history.record(iteration=iteration, total_loss=10 - iteration, dino_loss=5.0)
    history.record(iteration=5, knn_top1_pct=70)
    history.record(epoch=1, val_loss=0.5)
    return history


def test_metrics_are_found_by_name():
    history = recorded(epoch_length=4)
    assert len(history) == 6 and history.names() == ["total_loss", "dino_loss", "knn_top1_pct"]
    iterations, values = history.get_metric("total_loss")
    assert iterations.tolist() == list(range(6)) and values.tolist() == [10, 9, 8, 7, 6, 5]
    assert [part.tolist() for part in history.get_metric("knn_top1_pct")] == [[5], [70.0]]
    assert [part.tolist() for part in history.get_metric("total_loss", per="epoch")] == [[0, 1], [8.5, 5.5]]
    assert [part.tolist() for part in history.get_metric("val_loss", per="epoch")] == [[1], [0.5]]
    with pytest.raises(KeyError, match="no metric 'los' per epoch; there are: val_loss"):
        recorded().get_metric("los", per="epoch")
    with pytest.raises(ValueError, match="takes iteration=... or epoch=..."):
        history.record(loss=1)
    with pytest.raises(ConfigError, match="epoch_length=0: must be at least 1 iteration"):
        History(epoch_length=0)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    history = recorded(epoch_length=4)
    history.record(iteration=6, total_loss=math.inf)
    history.save(tmp_path / "training_metrics.json")
    again = History.load(tmp_path, epoch_length=4)
    for per in ("iteration", "epoch"):
        wanted, found = (item.to_dataframe(per=per).replace(math.inf, math.nan) for item in (history, again))
        if per == "iteration":
            assert wanted.equals(found)
        assert wanted.columns.equals(found.columns) and wanted.index.equals(found.index)
    assert json.loads((tmp_path / "training_metrics.json").read_text().splitlines()[6]) == {
        "iteration": 6,
        "total_loss": None,
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "training_metrics.json"]


def test_table_has_a_row_for_each_iteration():
    table = recorded().to_dataframe()
    assert table.index.name == "iteration" and table.shape == (6, 3)
    assert table["total_loss"].tolist() == [10, 9, 8, 7, 6, 5] and np.isnan(table["knn_top1_pct"][0])
    assert recorded().to_dataframe(per="epoch").to_dict() == {"val_loss": {1: 0.5}}


def test_a_run_that_goes_on_is_read(tmp_path):
    path = tmp_path / "training_metrics.json"
    path.write_text('{"iteration": 0, "total_loss": 3.0, "note": "x"}\n{"iteration": 1, "total_lo')
    assert History.load(path).to_dataframe().to_dict() == {"total_loss": {0: 3.0}}
    path.write_text('{"iteration": 7, "epoch": 2, "loss": 1.5}\n')  # of another program
    assert History.load(path).to_dataframe().to_dict() == {"loss": {7: 1.5}}
    path.write_text("")
    with pytest.raises(DatasetError, match="holds no metrics"):
        History.load(path)
    with pytest.raises(DatasetError, match="no metrics can be read there"):
        History.load(tmp_path / "none")


def test_curves_are_drawn(tmp_path):
    history = recorded(epoch_length=3)
    history.plot(tmp_path / "all.png")
    plot_loss_history(history, tmp_path / "losses.png", per="epoch")
    history.save(tmp_path / "training_metrics.json")
    plot_loss_history(tmp_path, tmp_path / "of_run.png")
    for name in ("all", "losses", "of_run"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    only_score = History()
    only_score.record(iteration=0, knn_top1_pct=3)
    with pytest.raises(DatasetError, match="has no losses per iteration; its metrics are: knn_top1_pct"):
        plot_loss_history(only_score, tmp_path / "x.png")
    with pytest.raises(DatasetError, match="no metrics per epoch to draw"):
        only_score.plot(tmp_path / "x.png", per="epoch")
