"""Label-free measures beside a run: their files and lines, with and without k-NN, and after a restart."""

import json
import shutil

import pytest
from support.training import metrics_of, train, train_on_ranks

from dinov2.train.evaluation import FEATURES_NAME

NAMES = ["rankme", "effective_rank", "uniformity", "alignment"]
OVERLAP = "nn_overlap_with_start_pct"
OPTIONS = (
    "evaluation.at_start=true",
    "evaluation.eval_period_iterations=2",
    "evaluation.health.num_images=200",
    "train.max_steps=4",
    "optim.base_lr=0.05",
)
KNN = tuple(f"evaluation.knn.{part}_dataset_path=Digits:split=VAL" for part in ("train", "val"))


def health_of(folder, name):
    return json.loads((folder / "eval" / name / "results_eval_health.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, *OPTIONS) == 0
    return folder


def test_measures_are_written_and_recorded_without_k_nn(whole):
    assert list(health_of(whole, "start")) == NAMES
    rows = metrics_of(whole)
    for step in (1, 3):
        found = health_of(whole, f"training_{step}")
        assert list(found) == [*NAMES, OVERLAP] and 0 < found[OVERLAP] < 100
        assert {name: rows[step][name] for name in found} == pytest.approx(found)
        assert sorted(path.name for path in (whole / f"eval/training_{step}").iterdir()) == [
            "results_eval_health.json",
            "teacher_checkpoint.pth",
        ]
    assert health_of(whole, "training_1")[OVERLAP] > health_of(whole, "training_3")[OVERLAP]
    assert "rankme" not in rows[0]


def test_a_run_that_goes_on_still_knows_its_start(tmp_path, whole):
    assert train(tmp_path, *OPTIONS, "train.max_steps=2") == 0
    assert train(tmp_path, *OPTIONS) == 0
    assert health_of(tmp_path, "training_3") == pytest.approx(health_of(whole, "training_3"))
    assert train(tmp_path, *OPTIONS, "--eval-only") == 0
    assert health_of(tmp_path, "manual_3") == pytest.approx(health_of(whole, "training_3"))


def test_beside_k_nn_the_images_are_those_that_vote(tmp_path):
    assert train(tmp_path, *OPTIONS, *KNN, "train.max_steps=1") == 0
    found = health_of(tmp_path, "training_0")
    row = metrics_of(tmp_path)[0]
    assert {name: row[name] for name in found} == pytest.approx(found) and row["knn_top1_pct"] > 0
    start, knn = (
        json.loads((tmp_path / f"eval/{name}/results_eval_knn.json").read_text()) for name in ("start", "training_0")
    )
    assert knn.pop("over_start")["difference_points"] == pytest.approx(row["knn_top1_pct"] - start["knn_top1_pct"])
    assert all(name.startswith("knn") and name.endswith("_top1_pct") for name in knn)
    images = KNN[0].partition("=")[2]
    weights = f"student.pretrained_weights={tmp_path}/eval/start/teacher_checkpoint.pth"
    assert train(tmp_path / "same images", *OPTIONS, f"train.dataset_path={images}", weights, "train.max_steps=1") == 0
    assert health_of(tmp_path / "same images", "start") == pytest.approx(health_of(tmp_path, "start"))


def test_it_can_be_turned_off_and_a_new_run_removes_what_the_old_one_measured(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    assert (tmp_path / "run/eval/start" / FEATURES_NAME).is_file()
    off = ("evaluation.health.num_images=0", "evaluation.eval_period_iterations=1", "train.max_steps=1")
    assert train(tmp_path / "run", *OPTIONS, *off, "--no-resume", "--overwrite") == 0
    for name in ("start", "training_0"):
        assert [path.name for path in (tmp_path / "run/eval" / name).iterdir()] == ["teacher_checkpoint.pth"]
    assert len(list((tmp_path / "run/eval").iterdir())) == 2
    assert not set(NAMES) & set(metrics_of(tmp_path / "run")[0])


@pytest.mark.integration
@pytest.mark.dist
def test_two_ranks_measure_what_one_measures(tmp_path, whole):
    done = train_on_ranks(tmp_path, *OPTIONS, "train.max_steps=2", "train.batch_size_per_gpu=6")
    assert done.returncode == 0, done.stderr
    for name in ("start", "training_1"):
        one, two = health_of(whole, name), health_of(tmp_path, name)
        # after steps on two ranks the weights differ by rounding
        assert two == pytest.approx(one, rel=1e-3, abs=0.5 if name == "training_1" else 1e-6)
