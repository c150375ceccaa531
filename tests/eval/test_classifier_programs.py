"""`eval/linear.py` and `eval/log_regression.py` on scikit-learn's digits."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.dist import launch
from support.evaluation import MODEL, write_tiny_backbone

from dinov2.eval.feature_files import open_feature_set
from dinov2.eval.linear import main as linear
from dinov2.eval.linear_head import load_linear_head
from dinov2.eval.log_regression import default_cs
from dinov2.eval.log_regression import main as log_regression

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["crops.global_crops_size=8", "crops.local_crops_size=8", "compute_precision.device=cpu"]
DATA = {"--train-dataset": "Digits:split=TRAIN", "--val-dataset": "Digits:split=VAL"}
FEW = ["--c-values", "0.1", "1e4", "10"]
SHORT = ["--n-last-blocks", "2", "1", "--learning-rates", "0.1", "1", "--epochs", "1", "--epoch-length", "8"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with weights and, from the first evaluation on, their features."""
    folder = tmp_path_factory.mktemp("shared")
    write_tiny_backbone(folder / "weights.pth", layerscale=1.0, image_size_px=8)
    return folder


def arguments(shared, out, *more, **datasets):
    given = DATA | {f"--{name.replace('_', '-')}": value for name, value in datasets.items()}
    sets = [text for pair in given.items() for text in pair]
    fixed = ["--pretrained-weights", str(shared / "weights.pth"), "--features-dir", str(shared / "features")]
    return [
        *fixed,
        *sets,
        "--output-dir",
        str(out),
        "--num-workers",
        "0",
        "--num-bootstrap",
        "0",
        *MODEL,
        *SIZES,
        *more,
    ]


def results(out, name):
    return json.loads((out / f"results_eval_{name}.json").read_text())


def last_error(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_the_default_grid_of_c_is_the_parents():
    cs = default_cs()
    assert len(cs) == 45 and cs[0] == pytest.approx(1e-6) and cs[-1] == pytest.approx(1e5)
    assert np.diff(np.log10(cs)) == pytest.approx(0.25)


def test_log_regression_chooses_c_and_saves_what_it_reports(shared, tmp_path, capsys):
    assert log_regression(arguments(shared, tmp_path, "--pool", "mean", *FEW)) == 0
    found = results(tmp_path, "log_regression")
    assert [entry["c"] for entry in found["sweep"]] == [0.1, 10, 1e4]
    scores = [entry["choosing_pct"] for entry in found["sweep"]]
    assert found["best_c"] == found["sweep"][scores.index(max(scores))]["c"] and found["has_converged"]
    assert found["top1_pct"] > 60  # chance is 10
    assert "of the 1198 training images, held out" in found["chosen_on"]
    assert "C chosen of 3 by " in capsys.readouterr().out
    head = load_linear_head(tmp_path / "classifier_log_regression.safetensors")
    assert head.pool == "mean" and head.weight.shape == (10, 48)
    predicted = pd.read_csv(tmp_path / "predictions_log_regression.csv", dtype=str)
    (index,) = (shared / "features").glob("Digits_split_VAL-mean-*.json")
    names = head.predict(open_feature_set(index.with_suffix(".safetensors")).values)
    assert names == predicted["predicted"].tolist()


def test_linear_chooses_a_classifier_and_saves_what_it_reports(shared, tmp_path, capsys):
    assert linear(arguments(shared, tmp_path, *SHORT)) == 0
    found = results(tmp_path, "linear")
    assert len(found["sweep"]) == 8 and found["total_steps"] == 8 and found["trained_on"] == "cached features"
    best = max(found["sweep"], key=lambda entry: entry["choosing_pct"])["classifier"]
    assert found["best_classifier"] == best and found["top1_pct"] > 20
    assert f"{best} chosen of 8 by " in capsys.readouterr().out
    assert load_linear_head(tmp_path / "classifier_linear.safetensors").pool == found["best_pool"]


def test_a_test_set_is_reported_and_val_chooses(shared, tmp_path):
    # what differs is the names alone, so that the report can be told apart
    sets = {"val_dataset": "Digits:split=VAL", "test_dataset": "Digits:split=val"}
    assert log_regression(arguments(shared, tmp_path, *FEW, **sets)) == 0
    assert results(tmp_path, "log_regression")["chosen_on"] == "599 images of Digits:split=VAL"
    other = {"val_dataset": "Digits:split=val"}
    args = [*arguments(shared, tmp_path / "other", *FEW, **other), "--finetune-dataset-str", "Digits:split=VAL"]
    assert log_regression(args) == 0
    one, two = (results(path, "log_regression") for path in (tmp_path, tmp_path / "other"))
    assert one["sweep"] == two["sweep"] and one["top1_pct"] == two["top1_pct"]


def test_one_value_of_c_needs_no_choice(shared, tmp_path):
    assert log_regression(arguments(shared, tmp_path, "--c-values", "1")) == 0
    found = results(tmp_path, "log_regression")
    assert found["best_c"] == 1 and found["sweep"] == []
    assert found["chosen_on"] == "nothing: one value of C is given"


def test_fits_cut_short_are_warned_about_once(shared, tmp_path, capsys):
    args = arguments(shared, tmp_path, "--pool", "mean", *FEW, "--max-train-iters", "3")
    assert log_regression(args) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "had not converged" in line]
    assert len(warnings) == 1
    assert "3 values of C, from 0.1 to 1e+04, had not converged after 3 rounds" in warnings[0]
    assert not results(tmp_path, "log_regression")["has_converged"]


def test_linear_goes_on_from_a_saved_state(shared, tmp_path, capsys):
    options = [*SHORT, "--features", "augmented", "--train-batch-size", "32", "--save-period-iterations", "3"]
    args = arguments(shared, tmp_path, *options)
    assert linear(args) == 0
    whole = results(tmp_path, "linear")
    assert whole["trained_on"] == "augmented features"
    capsys.readouterr()
    assert linear(args) == 0
    assert "goes on from step=8 of=8" in capsys.readouterr().err
    assert results(tmp_path, "linear")["sweep"] == whole["sweep"]
    assert linear([*args, "--no-resume"]) == 0
    assert "goes on from" not in capsys.readouterr().err
    assert results(tmp_path, "linear")["sweep"] == whole["sweep"]


@pytest.mark.integration
@pytest.mark.dist
@pytest.mark.parametrize(
    ("program", "name", "options"),
    [(linear, "linear", [*SHORT, "--features", "augmented"]), (log_regression, "log_regression", FEW)],
)
def test_programs_give_the_same_on_two_processes(program, name, options, shared, tmp_path):
    assert program(arguments(shared, tmp_path / "one", *options)) == 0
    done = launch([str(ROOT / "eval" / f"{name}.py"), *arguments(shared, tmp_path / "two", *options)])
    assert done.returncode == 0, done.stderr
    one, two = (results(tmp_path / folder, name) for folder in ("one", "two"))
    assert one["sweep"] == two["sweep"] and one["top1_pct"] == two["top1_pct"]


def test_a_grid_that_has_diverged_is_one_sentence(shared, tmp_path, capsys):
    assert linear(arguments(shared, tmp_path, *SHORT, "--learning-rates", "1e38")) == 1
    assert last_error(capsys).endswith("has grown beyond all numbers; give smaller --learning-rates")


def test_patches_are_refused(shared, tmp_path, capsys):
    assert log_regression(arguments(shared, tmp_path, "--pool", "patches")) == 2
    assert last_error(capsys) == "error: --pool patches has many vectors an image; choose one such as cls or cls+mean"


def test_bad_usage_is_one_sentence_and_code_2(shared, tmp_path, capsys):
    for program, options, sentence in (
        (log_regression, ["--c-values", "1", "0"], "--c-values 1 0: each must be above 0 and finite"),
        (log_regression, ["--max-train-iters", "0"], "--max-train-iters 0: must be at least 1"),
        (
            log_regression,
            ["--finetune-dataset-str", "A", "--test-dataset", "B"],
            "--finetune-dataset-str and --test-dataset say the same in two ways; give one of them",
        ),
        (linear, ["--learning-rates", "nan"], "--learning-rates nan: each must be above 0 and finite"),
        (linear, ["--epochs", "0"], "--epochs 0: must be at least 1"),
        (linear, ["--n-last-blocks", "0"], "--n-last-blocks 0: each must be at least 1"),
        (linear, [], "pool 'last4+mean': the backbone has only 2 blocks"),
    ):
        assert program(arguments(shared, tmp_path, *options)) == 2
        assert last_error(capsys) == f"error: {sentence}"


def test_help_tells_defaults(capsys):
    for program, parts in (
        (linear, ("default: cached", "default: 13 from 1e-5 to 0.1", "default: 1 4", "default: 128")),
        (log_regression, ("default: 45 from 1e-6 to 1e5", "default: 1000", "default: float32")),
    ):
        assert program(["--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert all(part in text for part in parts), text
