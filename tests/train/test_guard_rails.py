"""Guard rails: what is out of bounds warns once, then ends the run with the reason; healthy runs hear nothing."""

import json
import logging
from dataclasses import replace

import pytest
import torch

from dinov2.configs import load_config
from dinov2.configs.adaptation_sections import GuardRailsConfig
from dinov2.errors import TrainingError
from dinov2.train.best_teacher import BestRule
from dinov2.train.guard_rails import BelowStart, GuardRails

LIMITS = GuardRailsConfig(window_steps=2, patience_steps=3)
HEALTHY = {
    "total_loss": 10.0,
    "blank_pct": 2.0,
    "copies_pct": 5.0,
    "mom": 0.99,
    "lr": 5e-3,
    "feature_std": 0.6,
    "student_feature_std": 0.6,
    "target_information": 0.8,
}
START = {"knn_top1_pct": 80.0, "rankme": 100.0}
ADVICE = "the learning rate is the usual cause (lr=0.005 now): lower optim.base_lr, or lengthen optim.warmup_epochs"


def guard(limits=LIMITS, *, stops=True, start=START, is_evaluated=True, below_start=None):
    return GuardRails(
        limits,
        stops=stops,
        has_weights=True,
        start_scores=start,
        is_evaluated=is_evaluated,
        below_start=below_start,
    )


def steps_of(*changes, first=0):
    return [(first + number, HEALTHY | change) for number, change in enumerate(changes)]


def run(rails, *changes):
    rails.note_steps(steps_of(*changes))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"blank_pct": 98.0},
            "98 % of the crops in the last 2 steps were of a single colour: there is nothing to learn from; look at "
            "the images of train.dataset_path (run/preview.py, run/check_data.py)",
        ),
        (
            {"copies_pct": 100.0},
            "100 % of the crops in the last 2 steps were those of another image of the same batch, too: the batches "
            "are made of copies; look for duplicates in train.dataset_path (run/check_data.py)",
        ),
        (
            {"mom": 0.0},
            "the teacher's momentum was 0 in the last 2 steps, so that the teacher is little but the student and "
            "nothing keeps both from collapsing; raise teacher.momentum_teacher (schedules.momentum), to 0.99 or more",
        ),
    ],
)
def test_what_is_wrong_from_the_first_step_ends_the_run(change, sentence, caplog):
    with pytest.raises(TrainingError) as caught:
        run(guard(), *[change] * 10)
    assert str(caught.value) == f"iteration 3: {sentence}"  # a window of 2, and 3 in a row
    assert [record.getMessage() for record in caplog.records] == [f"iteration 1: {sentence}"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"student_feature_std": 0.1},
            "the student's features collapse, all images begin to look alike (student_feature_std=0.1 in the last 2 "
            "steps, 0.6 before)",
        ),
        (
            {"feature_std": 0.1},
            "the teacher's features collapse, all images begin to look alike (feature_std=0.1 in the last 2 steps, 0.6 "
            "before)",
        ),
        (
            {"target_information": 0.02},
            "the teacher's targets hardly depend on the image any more (target_information=0.02 nats in the last 2 "
            "steps, 0.8 before): features or heads collapse",
        ),
    ],
)
def test_what_was_better_before_ends_the_run(change, sentence):
    with pytest.raises(TrainingError) as caught:
        run(guard(is_evaluated=False), *[{}] * 5, *[change] * 10)
    assert str(caught.value) == f"iteration 8: {sentence}; {ADVICE}"


EMPTY_TARGETS = [{}] * 5 + [{"target_information": 0.02}] * 10


def test_where_evaluations_follow_empty_targets_alone_only_warn(caplog):
    rails = guard()
    run(rails, *EMPTY_TARGETS)
    rails.note_scores(14, {"knn_top1_pct": 79.0, "rankme": 90.0})
    assert [record.getMessage() for record in caplog.records] == [
        "iteration 6: the teacher's targets hardly depend on the image any more (target_information=0.02 nats in the "
        "last 2 steps, 0.8 before): nothing is learned from them; evaluations decide whether features suffer. Images "
        f"whose crops say little of each other (fabric) have no better ones; elsewhere {ADVICE}"
    ]


def test_with_empty_targets_a_single_bad_evaluation_ends_the_run():
    rails = guard()
    run(rails, *EMPTY_TARGETS)
    with pytest.raises(TrainingError, match=r"^iteration 14: the features lost most of their directions: rankme=9"):
        rails.note_scores(14, {"rankme": 9.0})


def test_once_targets_say_something_again_a_bad_evaluation_only_warns(caplog):
    rails = guard()
    run(rails, *EMPTY_TARGETS, {})
    rails.note_scores(15, {"rankme": 9.0})
    assert "iteration 15: the features lost most of their directions" in caplog.text


def test_healthy_steps_and_short_troubles_end_nothing(caplog):
    rails = guard()
    run(rails, *[{}] * 20, *[{"feature_std": 0.0}] * 3, *[{}] * 20, *[{"feature_std": 0.0}] * 3, *[{}] * 5)
    assert len(caplog.records) == 1  # a cause warns once


def some_images(num=16):
    return torch.randn(num, 3, 14, 14, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (
            torch.ones(16, 3, 14, 14),
            "100 % of 16 images of train.dataset_path that were looked at are of a single colour",
        ),
        (
            some_images()[:1].expand(16, -1, -1, -1),
            "100 % of 16 images of train.dataset_path that were looked at are copies",
        ),
    ],
)
def test_images_that_teach_nothing_end_a_run_before_its_first_step(images, sentence, caplog):
    with pytest.raises(TrainingError, match=f"^before the first step: {sentence}"):
        guard().note_images(images)
    guard(stops=False).note_images(images)
    assert len(caplog.records) == 1 and sentence in caplog.text


def test_images_of_which_some_are_copies_or_blank_are_fine(caplog):
    images = some_images()
    images[:4], images[4:8] = images[8:12], 0
    guard().note_images(images)
    guard().note_images(images[:1])
    assert not caplog.records


def test_only_warning_and_watching_nothing(caplog):
    run(guard(stops=False), *[{"mom": 0.0}] * 20)
    assert len(caplog.records) == 1
    run(guard(replace(LIMITS, action="off")), *[{"mom": 0.0}] * 20)
    guard(replace(LIMITS, action="off")).note_scores(1, {"rankme": 1.0})
    assert len(caplog.records) == 1


def test_steps_that_are_not_finite_are_left_to_others():
    nan = dict.fromkeys(HEALTHY, float("nan"))
    rails = guard()
    run(rails, *[{}] * 3, *[nan] * 5, *[{}] * 3)


def test_another_stage_has_other_features():
    first, second = {"stage": 1.0}, {"stage": 2.0, "feature_std": 0.1}
    run(guard(), *[first] * 5, *[second] * 20)


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ({"rankme": 40.0}, f"the features lost most of their directions: rankme=40.0, 100.0 at the start; {ADVICE}"),
        ({"knn_top1_pct": 60.0}, f"knn_top1_pct=60.0 is 20.0 points below the start; {ADVICE}"),
        (
            {"nn_overlap_with_start_pct": 8.0},
            f"the features are others than those of the start, and no score is better for it: 8 % of the nearest "
            f"neighbours are kept (nn_overlap_with_start_pct); {ADVICE}",
        ),
    ],
)
def test_evaluations_far_from_the_start_end_the_run(scores, sentence, caplog):
    rails = guard()
    run(rails, {})
    rails.note_scores(9, scores)
    assert [record.getMessage() for record in caplog.records] == [f"iteration 9: {sentence}"]
    with pytest.raises(TrainingError) as caught:
        rails.note_scores(19, scores)
    assert str(caught.value) == f"iteration 19: {sentence}"


def test_other_neighbours_are_welcome_where_k_nn_is_better():
    rails = guard()
    for step in range(5):
        rails.note_scores(step, {"knn_top1_pct": 85.0, "rankme": 60.0, "nn_overlap_with_start_pct": 5.0})


@pytest.mark.parametrize(
    ("rule", "worse", "fine", "sentence"),
    [
        (
            BestRule(score="knn_top1_pct"),
            78.0,
            79.5,
            "knn_top1_pct=78.00 is worse than 80.00 of the start, by more than evaluation.stop_margin=1 points",
        ),
        (
            BestRule(score="rankme"),
            98.0,
            99.5,
            "rankme=98.00 is worse than 100.00 of the start, by more than evaluation.stop_margin=1 percent",
        ),
        (
            BestRule(score="alignment", mode="min"),
            0.52,
            0.502,
            "alignment=0.52 is worse than 0.50 of the start, by more than evaluation.stop_margin=1 percent",
        ),
    ],
)
def test_a_run_that_stays_below_its_start_ends(rule, worse, fine, sentence):
    limits = replace(LIMITS, action="off")  # a wish of its own, whatever the guard rails do
    below = BelowStart(rule=rule, patience=3, margin=1.0)
    rails = guard(limits, stops=False, start=START | {"alignment": 0.5}, below_start=below)
    for step, value in enumerate([worse, worse, fine, worse, worse]):
        rails.note_scores(step, {rule.score: value})
    with pytest.raises(TrainingError) as caught:
        rails.note_scores(5, {rule.score: worse})
    assert str(caught.value).startswith(f"iteration 5: {sentence}; the weights were better before: ")


def test_a_run_that_goes_on_is_judged_as_if_it_had_never_stopped(tmp_path, caplog):
    steps = steps_of(*[{}] * 5, *[{"feature_std": 0.1}] * 10)
    path = tmp_path / "training_metrics.json"
    path.write_text("".join(json.dumps({"iteration": step} | values) + "\n" for step, values in steps))
    for resumed_at in range(9):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            rails = guard().replay(path, before_step=resumed_at)
            assert not caplog.records
        with pytest.raises(TrainingError, match="iteration 8: the teacher's features collapse"):
            rails.note_steps(steps[resumed_at:])


def test_an_evaluation_that_was_judged_before_a_stop_does_not_count_twice(tmp_path):
    below, healthy = {"knn_top1_pct": 60.0, "rankme": 100.0}, {"knn_top1_pct": 80.0, "rankme": 100.0}
    path = tmp_path / "training_metrics.json"
    path.write_text(
        "".join(json.dumps({"iteration": step, **scores}) + "\n" for step, scores in ((0, healthy), (1, below)))
    )
    rails = guard().replay(path, before_step=2)
    rails.note_scores(1, below)  # a run that goes on notes the scores of its last step once more
    with pytest.raises(TrainingError, match="^iteration 3: knn_top1_pct=60.0 is 20.0 points below the start"):
        rails.note_scores(3, below)  # 2 in a row


def test_a_run_from_weights_stops_and_one_from_random_numbers_warns():
    weights = "student.pretrained_weights=weights.pth"
    cases = {
        (): False,
        (weights,): True,
        ("MODEL.WEIGHTS=weights.pth",): True,
        (weights, "guard_rails.action=warn"): False,
        ("guard_rails.action=stop",): True,
    }
    for options, stops in cases.items():
        assert GuardRails.from_config(load_config(None, options), start_scores={}).stops is stops
