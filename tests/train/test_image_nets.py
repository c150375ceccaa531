"""Training and k-NN on Imagenette, ImageNet100, ImageNet and ImageNet22k, in the layouts they are published in."""

import json

import pytest
import torch
from support.image_nets import WRITERS
from support.training import losses_of, train

TINY = (
    "student.in_chans=3",
    "train.OFFICIAL_EPOCH_LENGTH=3",
    "train.batch_size_per_gpu=3",
    "evaluation.eval_period_iterations=3",
    "evaluation.knn.nb_knn=[1]",
)


@pytest.mark.parametrize("name", WRITERS)
def test_a_published_layout_trains_as_it_is(name, tmp_path):
    root, run = tmp_path / "data", tmp_path / "run"
    WRITERS[name](root, size=(48, 40))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    keys = ":val_fraction=0.5" if name == "ImageNet22k" else ""  # it has no folders of splits
    training, validation = (f"{name}:split={split}:root='{root}'{keys}" for split in ("TRAIN", "VAL"))
    datasets = [f"train.dataset_path={training}", f"evaluation.knn.train_dataset_path={training}"]
    assert train(run, *TINY, *datasets, f"evaluation.knn.val_dataset_path={validation}") == 0
    assert len(losses_of(run)) == 3 and torch.isfinite(losses_of(run)).all()
    scores = json.loads((run / "eval/training_2/results_eval_knn.json").read_text())
    assert 0 <= scores["knn1_top1_pct"] <= 100
    assert list((run / "cache").rglob("*.index"))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before  # nothing is written beside the images
