"""`best_teacher.pth` and `best.json`: the best teacher of a run so far, the start's where nothing was better."""

import json

import pytest

from dinov2.configs import load_config
from dinov2.train.best_teacher import BestRule, BestTeacher

KNN = tuple(f"evaluation.knn.{part}_dataset_path=Digits:split=VAL" for part in ("train", "val"))
WEIGHTS = "student.pretrained_weights=w.pth"


@pytest.fixture
def note(tmp_path):
    """Note an evaluation, whose weights are a file that holds its name; returns the kept file's content."""

    def noted(best, name, scores, start=None):
        weights = tmp_path / "eval" / name / "teacher_checkpoint.pth"
        weights.parent.mkdir(parents=True)
        weights.write_text(name)
        best.note(name, scores, weights=weights, start=start)
        kept = tmp_path / "best_teacher.pth"
        return kept.read_text() if kept.exists() else None

    return noted


def best_of(folder, *, score="accuracy", mode="max", measured_on=""):
    return BestTeacher(folder, BestRule(score=score, mode=mode, measured_on=measured_on))


def test_the_best_evaluation_is_kept_and_the_first_of_equals(tmp_path, note):
    best = best_of(tmp_path)
    kept = [note(best, name, {"accuracy": value}) for name, value in (("start", 5), ("training_9", 7))]
    kept += [note(best, name, {"accuracy": value}) for name, value in (("training_19", 7), ("training_29", 6))]
    assert kept == ["start", "training_9", "training_9", "training_9"]
    written = json.loads((tmp_path / "best.json").read_text())
    assert (written["evaluation"], written["iteration"], written["value"]) == ("training_9", 9, 7)
    assert (written["score"], written["start_value"]) == ("accuracy", 5)
    assert best.sentence() == (
        f"{tmp_path}/best_teacher.pth holds the teacher of iteration 9: accuracy=7.00, 5.00 at the start"
    )


def test_where_nothing_is_better_the_best_teacher_is_the_start(tmp_path, note):
    best = best_of(tmp_path, score="loss", mode="min")
    assert note(best, "start", {"loss": 1.0}) == note(best, "training_9", {"loss": 1.5}) == "start"
    assert best.sentence() == (
        f"{tmp_path}/best_teacher.pth holds the weights that the run started from: no evaluation was better than "
        f"loss=1.00 of the start"
    )


def test_without_an_evaluation_there_is_none_and_that_is_said(tmp_path, note):
    best = best_of(tmp_path)
    assert (
        note(best, "training_0", {"rankme": 3.0}) is None
        and note(best, "training_1", {"accuracy": float("nan")}) is None
    )
    assert best.sentence() == (
        "there is no best_teacher.pth: no evaluation gave accuracy; see evaluation.at_start and "
        "evaluation.eval_period_iterations"
    )


def test_a_run_that_goes_on_remembers_unless_it_is_measured_otherwise(tmp_path, note):
    assert note(best_of(tmp_path), "training_3", {"accuracy": 7.0}) == "training_3"
    assert best_of(tmp_path).sentence().endswith("iteration 3: accuracy=7.00, the start was not evaluated")
    assert note(best_of(tmp_path), "training_4", {"accuracy": 6.0}) == "training_3"
    assert note(best_of(tmp_path, measured_on="other images"), "training_5", {"accuracy": 6.0}) == "training_5"


def test_a_start_begins_anew(tmp_path, note):
    note(best_of(tmp_path), "training_3", {"accuracy": 7.0})
    assert note(best_of(tmp_path), "start", {"accuracy": 5.0}) == "start"


def test_without_labels_the_latest_sound_teacher_is_kept_and_said_to_be_no_more(tmp_path, note):
    best = BestTeacher(tmp_path, BestRule.from_config(load_config(None, [WEIGHTS])))
    start = {"rankme": 50.0}
    assert note(best, "start", start, start) == "start"
    assert best.sentence() == (
        f"{tmp_path}/best_teacher.pth holds the weights that the run started from: no evaluation is known to be sound"
    )
    later = [(9, 48.0, 90.0), (19, 30.0, 60.0), (29, 20.0, 60.0), (39, 60.0, 5.0)]  # few directions, few neighbours
    kept = [
        note(best, f"training_{step}", {"rankme": rank, "nn_overlap_with_start_pct": overlap}, start)
        for step, rank, overlap in later
    ]
    assert kept == ["training_9", "training_19", "training_19", "training_19"]
    assert best.sentence() == (
        f"{tmp_path}/best_teacher.pth holds the teacher of iteration 19: the latest that kept enough of the start: "
        f"nn_overlap_with_start_pct=60.00, 100.00 at the start; without labels nobody can tell if it is better"
    )


def test_without_labels_and_weights_there_is_nothing_to_keep(tmp_path, note):
    best = BestTeacher(tmp_path, BestRule.from_config(load_config(None)))
    start = {"rankme": 50.0}
    note(best, "start", start, start)
    assert note(best, "training_3", {"rankme": 5.0, "nn_overlap_with_start_pct": 3.0}, start) == "training_3"


def test_which_score_chooses():
    chosen = "checkpointing.save_best=alignment"
    rules = [BestRule.from_config(load_config(None, options)) for options in ((), KNN, (*KNN, chosen))]
    assert [rule.score for rule in rules] == ["nn_overlap_with_start_pct", "knn_top1_pct", "alignment"]
    same = BestRule.from_config(load_config(None, [*KNN, "evaluation.eval_period_iterations=7"]))
    assert same == rules[1] and rules[0].measured_on != rules[1].measured_on


def test_a_disk_without_second_names_gets_a_copy(tmp_path, note, monkeypatch):
    monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(OSError("not supported")))
    assert note(best_of(tmp_path), "start", {"accuracy": 5.0}) == "start"
