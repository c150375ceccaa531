"""What a run says of itself at its end."""

import json
from types import SimpleNamespace

from dinov2.train.run_log import summarise


def test_a_run_ends_with_its_curves_and_how_its_scores_changed(tmp_path, caplog):
    rows = [{"iteration": step, "total_loss": 10.0 - step, "lr": 0.1} for step in range(3)]
    (tmp_path / "training_metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"knn_top1_pct": 60.0, "uniformity": -1.5}
    evaluate = SimpleNamespace(scores_of=lambda name: start, last_scores={"knn_top1_pct": 62.5, "uniformity": -1.75})
    with caplog.at_level("INFO", logger="dinov2.train"):
        summarise(evaluate, tmp_path)
    assert (tmp_path / "training_curves.png").stat().st_size > 0
    assert caplog.messages == [
        "knn_top1_pct start=60.00 end=62.50 gain=+2.50",
        "uniformity start=-1.50 end=-1.75 change=-0.25",
    ]
