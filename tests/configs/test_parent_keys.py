"""DINOv2's config files load unchanged; what has another name, no effect or no support here is said."""

import pytest
import yaml

from dinov2.configs import Config, load_config
from dinov2.errors import ConfigError

NETS = ("teacher", "student")
PARTS = ("backbone", "dino_head", "ibot_head")


def per_module(net, part, *, strategy="SHARD_GRAD_OP", param="fp16", reduce="fp16"):
    prefix = f"compute_precision.{net}.{part}"
    return {
        f"{prefix}.sharding_strategy": strategy,
        f"{prefix}.mixed_precision.param_dtype": param,
        f"{prefix}.mixed_precision.reduce_dtype": reduce,
        f"{prefix}.mixed_precision.buffer_dtype": "fp32",
    }


def as_file(folder, flat):
    tree = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[name] = value
    path = folder / "parent.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def dinov2_precision():
    keys = {}
    for net in NETS:
        for part in PARTS:
            student_head = net == "student" and part != "backbone"
            keys |= per_module(net, part, reduce="fp32" if student_head else "fp16")
    return keys


# Keys and values of DINOv2's default config that our schema names otherwise or does not have.
DINOV2_ONLY = {
    "train.saveckp_freq": 20,
    "train.cache_dataset": True,
    "student.block_chunks": 0,
    "optim.lr": 0.0,
}
DINOV2_SHARED = {
    "MODEL.WEIGHTS": "",
    "compute_precision.grad_scaler": True,
    "ibot.mask_ratio_min_max": [0.1, 0.5],
    "train.dataset_path": "ImageNet:split=TRAIN",
    "train.output_dir": ".",
    "train.OFFICIAL_EPOCH_LENGTH": 1250,
    "train.centering": "centering",
    "student.arch": "vit_large",
    "student.layerscale": 1.0e-05,
    "student.drop_path_uniform": True,
    "teacher.final_momentum_teacher": 1,
    "optim.min_lr": 1.0e-06,
    "optim.scaling_rule": "sqrt_wrt_1024",
    "crops.global_crops_scale": [0.32, 1.0],
    "evaluation.eval_period_iterations": 12500,
}


def test_dinov2s_own_defaults_load_and_are_ours(tmp_path):
    cfg = load_config(as_file(tmp_path, DINOV2_ONLY | DINOV2_SHARED | dinov2_precision()))
    assert cfg.compute_precision.param_dtype == "fp16"
    assert cfg.compute_precision.reduce_dtype == "fp32"
    assert cfg.compute_precision.sharding_strategy == "SHARD_GRAD_OP"
    assert cfg.checkpointing.period == 20 * 1250
    for section in ("dino", "ibot", "student", "teacher", "optim", "crops", "evaluation"):
        assert getattr(cfg, section) == getattr(Config(), section)
    assert cfg.notes == (
        "compute_precision.reduce_dtype: gradients are summed over ranks in fp32 where fp16 was asked for",
    )


def test_dinov2s_giant_recipe_loads_with_a_note(tmp_path):
    recipe = {
        "dino.head_n_prototypes": 131072,
        "dino.head_bottleneck_dim": 384,
        "ibot.separate_head": True,
        "train.centering": "sinkhorn_knopp",
        "student.arch": "vit_giant2",
        "student.patch_size": 14,
        "student.ffn_layer": "swiglufused",
        "student.block_chunks": 4,
        "crops.local_crops_size": 98,
    }
    cfg = load_config(as_file(tmp_path, recipe))
    assert (cfg.student.arch, cfg.student.ffn_layer, cfg.dino.head_bottleneck_dim) == ("vit_giant2", "swiglufused", 384)
    assert cfg.notes == (
        "student.block_chunks=4 has no effect: blocks are one flat list, and weights saved in chunks are read all the "
        "same",
    )


@pytest.mark.parametrize(
    ("override", "note"),
    [
        ("train.cudagraphs=true", "train.cudagraphs=true has no effect: train.compile_mode decides"),
        ("student.fp8_enabled=true", "student.fp8_enabled=true has no effect: compute_precision.param_dtype decides"),
        ("teacher.in_chans=4", "teacher.in_chans=4 has no effect: the teacher has the student's channels"),
        (
            "optim.lr=0.001",
            "optim.lr=0.001 has no effect: the learning rate is computed from optim.base_lr and optim.scaling_rule",
        ),
        (
            "compute_precision.teacher.backbone.mixed_precision.buffer_dtype=bf16",
            "compute_precision.teacher.backbone.mixed_precision.buffer_dtype='bf16' has no effect: "
            "buffers keep their own type",
        ),
    ],
)
def test_keys_without_effect_are_accepted_and_noted(override, note):
    cfg = load_config(None, [override])
    assert cfg.notes == (note,)
    assert cfg == Config()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (
            "student.channel_adaptive=true",
            "student.channel_adaptive=true is not supported: channels are trained together; set student.in_chans to "
            "their number",
        ),
        (
            "student.cls_pos_embedding=true",
            "student.cls_pos_embedding=true is not supported: the backbone has no such part",
        ),
        (
            "student.pos_embed_rope_gamma=2",
            "student.pos_embed_rope_gamma=2 is not supported: angles are not scaled",
        ),
    ],
)
def test_keys_that_change_the_backbone_are_refused_at_once(override, reason):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert str(caught.value) == reason


@pytest.mark.parametrize("override", ["defaults=dinov2", "student.channel_adaptive=false", "train.cudagraphs=false"])
def test_unsupported_keys_may_say_what_happens_anyway(override):
    cfg = load_config(None, [override])
    assert cfg == Config() and cfg.notes == ()


def test_modules_that_differ_follow_the_students_backbone(tmp_path):
    keys = per_module("teacher", "backbone", strategy="NO_SHARD", param="bf16", reduce="fp32")
    keys |= per_module("student", "backbone", strategy="FULL_SHARD", param="bf16", reduce="fp32")
    cfg = load_config(as_file(tmp_path, keys))
    assert cfg.compute_precision.sharding_strategy == "FULL_SHARD"
    assert cfg.compute_precision.param_dtype == "bf16"
    assert cfg.notes == (
        "compute_precision.sharding_strategy='FULL_SHARD' from compute_precision.student.backbone.sharding_strategy "
        "also stands for compute_precision.teacher.backbone.sharding_strategy",
    )


def test_one_module_alone_decides(tmp_path):
    cfg = load_config(as_file(tmp_path, {"compute_precision.teacher.ibot_head.sharding_strategy": "NO_SHARD"}))
    assert cfg.compute_precision.sharding_strategy == "NO_SHARD"
    assert cfg.notes == ()


def test_a_later_layer_wins_whatever_its_key_is_called(tmp_path):
    old, new = "compute_precision.student.backbone.sharding_strategy", "compute_precision.sharding_strategy"
    for in_file, on_command_line in ((old, new), (new, old)):
        cfg = load_config(as_file(tmp_path, {in_file: "NO_SHARD"}), [f"{on_command_line}=FULL_SHARD"])
        assert cfg.compute_precision.sharding_strategy == "FULL_SHARD"


def test_in_one_file_our_key_overrules_the_older_names(tmp_path):
    keys = {"train.saveckp_freq": 2, "checkpointing.period": 7}
    cfg = load_config(as_file(tmp_path, keys))
    assert cfg.checkpointing.period == 7
    assert cfg.notes == ("checkpointing.period=7 overrules 2500 from its older names",)


def test_saveckp_freq_counts_epochs_of_the_final_length(tmp_path):
    path = as_file(tmp_path, {"train.saveckp_freq": 2})
    assert load_config(path, ["train.OFFICIAL_EPOCH_LENGTH=10"]).checkpointing.period == 20


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.saveckp_freq=often"], "train.saveckp_freq='often': must be an integer"),
        (["train.saveckp_freq=0"], "train.saveckp_freq=0: must be at least 1 epoch"),
        (
            ["train.saveckp_freq=2", "train.OFFICIAL_EPOCH_LENGTH=null"],
            "train.saveckp_freq=2 counts epochs, whose length train.OFFICIAL_EPOCH_LENGTH=null leaves open; "
            "set checkpointing.period (optimiser steps) instead",
        ),
        (
            ["compute_precision.student.backbone.sharding_strategy=ALL"],
            "compute_precision.student.backbone.sharding_strategy='ALL': must be one of NO_SHARD, SHARD_GRAD_OP, "
            "FULL_SHARD, HYBRID_SHARD",
        ),
    ],
)
def test_wrong_values_of_parent_keys(overrides, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert str(caught.value) == sentence
