"""Stages of a run: one count of steps and one folder, but settings, schedules and batches of each stage's own."""

import json

import pytest
import torch
from support.meta_arch import tiny_arch, tiny_config
from support.training import (
    DINOV3_RUN,
    TINY_RUN,
    assert_same_state,
    metrics_of,
    train,
    train_in_turns,
    values_but_timing,
)

from dinov2.configs import load_config
from dinov2.errors import ConfigError
from dinov2.train.build import build_optimizer, build_param_groups, plan_run
from dinov2.train.evaluation import TeacherEvaluation
from dinov2.train.param_groups import set_multipliers
from dinov2.train.stages import SavedBatch, plan_stages

HEADS = "{name: heads, epochs: 1, optim: {base_lr: 0.01, freeze_backbone_epochs: 1}}"
WIDE = (
    "{name: wide, optim: {layerwise_decay: 0.5, warmup_epochs: 1, clip_grad: 1.0}, crops.global_crops_size: 48, "
    "crops.local_crops_number: 1, train.batch_size_per_gpu: 6, dino.koleo_loss_weight: 0, ibot.loss_weight: 0}"
)
STAGED = (
    "train.OFFICIAL_EPOCH_LENGTH=2",
    "ibot.separate_head=true",
    "ibot.head_n_prototypes=32",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
    f"stages=[{HEADS}, {WIDE}]",
)
EVALUATED = ("evaluation.eval_period_iterations=100", "evaluation.health.num_images=8")
LAST = "model_0000003"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, *STAGED, *EVALUATED, "logging.period_steps=1") == 0
    return folder


def test_each_stage_has_its_own_settings_and_schedules(whole_run):
    rows = metrics_of(whole_run)
    assert [(row["iteration"], row["stage"], row["current_batch_size"]) for row in rows] == [
        (0, 1, 12),
        (1, 1, 12),
        (2, 2, 6),
        (3, 2, 6),
    ]
    peak = 0.01 * (12 / 1024) ** 0.5
    assert [row["lr"] for row in rows] == pytest.approx([peak, (peak + 1e-6) / 2, 0, 0.004 * (6 / 1024) ** 0.5])
    assert [row["backbone_lr_factor"] for row in rows] == [0, 0, 1, 1]
    assert [("koleo_loss" in row, "ibot_loss" in row) for row in rows] == [(True, True)] * 2 + [(False, False)] * 2
    plan = json.loads((whole_run / "run_plan.json").read_text())
    assert [(name, of["first_step"], of["last_step"]) for name, of in plan.items()] == [("heads", 0, 2), ("wide", 2, 4)]


def test_after_each_stage_the_run_is_saved_and_evaluated(whole_run):
    assert sorted(path.name for path in whole_run.glob("model_*.json")) == [
        "model_0000001.manifest.json",
        "model_0000003.manifest.json",
    ]
    assert sorted(path.name for path in (whole_run / "eval").iterdir()) == ["training_1", "training_3"]
    assert ["rankme" in row for row in metrics_of(whole_run)] == [False, True, False, True]
    first, last = (
        torch.load(whole_run / f"model_000000{step}.rank_0.pth", weights_only=True)["extra"] for step in (1, 3)
    )
    assert (first["samples_seen"], last["samples_seen"]) == (24, 36)


def test_what_a_stage_leaves_out_rests_in_it(whole_run):
    one, two = (torch.load(whole_run / f"model_000000{step}.rank_0.pth", weights_only=True)["model"] for step in (1, 3))
    changed = {name for name in one if name.startswith("student.") and not torch.equal(one[name], two[name])}
    assert not any(name.startswith("student.ibot_head.") for name in changed)
    assert {"student.backbone.pos_embed", "student.backbone.cls_token", "student.dino_head.mlp.0.weight"} <= changed


def test_stopping_before_and_after_the_boundary_gives_the_same_run(tmp_path, whole_run, caplog):
    caplog.set_level("INFO", logger="dinov2")
    for steps in (1, 3, 4):
        torch.manual_seed(123)
        assert train(tmp_path, *STAGED, f"train.max_steps={steps}", "logging.period_steps=1") == 0
    assert_same_state(whole_run, tmp_path, name=LAST, but_for=("metrics",))
    measured = set(metrics_of(whole_run)[1]) - set(metrics_of(whole_run)[0])
    whole = [{k: v for k, v in row.items() if k not in measured} for row in metrics_of(whole_run)]
    assert values_but_timing(whole) == values_but_timing(metrics_of(tmp_path))
    entered = [message.partition(" epoch_steps")[0] for message in caplog.messages if message.startswith("stage=")]
    first, second = "stage=heads number=1 of=2 steps=0..1", "stage=wide number=2 of=2 steps=2..3"
    assert entered == [first, first, second, second]
    assert not [message for message in caplog.messages if message.startswith("changed since")]


def test_a_kill_between_the_boundarys_checkpoint_and_its_evaluation(tmp_path, whole_run, monkeypatch):
    def killed(self, model, name):
        raise InterruptedError(name)

    with monkeypatch.context() as patch:
        patch.setattr(TeacherEvaluation, "__call__", killed)
        with pytest.raises(InterruptedError, match="training_1"):
            train(tmp_path, *STAGED, *EVALUATED, "logging.period_steps=1")
    assert train(tmp_path, *STAGED, *EVALUATED, "logging.period_steps=1") == 0
    assert_same_state(whole_run, tmp_path, name=LAST)
    assert values_but_timing(metrics_of(whole_run)) == values_but_timing(metrics_of(tmp_path))


def test_a_run_that_ended_at_the_boundary_goes_on_with_one_more_stage(tmp_path, whole_run):
    assert train(tmp_path, *STAGED[:-1], f"stages=[{HEADS}]") == 0
    assert train(tmp_path, *STAGED, "logging.period_steps=1") == 0
    assert_same_state(whole_run, tmp_path, name=LAST, but_for=("metrics",))


@pytest.mark.parametrize("family", ["learned", "rope"])
def test_a_stage_of_larger_crops_for_both_families(tmp_path, family):
    options = DINOV3_RUN if family == "rope" else ()
    stages = "stages=[{name: adapt}, {name: large, crops: {global_crops_size: 64, local_crops_size: 24}}]"
    assert train(tmp_path, *options, stages, "train.OFFICIAL_EPOCH_LENGTH=1", "optim.min_lr=0.001") == 0
    assert [row["stage"] for row in metrics_of(tmp_path)] == [1, 2]
    assert all(row["total_loss"] > 0 and row["grad_norm_backbone"] > 0 for row in metrics_of(tmp_path))
    one, two = (torch.load(tmp_path / f"model_000000{step}.rank_0.pth", weights_only=True)["model"] for step in (0, 1))
    if family == "learned":
        name = "student.backbone.pos_embed"
        assert one[name].shape == (1, 17, 32) and not torch.equal(one[name], two[name])


def test_gram_anchoring_in_the_stage_of_larger_crops(tmp_path, whole_run):
    stages = "stages=[{name: adapt}, {name: large, crops: {global_crops_size: 48, gram_teacher_crops_size: 64}}]"
    options = [
        stages,
        f"student.pretrained_weights={whole_run}/eval/training_3/teacher_checkpoint.pth",
        "train.OFFICIAL_EPOCH_LENGTH=1",
        "lora.rank=2",
        "gram.use_loss=true",
        "gram.ckpt=start",
        "gram.rep_update=false",
        "gram.loss_weight=0",
        "stages.large.gram.loss_weight=2",
        "stages.large.optim.min_lr=0.001",
    ]
    assert train(tmp_path, *options) == 0
    before, after = metrics_of(tmp_path)
    assert "gram_loss" not in before and after["gram_loss"] > 0 and after["gram_loss_weight"] == 2


@pytest.mark.dist
def test_two_processes_resume_at_the_boundary_bit_for_bit(tmp_path):
    options = [*STAGED, "compute_precision.sharding_strategy=FULL_SHARD", "stages.wide.train.batch_size_per_gpu=3"]
    options += ["train.OFFICIAL_EPOCH_LENGTH=1", "stages.wide.optim.warmup_epochs=0", "train.batch_size_per_gpu=4"]
    onwards = f"train.resume_path={tmp_path / 'whole' / 'model_0000000'}"
    train_in_turns([(tmp_path / "whole", options), (tmp_path / "parts", [*options, onwards])])
    assert_same_state(tmp_path / "whole", tmp_path / "parts", name="model_0000001", num_ranks=2)


def plans(*options, world_size=1, saved=None):
    cfg = load_config(None, [*TINY_RUN, *STAGED, *options])
    return plan_stages(cfg, dataset_size=1000, world_size=world_size, saved=saved)


def test_steps_are_counted_through_and_max_steps_over_all_stages():
    stages = plans("stages.wide.epochs=3")
    assert (len(stages), stages.last_step, stages.total_steps) == (2, 8, 8)
    assert [stages.at(step).name for step in (-1, 0, 1, 2, 7, 8, 99)] == ["heads"] * 3 + ["wide"] * 4
    assert [stages.at(step).ends_after(step) for step in range(8)] == [False, True, *[False] * 5, True]
    cut = plans("stages.wide.epochs=3", "train.max_steps=1")
    assert (cut.last_step, cut.total_steps, cut.at(5).name) == (1, 8, "heads")
    assert plans("train.max_steps=3").at(2).ends_after(2)


def test_the_schedules_of_a_stage_begin_with_it():
    heads, wide = plans()
    assert heads.values(0).lr > 0 and wide.values(2).lr == 0 and wide.values(3).lr == wide.plan.lr
    assert wide.values(2).momentum == heads.values(0).momentum


def test_evaluations_of_a_stage():
    stages = plans("evaluation.eval_period_iterations=null", "stages.wide.evaluation.eval_period_iterations=3")
    assert [stages.at(step).is_evaluated_after(step) for step in range(4)] == [False, False, True, True]


@pytest.mark.parametrize("iteration", [0, 3])
def test_on_another_number_of_ranks_every_stage_keeps_its_global_batch(iteration):
    before = [stage.plan for stage in plans(world_size=2)]
    saved = SavedBatch(iteration, before[iteration // 2].global_batch_size)
    now = [stage.plan for stage in plans(world_size=1, saved=saved)]
    assert [plan.global_batch_size for plan in now] == [plan.global_batch_size for plan in before] == [24, 12]
    assert [plan.lr for plan in now] == [plan.lr for plan in before]


def test_a_stage_whose_epochs_follow_from_its_batch_is_found():
    options = ["train.OFFICIAL_EPOCH_LENGTH=null", "stages.wide.train.batch_size_per_gpu=24"]
    heads, wide = plans(*options, world_size=2)
    assert (heads.plan.last_step, wide.plan.last_step) == (41, 41 + 20)
    again = plans(*options, saved=SavedBatch(45, 48))
    assert [stage.plan.global_batch_size for stage in again] == [24, 48]


def test_a_stage_that_does_not_fit_the_data_is_named():
    with pytest.raises(ConfigError) as caught:
        plans("stages.wide.train.batch_size_per_gpu=2000")
    assert str(caught.value).startswith("stage wide: the global batch of 2000 images")
    with pytest.raises(ConfigError) as caught:
        plan_stages(tiny_config(), dataset_size=3, world_size=1)
    assert str(caught.value).startswith("the global batch of 64 images")


def test_a_config_without_stages_has_the_plan_of_the_run():
    cfg = tiny_config(["optim.epochs=11"])
    (stage,) = plan_stages(cfg, dataset_size=1000, world_size=1)
    assert stage.plan == plan_run(cfg, dataset_size=1000, world_size=1) and stage.cfg is cfg
    assert stage.metrics() == {} and stage.name == ""


def test_parameters_of_a_group_share_their_multipliers_in_every_stage():
    wide = ["optim.layerwise_decay=0.5", "optim.patch_embed_lr_mult=1"]
    staged = tiny_config(
        ["optim.layerwise_decay=1", f"stages=[{{name: a}}, {{name: b, {', '.join(wide).replace('=', ': ')}}}]"]
    )
    model = tiny_arch()
    optimizer = build_optimizer(staged, model)
    alone = build_param_groups(tiny_config(wide), model)
    assert (
        len(optimizer.param_groups)
        >= len(alone)
        > len(build_param_groups(tiny_config(["optim.layerwise_decay=1"]), model))
    )
    set_multipliers(optimizer, alone)
    expected = {name: group["lr_multiplier"] for group in alone for name in group["names"]}
    found = {name: group["lr_multiplier"] for group in optimizer.param_groups for name in group["names"]}
    assert found == expected
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.student.named_parameters())
