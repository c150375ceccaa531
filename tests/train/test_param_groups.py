import json

import pytest
import torch
from support.golden import FOLDER
from support.meta_arch import tiny_arch

from dinov2.models import DinoVisionTransformer, ResNet
from dinov2.train.param_groups import apply_schedules, backbone_multipliers, param_groups
from dinov2.train.schedules import StepValues


def test_multipliers_equal_the_official_ones_but_for_tokens_and_positions():
    backbone = DinoVisionTransformer(embed_dim=48, depth=2, num_heads=4, num_register_tokens=4, init_values=1e-5)
    own = backbone_multipliers(backbone, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    stored = json.loads((FOLDER / "param_groups_v2.json").read_text())
    stored = {name.replace("blocks.0.", "blocks.", 1): value for name, value in stored.items()}
    undecayed = {"cls_token", "pos_embed", "register_tokens", "mask_token"}
    compared = 0
    for name, value in stored.items():
        if name not in own:
            continue
        assert abs(own[name].lr_multiplier - value["lr_multiplier"]) < 1e-12, name
        assert own[name].is_last_layer == value["is_last_layer"]
        assert own[name].wd_multiplier == (0 if name in undecayed else value["wd_multiplier"]), name
        compared += 1
    assert compared == len(own)


def test_groups_hold_every_parameter_once_and_follow_the_schedule():
    model = tiny_arch(["ibot.separate_head=true"])
    groups = param_groups(model.student, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.student.named_parameters())
    last = [group for group in groups if group["is_last_layer"]]
    assert {name for group in last for name in group["names"]} == {
        f"{head}.last_layer.{part}" for head in ("dino_head", "ibot_head") for part in ("weight_g", "weight_v")
    }
    optimizer = torch.optim.AdamW(groups)
    factors = {"backbone_lr_factor": 0.25, "head_lr_factor": 3.0}
    values = StepValues(lr=2.0, last_layer_lr=0.0, wd=0.5, momentum=0.9, teacher_temp=0.05, **factors)
    apply_schedules(optimizer, values)
    for group in optimizer.param_groups:
        (of_backbone,) = {name.startswith("backbone.") for name in group["names"]}
        factor = factors["backbone_lr_factor" if of_backbone else "head_lr_factor"]
        expected = 0.0 if group["is_last_layer"] else 2.0 * factor * group["lr_multiplier"]
        assert group["lr"] == expected and group["weight_decay"] == 0.5 * group["wd_multiplier"]


def test_parameters_of_dinov3_by_name():
    backbone = DinoVisionTransformer(
        embed_dim=48,
        depth=2,
        num_heads=4,
        num_register_tokens=4,
        init_values=1e-5,
        mask_k_bias=True,
        norm_layer="rmsnorm",
        untie_cls_and_patch_norms=True,
        untie_global_and_local_cls_norm=True,
        pos_embed_type="rope",
    )
    own = backbone_multipliers(backbone, layerwise_decay=0.5, patch_embed_lr_mult=0.2)
    assert own.keys() == dict(backbone.named_parameters()).keys()
    by_layer = {
        0: ["cls_token", "storage_tokens", "mask_token"],
        1: ["blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"],
        2: ["blocks.1.mlp.fc2.weight", "blocks.1.norm2.weight"],
        3: ["norm.weight", "cls_norm.weight", "local_cls_norm.weight"],
    }
    for layer, names in by_layer.items():
        assert {own[name].lr_multiplier for name in names} == {0.5 ** (3 - layer)}
    assert own["patch_embed.proj.weight"].lr_multiplier == 0.2 * 0.5**3
    decayed = {name for name, value in own.items() if value.wd_multiplier == 1}
    products = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert decayed == {"patch_embed.proj.weight"} | {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in products}


def test_parameters_of_a_resnet_by_depth():
    backbone = ResNet("resnet18")
    own = backbone_multipliers(backbone, layerwise_decay=0.5, patch_embed_lr_mult=0.2)
    assert own.keys() == dict(backbone.named_parameters()).keys()
    assert own["conv1.weight"].lr_multiplier == own["bn1.bias"].lr_multiplier == 0.5**9  # 8 residual blocks
    assert own["layer1.0.conv1.weight"].lr_multiplier == 0.5**8 and own["layer4.1.bn2.weight"].lr_multiplier == 0.5
    decayed = {name for name, value in own.items() if value.wd_multiplier == 1}
    assert decayed == {name for name, param in backbone.named_parameters() if param.ndim == 4}


@pytest.mark.parametrize("weight_norm", ["true", "false"])
def test_the_weight_decay_of_the_dino_head_has_a_factor_of_its_own(weight_norm):
    model = tiny_arch(
        ["ibot.separate_head=true", *(f"{head}.head_weight_norm={weight_norm}" for head in ("dino", "ibot"))]
    )
    groups = param_groups(model.student, layerwise_decay=0.9, patch_embed_lr_mult=0.2, dino_head_wd_multiplier=0.25)
    factors = {name: group["wd_multiplier"] for group in groups for name in group["names"]}
    for name, param in model.student.named_parameters():
        if "_head" in name:
            factor = 0.25 if name.startswith("dino_head.") else 1.0
            assert factors[name] == (factor if param.ndim > 1 else 0.0), name
