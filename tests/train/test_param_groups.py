import json

import torch
from support.golden import FOLDER
from support.meta_arch import tiny_arch

from dinov2.models import DinoVisionTransformer
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
    apply_schedules(optimizer, StepValues(lr=2.0, last_layer_lr=0.0, wd=0.5, momentum=0.9, teacher_temp=0.05))
    for group in optimizer.param_groups:
        expected = 0.0 if group["is_last_layer"] else 2.0 * group["lr_multiplier"]
        assert group["lr"] == expected and group["weight_decay"] == 0.5 * group["wd_multiplier"]
