"""A run that goes on says which settings, of those that alter its results, are not the saved ones."""

import json

import pytest

from dinov2.configs import load_config, to_dict
from dinov2.configs.changes import WITHOUT_EFFECT_ON_RESULTS, changed_settings
from dinov2.configs.tree import leaves, section_names


def changes(*overrides):
    saved = json.loads(json.dumps(to_dict(load_config(None))))  # as a checkpoint holds it
    return changed_settings(saved, to_dict(load_config(None, overrides)))


def test_the_same_settings_are_no_change():
    assert changes() == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.base_lr=0.002", "optim.base_lr 0.004 -> 0.002"),
        ("train.seed=3", "train.seed 0 -> 3"),
        ("crops.global_crops_scale=[0.5, 1]", "crops.global_crops_scale [0.32, 1.0] -> [0.5, 1.0]"),
        ("optim.clip_grad=null", "optim.clip_grad 3.0 -> null"),
        ("dino.local_loss_weight_schedule.peak=0.25", "dino.local_loss_weight_schedule.peak 0.5 -> 0.25"),
        ("train.dataset_path=Digits", 'train.dataset_path "" -> "Digits"'),
        ("optim.gradient_accumulation_steps=2", "optim.gradient_accumulation_steps 1 -> 2"),
    ],
)
def test_a_key_that_alters_results_is_named_with_both_values(override, line):
    assert changes(override) == [line]


def test_each_changed_key_has_a_line_of_its_own():
    assert changes("optim.epochs=50", "augmentation.hue=0", "train.num_workers=1") == [
        "optim.epochs 100 -> 50",
        "augmentation.hue 0.1 -> 0.0",
    ]


def test_schedules_that_were_not_there_before():
    schedules = [
        f"schedules.{name}={{start: 0.1, peak: 0.1, end: 0.1, warmup_epochs: 0}}"
        for name in ("lr", "weight_decay", "momentum", "teacher_temp")
    ]
    (line,) = changes(*schedules)
    assert line.startswith('schedules null -> {"lr": {"start": 0.1')


@pytest.mark.parametrize(
    "override",
    [
        "train.num_workers=3",
        "train.compile=true",
        "train.output_dir=elsewhere",
        "train.max_steps=7",
        "checkpointing.period=5",
        "evaluation.at_start=false",
        "evaluation.knn.temperature=0.1",
        "logging.period_steps=3",
        "compute_precision.sharding_strategy=FULL_SHARD",
        "student.pretrained_weights=some.pth",
        "train.batch_size_per_gpu=3",
    ],
)
def test_keys_without_effect_are_not_named(override):
    assert changes(override) == []


def test_a_key_that_an_older_version_did_not_know_is_no_change():
    saved = to_dict(load_config(None))
    del saved["optim"]["clip_grad"]
    assert changed_settings(saved, to_dict(load_config(None))) == []


def test_the_table_names_keys_and_sections_that_exist():
    assert set(WITHOUT_EFFECT_ON_RESULTS) <= {*leaves(), *section_names()}
