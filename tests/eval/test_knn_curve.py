"""Curves of k-NN and label-free measures over the training of runs."""

import json

import numpy as np
import pytest
from PIL import Image

from dinov2.eval import knn_curve
from dinov2.eval.knn_curve import main, plot_knn_curve, read_scores


def write_run(folder, *, gain=1.0):
    start = {"results_eval_knn.json": {"knn_top1_pct": 60.0, "knn10_top1_pct": 60.0}}
    start["results_eval_health.json"] = {"rankme": 20.0, "uniformity": -2.0}
    for name, content in start.items():
        path = folder / "eval" / "start" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    lines = [{"iteration": step, "total_loss": 9.0, "lr": 1e-3} for step in range(10)]
    for step in (4, 9):
        lines[step] |= {"knn_top1_pct": 60 + gain * step, "knn10_top1_pct": 60.0, "rankme": 20.0 + step}
        lines[step] |= {"uniformity": -2.1, "nn_overlap_with_start_pct": 90.0}
    (folder / "training_metrics.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_scores_come_from_the_start_the_metrics_and_later_evaluations(tmp_path):
    run = write_run(tmp_path)
    later = run / "eval" / "training_11" / "results_eval_knn.json"
    later.parent.mkdir()
    later.write_text(json.dumps({"knn_top1_pct": 80.0, "weights": "w", "settings": {}}))
    (run / "eval" / "by_hand").mkdir()
    (run / "eval" / "by_hand" / "results_eval_knn.json").write_text(json.dumps({"knn_top1_pct": 1.0}))
    found = read_scores(run)
    assert list(found) == ["knn_top1_pct", "knn10_top1_pct", "rankme", "uniformity", "nn_overlap_with_start_pct"]
    assert found["knn_top1_pct"] == {0: 60.0, 5: 64.0, 10: 69.0, 12: 80.0}
    assert found["nn_overlap_with_start_pct"] == {5: 90.0, 10: 90.0}


def test_command_prints_and_draws(tmp_path, capsys):
    run = write_run(tmp_path / "first")
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        "step",
        "knn_top1_pct",
        "knn10_top1_pct",
        "rankme",
        "uniformity",
        "nn_overlap_with_start_pct",
    ]
    assert lines[2].split() == ["start", "60.00", "60.00", "20.00", "-2.00", "-"]
    assert lines[3].split() == ["5", "64.00", "60.00", "24.00", "-2.10", "90.00"]
    assert lines[-1] == f"written: {run}/knn_curve.png"
    with Image.open(run / "knn_curve.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_runs_are_drawn_side_by_side(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(knn_curve, "draw_panels", lambda panels, path: drawn.append(panels))
    runs = [write_run(tmp_path / "first"), write_run(tmp_path / "second", gain=2.0)]
    plot_knn_curve(runs, tmp_path / "both.png")
    (panels,) = drawn
    assert list(panels)[-2:] == ["uniformity (0 = collapsed)", "neighbours kept since the start, %"]
    curves = panels["knn_top1_pct"]
    assert {name: values.tolist() for name, (_, values) in curves.items()} == {
        "first": [60.0, 64.0, 69.0],
        "second": [60.0, 68.0, 78.0],
    }
    plot_knn_curve([write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")], tmp_path / "both.png")
    assert list(drawn[1]["rankme"]) == [f"{tmp_path}/x/run", f"{tmp_path}/y/run"]


def test_two_runs_make_a_picture(tmp_path):
    assert main([str(write_run(tmp_path / name)) for name in "ab"] + ["--output", str(tmp_path / "n" / "c.png")]) == 0
    with Image.open(tmp_path / "n" / "c.png") as picture:
        assert picture.width < 2000 and picture.height < 1000


@pytest.mark.parametrize("kind", ["empty", "damaged", "twice", "ending"])
def test_bad_input_is_a_sentence(tmp_path, capsys, kind):
    run = tmp_path if kind == "empty" else write_run(tmp_path)
    args, code = [str(run)], 1
    if kind == "empty":
        wanted = (
            f"{run}: holds no evaluations of a run; name a folder with training_metrics.json or eval/, of a training "
        )
        wanted += "with evaluation.eval_period_iterations above 0"
    elif kind == "damaged":
        path = run / "eval" / "start" / "results_eval_knn.json"
        path.write_text("{")
        wanted = f"{path}: cannot be read as results of an evaluation (Expecting property name"
    elif kind == "twice":
        args, code = [str(run), f"{run}/"], 2
        wanted = f"{run} {run}/: must be at most 10 runs, each once"
    else:
        args, code = [str(run), "--output", "c.svg"], 2
        wanted = "--output c.svg: must be a .png file"
    assert main(args) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {wanted}")
