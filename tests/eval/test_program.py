"""The skeleton of evaluation programs, end to end with a small classifier on scikit-learn's digits."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.dist import run_distributed
from support.evaluation import MODEL, SIZES, write_tiny_backbone
from support.industrial_json import make_grouped_json

from dinov2.errors import DatasetError
from dinov2.eval.labels import LabelledSet, match_classes
from dinov2.eval.outcome import Outcome
from dinov2.eval.predictions import Measurements, Predictions
from dinov2.eval.program import run_evaluation

TRAIN, VAL = "Digits:split=TRAIN", "Digits:split=VAL"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return [str(write_tiny_backbone(folder / f"{seed}.pth", seed=seed)) for seed in range(2)]


def nearest_centre(inputs):
    """Votes fall with the distance to the mean of each class."""
    train, report = (part.labelled() for part in (inputs.train, inputs.test or inputs.val))
    sets = [LabelledSet(name=part.name, targets=part.targets, class_names=part.class_names) for part in (train, report)]
    classes = match_classes(*sets)
    centres = np.stack(
        [train.values[torch.from_numpy(classes.train == number)].mean(dim=0) for number in range(classes.count)]
    )
    distances = np.linalg.norm(report.values.numpy()[:, None] - centres, axis=2)
    names = [sets[0].describe([label]) for label in sets[0].labels()]
    predictions = Predictions.for_images(report, targets=classes.val, scores=1 / (1e-6 + distances), class_names=names)
    return Outcome(
        predictions=predictions,
        named_scores={"own_pct": 12.5},
        table=f"own table of {inputs.weights}",
        details={"reported_on": report.name, "num_classes": classes.count},
    )


def run(weights, folder, *more, train=TRAIN, val=VAL, fit_and_score=nearest_centre, **settings):
    argv = ["--pretrained-weights", weights, "--output-dir", str(folder), "--num-workers", "0"]
    argv += ["--features-dir", str(Path(weights).parent / "features")]  # computed once for all tests
    argv += ["--train-dataset", train] * bool(train) + ["--val-dataset", val] * bool(val)
    return run_evaluation(
        [*argv, "--num-bootstrap", "200", *more, *MODEL, *SIZES],
        name="centre",
        description="Nearest centre.",
        pool_of=lambda cfg, args: "cls",
        fit_and_score=fit_and_score,
        **settings,
    )


def results(folder):
    return json.loads((folder / "results_eval_centre.json").read_text())


def test_files_and_table(weights, tmp_path, capsys):
    assert run(weights[0], tmp_path) == 0
    found = results(tmp_path)
    low, high = found["intervals_95_pct"]["top1_pct"]
    assert 20 < low < found["top1_pct"] < high < 100 and found["own_pct"] == 12.5
    assert found["intervals_from"] == {"all": "200 resamples of 599 images"} and found["n_reported"] == {"all": 599}
    assert found["reported_on"] == VAL and [row["class"] for row in found["per_class"]["all"]][:2]
    assert (found["train_dataset"], found["val_dataset"], found["pool"]) == (TRAIN, VAL, "cls")
    assert set(found["features"]) == {"train", "val"} and "compare_to" not in found
    lines = list(csv.DictReader((tmp_path / "predictions_centre.csv").open()))
    assert len(lines) == 599 and set(lines[0]) == {"place", "path", "target", "predicted", "is_right", "share"}
    assert np.mean([line["is_right"] == "1" for line in lines]) == pytest.approx(found["top1_pct"] / 100)
    assert [line["is_right"] for line in lines] == [str(int(line["target"] == line["predicted"])) for line in lines]
    confusion = list(csv.reader((tmp_path / "confusion_centre.csv").open()))
    assert sum(int(row[n]) for n, row in enumerate(confusion) if n) / 5.99 == pytest.approx(found["top1_pct"])
    assert Image.open(tmp_path / "confusion_centre.png").width > 300
    screen = capsys.readouterr().out.splitlines()
    assert screen[0] == f"own table of {weights[0]}"
    assert screen[2] == f"{VAL}: 599 images; intervals: 200 resamples of images"
    assert screen[3].split() == [
        "top1_pct",
        f"{found['top1_pct']:.2f}",
        *f"95 % interval {low:.2f} to {high:.2f}".split(),
    ]
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_comparison_with_other_weights_and_with_the_same(weights, tmp_path, capsys):
    assert run(weights[0], tmp_path, "--compare-to", weights[1]) == 0
    found = results(tmp_path)["compare_to"]
    top1 = found["differences"]["top1_pct"]
    assert top1["value_pct"] == results(tmp_path)["top1_pct"] and top1["reference_pct"] == found["scores"]["top1_pct"]
    low, high = top1["interval_95_pct"]
    assert low < top1["difference_pct"] < high and 0 < top1["p_value"] <= 1
    screen = capsys.readouterr().out.splitlines()
    start = screen.index(f"compared to {weights[1]} on 599 images")
    assert screen[start + 1].startswith(f"top1_pct {top1['value_pct']:.1f} vs {top1['reference_pct']:.1f}: ")
    assert run(weights[0], tmp_path, "--compare-to", weights[0]) == 0
    assert (
        "top1_pct {0:.1f} vs {0:.1f}: +0.0, 95 % interval 0.0 to 0.0, p=1.000".format(results(tmp_path)["top1_pct"])
        in capsys.readouterr().out.splitlines()
    )


def test_groups_are_scored_and_drawn(weights, tmp_path, capsys):
    make_grouped_json(tmp_path / "parts")
    sets = {part: f"GroupedJSON:root={tmp_path / 'parts'}:split={part}" for part in ("train", "val")}
    assert run(weights[0], tmp_path, "--with-shares", **sets) == 0
    found = results(tmp_path)
    assert found["intervals_from"]["all"] == "200 resamples of 6 groups" and found["n_reported"]["group_"] == 6
    assert found["group_top1_pct"] is not None and "group_top1_pct" in found["intervals_95_pct"]
    assert any("intervals from 6 groups are too narrow" in note for note in found["notes"])
    lines = list(csv.DictReader((tmp_path / "predictions_centre.csv").open()))
    shares = [name for name in lines[0] if name.startswith("share_")]
    assert len(shares) == 2 and sum(float(lines[0][name]) for name in shares) == pytest.approx(1, abs=1e-5)
    groups = list(csv.DictReader((tmp_path / "predictions_centre_groups.csv").open()))
    assert len(groups) == 6 and {line["group"] for line in groups} == {line["group"] for line in lines}
    assert "group_top1_pct" in capsys.readouterr().out


def test_weights_to_compare_to_are_tried_before_anything_is_computed(weights, tmp_path, capsys):
    calls = []
    missing = tmp_path / "none.pth"
    sentence = fails_with(capsys, 1, weights[0], tmp_path, "--compare-to", str(missing), fit_and_score=calls.append)
    assert sentence == f"error: {missing}: no such file of weights" and not calls


def test_programs_of_one_set_leave_the_training_set_of_the_config_alone(weights, tmp_path):
    def score(inputs):
        assert inputs.train is inputs.val
        return Outcome(predictions=None)

    sets = {"train": "ImageFolder:root=none", "val": VAL}
    config = [f"evaluation.knn.{part}_dataset_path={name}" for part, name in sets.items()]
    assert run(weights[0], tmp_path, *config, train=None, val=None, fit_and_score=score, needs_train=False) == 0
    assert results(tmp_path)["train_dataset"] == VAL


def test_a_test_set_is_what_is_reported(weights, tmp_path):
    assert run(weights[0], tmp_path, "--test-dataset", VAL, val=TRAIN) == 0
    found = results(tmp_path)
    assert found["val_dataset"] == TRAIN and found["reported_on"] == found["test_dataset"] == VAL


def test_one_set_alone(weights, tmp_path):
    def score(inputs):
        assert inputs.train is inputs.val and inputs.test is None
        values = {"recall_at_1_pct": (inputs.val.targets % 2).astype(float)}
        further = nearest_centre(inputs).predictions
        measured = Measurements(name=inputs.val.name, values=values, places=inputs.val.places, rows="queries")
        return Outcome(predictions=None, further={"nsc": further}, measurements=measured)

    assert run(weights[0], tmp_path, train=None, fit_and_score=score, needs_train=False) == 0
    found = results(tmp_path)
    assert {"nsc_top1_pct", "recall_at_1_pct"} <= set(found["intervals_95_pct"]) and "top1_pct" not in found
    assert (tmp_path / "predictions_centre_nsc.csv").is_file() and (tmp_path / "confusion_centre_nsc.png").is_file()


def fails_with(capsys, code, *args, **settings):
    assert run(*args, **settings) == code
    return capsys.readouterr().err.splitlines()[-1]


def test_wrong_options_are_one_sentence(weights, tmp_path, capsys):
    assert fails_with(capsys, 2, weights[0], tmp_path, "--num-bootstrap", "5") == (
        "error: --num-bootstrap 5: must be at least 100, or 0 for no intervals"
    )
    assert fails_with(capsys, 2, weights[0], tmp_path, "--num-bootstrap", "0", "--compare-to", "x") == (
        "error: --num-bootstrap 0: --compare-to needs resamples for its intervals; use at least 100"
    )
    assert fails_with(capsys, 2, weights[0], tmp_path, "--compare-to-checkpoint-key", "student") == (
        "error: --compare-to-checkpoint-key is given without --compare-to; name the weights to compare to"
    )
    assert fails_with(capsys, 2, weights[0], tmp_path, train=None, val=None, needs_train=False) == (
        "error: evaluation.knn.val_dataset_path (--val-dataset) is not set; name images, e.g. ImageFolder:root=photos"
    )


def test_errors_leave_no_results(weights, tmp_path, capsys):
    def refuse(inputs):
        raise DatasetError("no labels")

    assert fails_with(capsys, 1, weights[0], tmp_path, fit_and_score=refuse) == "error: no labels"
    assert fails_with(capsys, 1, weights[0], tmp_path, "--compare-to", str(tmp_path / "none.pth")) == (
        f"error: {tmp_path}/none.pth: no such file of weights"
    )
    assert not (tmp_path / "results_eval_centre.json").exists()
    (tmp_path / "results_eval_centre.json").mkdir()
    assert "results_eval_centre.json" in fails_with(capsys, 1, weights[0], tmp_path)


def test_no_intervals_on_request(weights, tmp_path, capsys):
    assert run(weights[0], tmp_path, "--num-bootstrap", "0") == 0
    assert results(tmp_path)["intervals_95_pct"] == {} and "interval" not in capsys.readouterr().out


def run_on_ranks(weights, folder):
    code = run(weights, folder)
    return {"code": code, "top1_pct": results(Path(folder))["top1_pct"]}


@pytest.mark.dist
def test_two_processes_write_what_one_writes(weights, tmp_path):
    assert run(weights[0], tmp_path / "one") == 0
    found = run_distributed(run_on_ranks, args={"weights": weights[0], "folder": str(tmp_path / "two")})
    assert [rank["code"] for rank in found] == [0, 0]
    one, two = ({**results(tmp_path / name), "config_digest": None} for name in ("one", "two"))
    assert one == two
    files = [(tmp_path / name / "predictions_centre.csv").read_text() for name in ("one", "two")]
    assert files[0] == files[1]
