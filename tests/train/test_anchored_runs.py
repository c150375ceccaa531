"""Runs held near a frozen network: resuming, other processes, other starts, and DINOv3's files with Gram anchoring."""

from pathlib import Path

import pytest
import torch
from support.training import (
    ELASTIC_RUN,
    assert_same_state,
    metrics_of,
    train,
    train_in_turns,
    values_but_timing,
)

PARENTS = Path(__file__).parents[1] / "data" / "parent_configs" / "dinov3" / "train"
LOUD = ("optim.base_lr=0.1", "teacher.momentum_teacher=0.5")
ANCHORS = ("anchor.cls_weight=0.5", "anchor.patch_weight=0.5", "anchor.max_tokens=6")
GRAM = ("gram.use_loss=true", "gram.img_level=true", "gram.max_tokens=8")
SIZES = ("crops.gram_teacher_crops_size=48", "crops.gram_teacher_no_distortions=true")
LOSSES = ("gram_loss", "anchor_cls_loss", "anchor_patch_loss")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights that two runs start from: the teachers of a run after one step and after two."""
    folder = tmp_path_factory.mktemp("start")
    evaluated = ("evaluation.eval_period_iterations=1", "evaluation.health.num_images=0")
    assert train(folder, *LOUD, "train.max_steps=2", *evaluated) == 0
    return [folder / "eval" / f"training_{step}" / "teacher_checkpoint.pth" for step in (0, 1)]


def start_from(path):
    return f"student.pretrained_weights={path}"


def model_of(folder, step):
    return torch.load(folder / f"model_{step:07d}.rank_0.pth", weights_only=True)["model"]


def part(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def is_equal(one, two):
    assert one.keys() == two.keys() and one
    return all(torch.equal(one[name], two[name]) for name in one)


def backbone_in(path):
    return part(torch.load(path, weights_only=True)["teacher"], "backbone.")


def test_a_stop_changes_nothing_even_if_the_files_are_gone(tmp_path, weights):
    files = [tmp_path / f"{name}.pth" for name in ("start", "gram")]
    for file, source in zip(files, weights, strict=True):
        file.write_bytes(source.read_bytes())
    options = [*LOUD, *ANCHORS, *GRAM, *SIZES, start_from(files[0]), f"gram.ckpt={files[1]}"]
    options += ["gram.update_frequency=2", "gram.it_first_update=4", "gram.compute_stats=true"]
    assert train(tmp_path / "whole", *options) == 0
    assert train(tmp_path / "parts", *options, "train.max_steps=3") == 0
    saved = model_of(tmp_path / "parts", 2)
    assert is_equal(part(saved, "anchoring.networks.start."), backbone_in(files[0]))
    assert is_equal(part(saved, "anchoring.networks.gram_teacher."), backbone_in(files[1]))
    for file in files:
        file.unlink()
    torch.manual_seed(123)
    assert train(tmp_path / "parts", *options) == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parts", name="model_0000005")
    whole, parts = (values_but_timing(metrics_of(tmp_path / name)) for name in ("whole", "parts"))
    assert whole == parts and all(row.keys() >= set(LOSSES) for row in whole)
    renewed = part(model_of(tmp_path / "whole", 5), "anchoring.networks.gram_teacher.")
    assert not is_equal(renewed, part(saved, "anchoring.networks.gram_teacher."))


@pytest.mark.integration
@pytest.mark.dist
def test_two_processes_give_the_losses_of_one(tmp_path, weights):
    common = [*ELASTIC_RUN, *ANCHORS, *GRAM, *SIZES, start_from(weights[0]), "optim.scaling_rule=none"]
    common += ["optim.base_lr=0.001", "gram.ckpt=start", "gram.update_frequency=1", "train.global_batch_size=4"]
    strategies = ("SHARD_GRAD_OP", "FULL_SHARD")
    options = [(tmp_path / name, [*common, f"compute_precision.sharding_strategy={name}"]) for name in strategies]
    train_in_turns([(folder, [*case, "train.max_steps=2"]) for folder, case in options])
    assert train(tmp_path / "one", *common, "train.max_steps=3") == 0
    # a checkpoint of two processes, frozen networks and all, goes on in one
    folder, case = options[0]
    assert train(folder, *case, "train.max_steps=3") == 0
    for folder, _ in options:
        two, one = metrics_of(folder), metrics_of(tmp_path / "one")
        for loss in ("total_loss", *LOSSES):
            expected, found = ([row[loss] for row in rows[: len(two)]] for rows in (one, two))
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), loss


def test_anchoring_can_begin_and_end_in_a_run_that_goes_on(tmp_path, weights, capsys):
    run = tmp_path / "run"
    assert train(run, start_from(weights[0]), *LOUD, "train.max_steps=1") == 0
    assert "anchoring." not in " ".join(model_of(run, 0))
    assert train(run, start_from(weights[0]), *LOUD, *ANCHORS, *GRAM, "gram.ckpt=start", "train.max_steps=2") == 0
    saved = model_of(run, 1)
    for name in ("start", "gram_teacher"):
        assert is_equal(part(saved, f"anchoring.networks.{name}."), backbone_in(weights[0]))
    assert [set(LOSSES) <= row.keys() for row in metrics_of(run)] == [False, True]
    assert train(run, start_from(weights[0]), *LOUD, "train.max_steps=3") == 0
    assert "anchoring." not in " ".join(model_of(run, 2))


def test_a_run_that_goes_on_must_say_what_it_started_from(tmp_path, capsys):
    assert train(tmp_path, "train.max_steps=1") == 0
    capsys.readouterr()
    resume_path = f"train.resume_path={tmp_path}/model_0000000"
    assert train(tmp_path, "anchor.cls_weight=1", resume_path, "train.max_steps=2") == 1
    assert (
        f"{tmp_path}/model_0000000 was saved by a run that was not held near its start, and does not hold it; name the "
        f"weights of the start by student.pretrained_weights"
    ) in capsys.readouterr().err


def test_the_start_is_what_this_run_starts_from_not_an_earlier_one(tmp_path, weights):
    first = tmp_path / "first"
    assert train(first, start_from(weights[0]), *LOUD, *ANCHORS, "train.max_steps=2") == 0
    options = [f"MODEL.WEIGHTS={first}/model_0000001.rank_{{rank}}.pth", *LOUD, *ANCHORS, *GRAM, "gram.ckpt=start"]
    assert train(tmp_path / "second", *options, "train.max_steps=1") == 0
    began = part(model_of(first, 1), "teacher.backbone.")
    for name in ("start", "gram_teacher"):
        assert is_equal(part(model_of(tmp_path / "second", 0), f"anchoring.networks.{name}."), began)


def test_a_gram_teacher_that_does_not_fit_is_refused_at_the_start(tmp_path, weights, capsys):
    missing = tmp_path / "none.pth"
    assert train(tmp_path / "a", *GRAM, f"gram.ckpt={missing}") == 1
    assert f"{missing}: " in capsys.readouterr().err
    assert train(tmp_path / "b", *GRAM, f"gram.ckpt={weights[0]}", "student.depth=3") == 1
    assert f"{weights[0]}: " in capsys.readouterr().err


def test_the_weight_follows_its_schedule_and_accumulation_keeps_the_loss(tmp_path, weights):
    options = [
        *GRAM,
        start_from(weights[0]),
        "gram.ckpt=start",
        "gram.rep_update=false",
        "train.OFFICIAL_EPOCH_LENGTH=2",
    ]
    schedule = "gram.loss_weight_schedule={start: 0, peak: 0, end: 2, warmup_epochs: 1, cosine_epochs: 1}"
    accumulated = ["optim.gradient_accumulation_steps=2", "train.batch_size_per_gpu=6"]
    assert train(tmp_path, *options, schedule, "optim.epochs=3", *accumulated) == 0
    rows = metrics_of(tmp_path)
    assert ["gram_loss" in row for row in rows] == [False, False, False, True, True, True]
    assert [row["gram_loss_weight"] for row in rows[3:]] == [2.0, 2.0, 2.0]


SMALL_PARENT = (
    "train.compile=false",  # which takes a minute, and has tests of its own
    "student.ffn_ratio=2",
    "crops.rgb_mean=[0.5]",
    "crops.rgb_std=[0.25]",
    "crops.gram_teacher_crops_size=48",
    "ibot.head_n_prototypes=32",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
    "train.batch_size_per_gpu=16",
    "train.OFFICIAL_EPOCH_LENGTH=1",
)


@pytest.mark.parametrize(
    ("name", "epochs", "options", "loss_weight"),
    [
        ("dinov3_vit7b16_gram_anchor.yaml", 1200, ["gram.compute_stats=true"], 0.0),  # its weight begins later
        ("dinov3_vit7b16_high_res_adapt.yaml", 30, [], 1.5),
    ],
)
def test_dinov3s_files_with_gram_anchoring_train(tmp_path, name, epochs, options, loss_weight):
    common = ["--config-file", str(PARENTS / name), *SMALL_PARENT, f"optim.epochs={epochs}", "train.max_steps=2"]
    evaluated = "evaluation.eval_period_iterations=2"
    assert train(tmp_path / "before", *common, "gram.use_loss=false", evaluated) == 0
    teacher = tmp_path / "before" / "eval" / "training_1" / "teacher_checkpoint.pth"
    assert train(tmp_path / "anchored", *common, *options, f"MODEL.WEIGHTS={teacher}", f"gram.ckpt={teacher}") == 0
    rows = metrics_of(tmp_path / "anchored")
    assert [row["gram_loss_weight"] for row in rows] == [loss_weight] * 2
    assert all(row["gram_loss"] > 0 for row in rows)
