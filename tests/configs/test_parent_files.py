"""The config files of DINOv2 and DINOv3 load unchanged; each of their keys is in exactly one class.

The files under tests/data/parent_configs hold the keys and values of the parents' files of the same names.
"""

from pathlib import Path

import pytest
import yaml

from dinov2.configs import load_config, require_trainable, to_dict, write_config
from dinov2.configs.parent_keys import PARENT_KEYS, parent_sections
from dinov2.configs.tree import leaves, section_names
from dinov2.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "data" / "parent_configs"
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.yaml"))
CHUNKS = (
    "student.block_chunks=4 has no effect: blocks are one flat list, and weights saved in chunks are read all the same"
)
OF_7B = (
    "train.sharded_eval_checkpoint=true has no effect: the teacher of an evaluation is one file",
    "student.fp8_enabled=true has no effect: compute_precision.param_dtype decides",
)
NOTES = {
    "dinov2/ssl_default_config.yaml": (
        "compute_precision.reduce_dtype: gradients are summed over ranks in fp32 where fp16 was asked for",
    ),
    "dinov2/train/vitl14.yaml": (CHUNKS,),
    "dinov2/train/vitg14.yaml": (CHUNKS,),
    "dinov2/train/vitl16_short.yaml": (CHUNKS,),
    "dinov3/train/dinov3_vit7b16_pretrain.yaml": OF_7B,
    "dinov3/train/dinov3_vit7b16_gram_anchor.yaml": OF_7B,
    "dinov3/train/dinov3_vit7b16_high_res_adapt.yaml": OF_7B,
}
NO_GRAM = (
    "gram.use_loss=true needs a Gram teacher; name its weights by gram.ckpt (gram.ckpt=start: those that the run "
    "starts from), or set gram.ema_teacher=true, or gram.it_load_ema_teacher to a step"
)
ONE_SIZE = "is not supported in training: crops have one size; give one number"
SEVERAL = "is not supported in training: training several students at once is not available yet"
REFUSALS = {
    "dinov3/train/dinov3_vit7b16_high_res_adapt.yaml": (
        f"crops.global_crops_size=[512, 768, 768, 768, 768] {ONE_SIZE}",
        f"crops.local_crops_size=[112, 112, 168, 224, 336] {ONE_SIZE}",
        f"crops.gram_teacher_crops_size=[768, 1152, 1152, 1152, 1152] {ONE_SIZE}",
    ),
    "dinov3/train/dinov3_vitl16_lvd1689m_distilled.yaml": (
        f"MODEL.META_ARCHITECTURE='MultiDistillationMetaArch' {SEVERAL}",
        "distillation.enabled=true is not supported in training: training from a fixed teacher is not available yet",
        f"multidistillation.enabled=true {SEVERAL}",
    ),
}
# A dozen values for each family, under our names.
ARRIVED = {
    "dinov2/train/vitg14.yaml": {
        "defaults": "dinov2",
        "dino.head_n_prototypes": 131072,
        "dino.head_bottleneck_dim": 384,
        "dino.head_weight_norm": True,
        "ibot.separate_head": True,
        "ibot.head_bottleneck_dim": 256,
        "train.batch_size_per_gpu": 12,
        "train.centering": "sinkhorn_knopp",
        "student.arch": "vit_giant2",
        "student.patch_size": 14,
        "student.drop_path_rate": 0.4,
        "student.ffn_layer": "swiglufused",
        "student.pos_embed_type": "learned",
        "teacher.momentum_teacher": 0.994,
        "optim.epochs": 500,
        "optim.base_lr": 2e-4,
        "optim.layerwise_decay": 1.0,
        "crops.local_crops_size": 98,
    },
    "dinov2/ssl_default_config.yaml": {
        "checkpointing.period": 25000,
        "compute_precision.param_dtype": "fp16",
        "compute_precision.reduce_dtype": "fp32",
        "compute_precision.sharding_strategy": "SHARD_GRAD_OP",
        "train.dataset_path": "ImageNet:split=TRAIN",
        "optim.base_lr": 0.004,
    },
    "dinov2/eval/vitg14_reg4_pretrain.yaml": {
        "student.arch": "vit_giant2",
        "student.num_register_tokens": 4,
        "student.interpolate_antialias": True,
        "student.interpolate_offset": 0.0,
        "crops.global_crops_size": 518,
    },
    "dinov3/train/dinov3_vit7b16_pretrain.yaml": {
        "defaults": "dinov3",
        "compute_precision.param_dtype": "bf16",
        "compute_precision.sharding_strategy": "FULL_SHARD",
        "dino.head_weight_norm": False,
        "dino.head_n_prototypes": 262144,
        "ibot.head_n_prototypes": 98304,
        "ibot.head_hidden_dim": 4096,
        "train.dataset_path": "",
        "train.checkpointing": True,
        "train.checkpointing_full": False,
        "train.compile": True,
        "train.compile_mode": "default",
        "train.compile_target": "both",
        "student.arch": "vit_7b",
        "student.ffn_layer": "swiglu64",
        "student.ffn_ratio": 3.0,
        "student.norm_layer": "layernormbf16",
        "student.qkv_bias": False,
        "student.mask_k_bias": True,
        "student.num_register_tokens": 4,
        "student.untie_global_and_local_cls_norm": True,
        "student.pos_embed_type": "rope",
        "student.pos_embed_rope_rescale_coords": 2.0,
        "student.pos_embed_rope_dtype": "fp32",
        "optim.clip_grad": 30.0,
        "optim.layerwise_decay": 0.98,
        "optim.adamw_beta2": 0.99,
        "schedules.lr.peak": 5e-5,
        "schedules.lr.freeze_last_layer_epochs": 5,
        "schedules.momentum.end": 0.994,
        "schedules.teacher_temp.warmup_epochs": 100,
        "schedules.weight_decay.cosine_epochs": None,
        "crops.global_crops_size": 256,
        "augmentation.horizontal_flip_probability": 0.0,
        "augmentation.mean": (0.485, 0.456, 0.406),
        "augmentation.std": (0.229, 0.224, 0.225),
        "checkpointing.period": 1000,
        "checkpointing.keep_every": 50000,
    },
    "dinov3/train/dinov3_vit7b16_gram_anchor.yaml": {
        "dino.reweight_dino_local_loss": True,
        "dino.local_loss_weight_schedule.start": 1.0,
        "dino.local_loss_weight_schedule.end": 0.5,
        "dino.local_loss_weight_schedule.warmup_epochs": 1000,
        "dino.local_loss_weight_schedule.cosine_epochs": 1,
        "gram.use_loss": True,
        "gram.ckpt": None,
        "gram.it_first_update": 1010000,
        "gram.max_updates": 3,
        "gram.img_level": True,
        "gram.loss_weight_schedule.peak": 0.0,
        "gram.loss_weight_schedule.end": 2.0,
        "gram.loss_weight_schedule.cosine_epochs": 1,
        "crops.gram_teacher_crops_size": 512,
        "crops.gram_teacher_no_distortions": True,
        "optim.epochs": 1200,
    },
    "dinov3/train/dinov3_vit7b16_high_res_adapt.yaml": {
        "dino.koleo_loss_distributed": True,
        "dino.koleo_distributed_loss_group_size": 16,
        "crops.global_crops_size": 512,
        "crops.local_crops_size": 112,
        "crops.gram_teacher_crops_size": 768,
        "train.checkpointing_full": True,
        "gram.rep_update": False,
        "gram.loss_weight_schedule.start": 1.5,
        "schedules.lr.cosine_epochs": 10,
        "checkpointing.period": 250,
    },
    "dinov3/train/dinov3_vitl16_lvd1689m_distilled.yaml": {
        "MODEL.WEIGHTS": "<PATH/TO/HRFT/TEACHER>",
        "student.pos_embed_type": "rope",
        "student.mask_k_bias": True,
        "student.drop_path_rate": 0.0,
        "optim.base_lr": 0.0008,
        "checkpointing.keep_every": None,
        "schedules.momentum.end": 1.0,
    },
    "dinov3/train/vitl_im1k_lin834.yaml": {
        "optim.base_lr": 0.004,
        "optim.warmup_epochs": 10,
        "schedules": None,
        "student.ffn_ratio": 4.0,
        "augmentation.horizontal_flip_probability": 0.5,
        "evaluation.eval_period_iterations": 12500,
        "checkpointing.period": 3750,
    },
}


def load(name, *overrides):
    return load_config(str(FOLDER / name), overrides)


def at(cfg, key):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


def keys_of(tree, prefix=""):
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{key}.")
        elif value is not None or key not in {*parent_sections(), *section_names()}:  # an empty section holds no key
            yield key


def test_the_files_are_there():
    evals = [f"dinov2/eval/vit{size}14{reg}_pretrain.yaml" for size in "sblg" for reg in ("", "_reg4")]
    assert set(evals) <= set(FILES) and len(FILES) == 18
    assert (NOTES.keys() | REFUSALS.keys() | ARRIVED.keys()) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_parents_file_loads_with_these_notes_and_refusals(name):
    cfg = load(name)
    assert set(cfg.notes) == set(NOTES.get(name, ()))
    assert cfg.refusals == REFUSALS.get(name, ())
    assert cfg.defaults == name.partition("/")[0]


@pytest.mark.parametrize("name", ARRIVED)
def test_values_arrive(name):
    cfg = load(name)
    assert {key: at(cfg, key) for key in ARRIVED[name]} == ARRIVED[name]


@pytest.mark.parametrize("name", FILES)
def test_a_parents_file_is_the_same_after_writing_and_reading(name, tmp_path):
    cfg = load(name)
    write_config(cfg, tmp_path / "config.yaml")
    again = load_config(str(tmp_path / "config.yaml"))
    assert again == cfg
    assert (again.notes, again.refusals) == ((), ())


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_a_parents_file_is_in_one_class(name):
    for key in keys_of(yaml.safe_load((FOLDER / name).read_text())):
        assert (key in leaves()) + (key in PARENT_KEYS) == 1, key


def test_training_is_refused_with_the_first_reason():
    require_trainable(load("dinov3/train/dinov3_vit7b16_pretrain.yaml"))
    with pytest.raises(ConfigError) as caught:
        require_trainable(load("dinov3/train/dinov3_vit7b16_gram_anchor.yaml"))
    assert str(caught.value) == NO_GRAM
    for setting in ("gram.use_loss=false", "gram.ckpt=teacher.pth", "gram.it_load_ema_teacher=1000000"):
        require_trainable(load("dinov3/train/dinov3_vit7b16_gram_anchor.yaml", setting))
    with pytest.raises(ConfigError) as caught:
        require_trainable(load("dinov3/train/dinov3_vit7b16_high_res_adapt.yaml"))
    assert str(caught.value) == (
        f"crops.global_crops_size=[512, 768, 768, 768, 768] {ONE_SIZE} (and 2 more such settings: "
        "crops.local_crops_size, crops.gram_teacher_crops_size)"
    )


def test_dinov3s_own_defaults_are_our_layer_of_them():
    theirs = to_dict(load("dinov3/ssl_default_config.yaml"))
    ours = to_dict(load_config(None, ["defaults=dinov3"]))
    differ = {
        f"{section}.{key}": (value, ours[section][key])
        for section, keys in theirs.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if value != ours[section][key]
    }
    assert differ == {
        "compute_precision.param_dtype": ("bf16", "auto"),
        "train.dataset_path": ("ImageNet:split=TRAIN", ""),
        "train.compile": (True, False),
        "student.ffn_ratio": (4.0, None),
        "augmentation.mean": ([0.485, 0.456, 0.406], None),
        "augmentation.std": ([0.229, 0.224, 0.225], None),
    }
