"""`eval/health.py` on scikit-learn's digits: measures, files, comparison, bad usage."""

import csv
import json

import pytest
from support.evaluation import MODEL, SIZES, fails_with, write_tiny_backbone

from dinov2.eval.health import main


@pytest.fixture
def weights(tmp_path):
    return [str(write_tiny_backbone(tmp_path / f"{seed}.pth", seed=seed, layerscale=1.0)) for seed in (0, 1)]


def arguments(weights, tmp_path, *more):
    fixed = ["--pretrained-weights", weights, "--output-dir", str(tmp_path / "out"), "--num-workers", "0"]
    return [*fixed, "--dataset", "Digits:split=VAL", *more, *MODEL, *SIZES]


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results_eval_health.json").read_text())


def test_measures_of_one_backbone_and_what_two_have_in_common(weights, tmp_path, capsys):
    some = ["--num-images", "200", "--num-alignment-images", "40", "--duplicate-cosine", "0.999"]
    assert main(arguments(weights[0], tmp_path, *some)) == 0
    alone = results(tmp_path)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "features of 200 of 599 images of Digits:split=VAL, 48 features, pool cls"
    assert "is learned from" not in captured.err
    assert (alone["n_images"], alone["n_dataset"], alone["n_alignment_images"]) == (200, 599, 40)
    assert 1 < alone["rankme"] < alone["effective_rank"] < 48 and "nn_overlap_pct" not in alone
    assert -8 < alone["uniformity"] < 0 < alone["alignment"] < 2
    assert alone["feature_std"] ** 2 == pytest.approx(1 - alone["mean_cosine"], rel=0.02)
    rows = list(csv.DictReader((tmp_path / "out" / "duplicates_health.csv").open()))
    assert len(rows) == alone["n_duplicate_pairs"] > 0 and rows[0]["first"].startswith("digit ")
    cosines = [float(row["cosine"]) for row in rows]
    assert cosines == sorted(cosines, reverse=True) and min(cosines) >= 0.999
    assert (tmp_path / "out" / "spectrum_health.png").stat().st_size > 5000

    assert main(arguments(weights[0], tmp_path, *some, "--compare-to", weights[1])) == 0
    compared = results(tmp_path)
    assert 5 < compared.pop("nn_overlap_pct") < 90
    assert {name: compared[name] for name in alone if isinstance(alone[name], float)} == {
        name: value for name, value in alone.items() if isinstance(value, float)
    }
    captured = capsys.readouterr()
    assert "features of Digits:split=VAL are taken from" in captured.err
    own, other = captured.out.split(f"compared to {weights[1]}\n")
    assert f"RankMe  {alone['rankme']:>9.4f}" in own and "see duplicates_health.csv" in own
    assert f"RankMe  {compared['compare_to']['scores']['rankme']:>9.4f}" in other and ".csv" not in other
    assert main(arguments(weights[0], tmp_path, *some, "--compare-to", weights[0])) == 0
    assert results(tmp_path)["nn_overlap_pct"] == 100


def test_features_that_hardly_differ_are_no_duplicates(weights, tmp_path, capsys):
    assert main(arguments(weights[0], tmp_path, "--duplicate-cosine", "0.5", "--num-alignment-images", "0")) == 0
    assert "100.0 % of all pairs of images have a cosine of at least 0.5: these are no dupl" in capsys.readouterr().err
    assert len((tmp_path / "out" / "duplicates_health.csv").read_text().splitlines()) == 1001
    assert "alignment" not in results(tmp_path)


def test_bad_usage_is_one_sentence_and_code_2(weights, tmp_path, capsys):
    for options, sentence in (
        (["--num-images", "1"], "error: --num-images 1: must be at least 2, or 0 for all"),
        (["--num-alignment-images", "-1"], "error: --num-alignment-images -1: must be at least 0"),
        (["--duplicate-cosine", "1.5"], "error: --duplicate-cosine 1.5: must be above -1 and at most 1"),
        (["--num-neighbours", "0"], "error: --num-neighbours 0: must be at least 1"),
    ):
        assert fails_with(main, capsys, arguments(weights[0], tmp_path, *options), code=2) == sentence
    for options in (["--pool", "patches"], ["--train-dataset", "Digits:split=TRAIN"], ["--pool", "middle"]):
        assert fails_with(main, capsys, arguments(weights[0], tmp_path, *options), code=2).startswith("error: ")
