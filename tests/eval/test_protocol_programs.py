"""`eval/bbbc021.py` and `eval/protocols.py`, from images to result files."""

import csv
import json
from pathlib import Path

import pytest
from support.dist import launch
from support.evaluation import MODEL, SIZES, fails_with, write_tiny_backbone
from support.moa_screen import make_moa_screen

from dinov2.eval.bbbc021 import main as bbbc021
from dinov2.eval.protocols import main as protocols

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """A folder with images, weights, other weights, and a place for features."""
    folder = tmp_path_factory.mktemp("screen")
    make_moa_screen(folder / "cells", sites=1)
    for seed, name in enumerate(("w", "w0")):
        write_tiny_backbone(folder / f"{name}.pth", seed=seed, layerscale=1.0)
    return folder


def arguments(screen, out, *more, dataset=None):
    dataset = f"BBBC021:root='{screen}/cells'" if dataset is None else dataset
    fixed = ["--pretrained-weights", str(screen / "w.pth"), "--dataset", dataset, "--output-dir", str(out)]
    return [*fixed, "--features-dir", str(screen / "features"), "--num-workers", "0", *more, *MODEL, *SIZES]


def results(out, name):
    return json.loads((out / f"results_eval_{name}.json").read_text())


def test_bbbc021_reports_nsc_and_nscb_with_their_rules(screen, tmp_path, capsys):
    args = arguments(screen, tmp_path, "--normalize", "none", "--normalize", "pca:4", "--num-bootstrap", "100")
    assert bbbc021(args) == 0
    found = results(tmp_path, "bbbc021")
    of_nscb = found["protocols"]["nscb"]
    assert found["protocols"]["nsc"]["num_profiles"] == 8 and of_nscb["num_profiles"] == 6
    assert found["protocols"]["nsc"]["labels"] == [
        "Actin disruptors",
        "DNA damage",
        "Microtubule stabilizers",
        "Protein synthesis",
    ]
    assert of_nscb["labels_left_out"] == ["Protein synthesis"]
    assert "exclude=compound,batch" in of_nscb["protocol"] and "many=same" in of_nscb["protocol"]
    assert set(of_nscb["by_batch"]) == {"Week1", "Week2", "Week1 + Week2"}
    for prefix in ("nsc", "nscb", "nsc_pca_4", "nscb_pca_4"):
        assert 0 <= found[f"{prefix}_top1_pct"] <= 100 and 0 <= found[f"{prefix}_mean_per_compound_pct"] <= 100
    with (tmp_path / "predictions_bbbc021_nscb.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows][:2] == ["cytochalasin B 10", "epothilone B 0.3"]
    right = [row["nearest_target"] == row["target"] for row in rows]
    assert found["nscb_top1_pct"] == pytest.approx(100 * sum(right) / len(right))
    for row in rows:
        assert row["compound"] not in row["nearest"] and row["target"] != "DMSO"
    captured = capsys.readouterr()
    assert "nscb_pca_4" in captured.out
    assert (
        captured.err.count("1 labels (Protein synthesis) have no two profiles that differ in compound and batch") == 1
    )


def test_bbbc021_splits_taxol_and_counts_hopeless_mechanisms_if_asked_to(screen, tmp_path):
    assert bbbc021(arguments(screen, tmp_path, "--many", "split", "--unanswerable", "count")) == 0
    found = results(tmp_path, "bbbc021")
    of_nscb = found["protocols"]["nscb"]
    assert of_nscb["num_profiles"] == 8 and of_nscb["labels_left_out"] == []
    assert set(of_nscb["by_batch"]) == {"Week1", "Week2"}
    assert {"nscb_whole_top1_pct", "nscb_top1_pct"} <= set(found) and "nsc_whole_top1_pct" not in found


def test_a_comparison_with_other_weights(screen, tmp_path):
    args = arguments(screen, tmp_path, "--compare-to", str(screen / "w0.pth"), "--num-bootstrap", "100")
    assert bbbc021(args) == 0
    text = (tmp_path / "results_eval_bbbc021.json").read_text()
    assert "w0.pth" in text and "difference" in text


def test_protocols_scores_any_grouped_metadata(screen, tmp_path):
    args = arguments(
        screen,
        tmp_path,
        *("--protocol", "leave-one-group-out:column=plate:label=compound:k=3"),
        *("--protocol", "leave-one-group-out:column=plate:label=compound:classifier=logistic"),
    )
    assert protocols(args) == 0
    found = results(tmp_path, "protocols")
    assert list(found["protocols"]) == [
        "leave_one_group_out_column_plate_label_compound_k_3",
        "leave_one_group_out_column_plate_label_compound_classifier_logistic",
    ]
    for prefix, details in found["protocols"].items():
        assert details["num_profiles"] == 22 and len(details["by_plate"]) == 4
        assert f"{prefix}_top1_pct" in found and f"{prefix}_mean_per_plate_pct" in found


@pytest.mark.integration
@pytest.mark.dist
def test_two_processes_give_the_same(screen, tmp_path):
    assert bbbc021(arguments(screen, tmp_path / "one")) == 0
    done = launch([str(ROOT / "eval" / "bbbc021.py"), *arguments(screen, tmp_path / "two")])
    assert done.returncode == 0, done.stderr
    one, two = (results(tmp_path / name, "bbbc021") for name in ("one", "two"))
    assert one["protocols"] == two["protocols"] and one["nscb_top1_pct"] == two["nscb_top1_pct"]
    files = [(tmp_path / name / "predictions_bbbc021_nscb.csv").read_text() for name in ("one", "two")]
    assert files[0] == files[1]


def test_what_a_user_can_cause_is_one_sentence(screen, tmp_path, capsys):
    args = arguments(screen, tmp_path)
    assert fails_with(protocols, capsys, args, code=2) == (
        "error: --protocol is not given; name one, e.g. leave-one-group-out:column=plate"
    )
    assert fails_with(protocols, capsys, [*args, "--protocol", "nsc", "--protocol", "nsc"], code=2) == (
        "error: two protocols or normalisations are called nsc; give each once"
    )
    assert fails_with(bbbc021, capsys, [*args, "--normalize", "tvn"], code=2).startswith(
        "error: --normalize tvn: unknown step 'tvn'"
    )
    assert fails_with(bbbc021, capsys, [*args, "--pool", "patches"], code=2) == (
        "error: --pool patches has many vectors an image; choose one such as cls or cls+mean"
    )
    assert fails_with(bbbc021, capsys, [*args, "--test-dataset", "Digits:split=VAL"], code=2) == (
        "error: --test-dataset has no effect here: nothing is chosen that a test set would have to confirm"
    )
    assert fails_with(bbbc021, capsys, [*args, "--train-dataset", "Digits:split=TRAIN"], code=2) == (
        "error: --train-dataset has no effect here: the images of --dataset are compared with each other"
    )
    text = fails_with(protocols, capsys, [*args, "--protocol", "leave-one-group-out:column=patient"], code=1)
    assert "has no column 'patient', which protocol leave-one-group-out (exclude=patient) needs; its columns" in text
    treated = arguments(screen, tmp_path, dataset=f"BBBC021:root='{screen}/cells':controls=drop")
    text = fails_with(bbbc021, capsys, [*treated, "--normalize", "whiten"], code=1)
    assert "has no images of controls, but --normalize whiten is fitted on them and needs two" in text


@pytest.mark.parametrize("main", [bbbc021, protocols])
def test_help_tells_defaults(main, capsys):
    assert main(["--help"]) == 0
    assert "default: cls" in " ".join(capsys.readouterr().out.split())
