"""Runs that go wrong, from weights that are good: each ends with its reason, and the best teacher is kept."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.training import metrics_of, train, train_in_turns

from dinov2.data import DataAugmentationDINO

KNN = tuple(f"evaluation.knn.{part}_dataset_path=Digits:split={part.upper()}" for part in ("train", "val"))
EVALUATED = (
    "evaluation.at_start=true",
    "evaluation.eval_period_iterations=2",
    "evaluation.health.num_images=40",
    "evaluation.knn.nb_knn=[10]",
)
QUICK = ("guard_rails.window_steps=2", "guard_rails.patience_steps=2", "logging.period_steps=1")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A teacher file of the tiny network."""
    folder = tmp_path_factory.mktemp("weights")
    assert train(folder, *EVALUATED, "train.max_steps=1", "student.layerscale=1") == 0
    return folder / "eval" / "start" / "teacher_checkpoint.pth"


@pytest.fixture
def adapt(tmp_path, weights, capsys):
    """Adapt the weights in `tmp_path/run`; returns the exit code and the last line of errors."""

    def adapted(*options):
        given = (f"student.pretrained_weights={weights}", "student.layerscale=1", *QUICK)
        capsys.readouterr()
        code = train(tmp_path / "run", *given, *options)
        return code, (capsys.readouterr().err.splitlines() or [""])[-1].removeprefix("error: ")

    return adapted


def kept(folder):
    """Return what `best.json` says, having seen that the file beside it is the teacher of that evaluation."""
    best = json.loads((folder / "best.json").read_text())
    teacher = torch.load(folder / "best_teacher.pth", weights_only=True)["teacher"]
    source = torch.load(folder / "eval" / best["evaluation"] / "teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert teacher.keys() == source.keys() and all(torch.equal(teacher[name], source[name]) for name in teacher)
    return best


def test_a_teacher_that_is_the_student(tmp_path, adapt):
    without_momentum = ("teacher.momentum_teacher=0", "teacher.final_momentum_teacher=0")
    code, sentence = adapt(*EVALUATED, *without_momentum, "evaluation.eval_period_iterations=1")
    assert code == 1 and sentence.startswith("iteration 2: the teacher's momentum was 0 in the last 2 steps")
    assert len(metrics_of(tmp_path / "run")) == 3
    assert kept(tmp_path / "run")["evaluation"] == "start"  # without labels nobody knows since when it went wrong


def test_a_run_from_random_numbers_keeps_its_latest_teacher(tmp_path, caplog):
    stopped = ("guard_rails.action=stop", "teacher.momentum_teacher=0", "teacher.final_momentum_teacher=0")
    assert train(tmp_path, *QUICK, *EVALUATED, *stopped) == 1
    assert kept(tmp_path)["evaluation"] == "training_1"
    assert "holds the teacher of iteration 1: the latest: " in caplog.text


def test_without_labels_the_latest_teacher_of_a_sound_run_is_kept(tmp_path, adapt, caplog):
    assert adapt(*EVALUATED, "evaluation.stop_below_start=true", "train.max_steps=4")[0] == 0
    assert kept(tmp_path / "run")["evaluation"] == "training_3"
    assert caplog.text.count("evaluation.stop_below_start has no score to act on") == 1


def test_images_of_a_single_colour(tmp_path, adapt):
    (tmp_path / "blank").mkdir()
    for number in range(16):
        Image.fromarray(np.full((40, 40), 15 * number, dtype=np.uint8)).save(tmp_path / "blank" / f"{number}.png")
    code, sentence = adapt(f"train.dataset_path=ImageFolder:root={tmp_path}/blank", *EVALUATED)
    assert code == 1
    assert sentence.startswith(
        "before the first step: 100 % of 16 images of train.dataset_path that were looked at are of a single colour"
    )
    assert kept(tmp_path / "run")["mode"] == "latest"


def test_copies_of_one_image(tmp_path, adapt):
    (tmp_path / "copies").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    for number in range(16):
        Image.fromarray(pixels).save(tmp_path / "copies" / f"{number}.png")
    code, sentence = adapt(f"train.dataset_path=ImageFolder:root={tmp_path}/copies", *EVALUATED)
    assert code == 1
    assert sentence == (
        "before the first step: 100 % of 16 images of train.dataset_path that were looked at are copies of each other: "
        "there is nothing to tell apart; look at them (run/preview.py, run/check_data.py); if they are as they should "
        "be, guard_rails.action=warn trains on them"
    )
    assert kept(tmp_path / "run")["evaluation"] == "start"
    assert not metrics_of(tmp_path / "run")


def test_batches_of_copies(tmp_path, adapt, monkeypatch):
    finish = DataAugmentationDINO.finish

    def repeated(self, crops, seeds):
        batch = finish(self, crops, seeds)
        globals_ = batch["collated_global_crops"]
        globals_.copy_(globals_[:1].expand_as(globals_))
        return batch

    monkeypatch.setattr(DataAugmentationDINO, "finish", repeated)
    code, sentence = adapt(*EVALUATED)
    assert code == 1
    assert sentence.startswith("iteration 2: 100 % of the crops in the last 2 steps were those of another image")


def test_a_run_that_is_only_warned_goes_on(tmp_path, adapt, caplog):
    code, _ = adapt("teacher.momentum_teacher=0", "guard_rails.action=warn", *EVALUATED)
    assert code == 0 and caplog.text.count("the teacher's momentum was") == 1
    assert len(metrics_of(tmp_path / "run")) == 6


def test_a_gain_is_reported_with_its_interval_and_the_best_teacher_is_named(tmp_path, adapt, caplog):
    code, _ = adapt(*EVALUATED, *KNN, "guard_rails.action=off", "optim.base_lr=0.05", "train.max_steps=4")
    assert code == 0
    results = {
        name: json.loads((tmp_path / "run" / "eval" / name / "results_eval_knn.json").read_text())
        for name in ("start", "training_1", "training_3")
    }
    top1 = {name: found["knn_top1_pct"] for name, found in results.items()}
    for name, found in results.items():
        gain = found.get("over_start")
        if name == "start":
            assert gain is None
            continue
        assert gain["difference_points"] == pytest.approx(top1[name] - top1["start"])
        assert gain["low_points"] <= gain["difference_points"] <= gain["high_points"]
        assert f"evaluation={name}: {gain['difference_points']:+.1f} points over start, 95 % interval " in caplog.text
    best = kept(tmp_path / "run")
    assert best["value"] == max(top1.values()) == top1[best["evaluation"]]
    assert f"{tmp_path}/run/best_teacher.pth holds " in caplog.text


def test_a_run_that_stays_below_its_start_is_ended_and_its_start_is_the_best(tmp_path, adapt, monkeypatch):
    worse = ("evaluation.stop_below_start=true", "evaluation.stop_patience=2", "evaluation.stop_margin=0")
    falling = iter([3.0, 2.0, 1.0])

    def scored(values, **settings):
        return type("Health", (), {"scores": {name: 1.0 for name in ("rankme", "effective_rank", "uniformity")}})()

    monkeypatch.setattr("dinov2.eval.health_online.measure", scored)
    monkeypatch.setattr("dinov2.eval.health_online.alignment", lambda *views: next(falling))
    code, sentence = adapt(*EVALUATED, *worse, "checkpointing.save_best=alignment")
    assert code == 1
    assert sentence.startswith("iteration 3: alignment=1.00 is worse than 3.00 of the start, by more than")
    assert kept(tmp_path / "run")["evaluation"] == "start"


@pytest.mark.integration
@pytest.mark.dist
def test_all_ranks_end_together(tmp_path, weights):
    options = (f"student.pretrained_weights={weights}", "student.layerscale=1", *QUICK)
    with pytest.raises(Exception, match="the teacher's momentum was 0"):
        train_in_turns([(tmp_path, (*options, "train.batch_size_per_gpu=2", "teacher.momentum_teacher=0"))])
    assert len(metrics_of(tmp_path)) == 3
