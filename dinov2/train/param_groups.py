"""Parameter groups: learning-rate and weight-decay multipliers by depth and kind of parameter."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dinov2.layers.dino_head import DINOHead
from dinov2.models import DinoVisionTransformer, ResNet
from dinov2.train.schedules import StepValues


@dataclass(frozen=True)
class Multipliers:
    """How one parameter departs from the scheduled values."""

    lr_multiplier: float
    wd_multiplier: float
    is_last_layer: bool = False  # prototypes, whose learning rate is 0 at first
    is_backbone: bool = False  # whose learning rate may be 0 at first, and rise


def backbone_multipliers(
    backbone: DinoVisionTransformer | ResNet, *, layerwise_decay: float, patch_embed_lr_mult: float
) -> dict[str, Multipliers]:
    """Give each parameter of a backbone its multipliers, by name.

    The learning rate decays from the output to the input: layerwise_decay ** (depth + 1 - layer). Vectors (biases,
    norms, LayerScale), tokens and positions are exempt from weight decay; tokens and positions are not in the parents.

    Source: the parents' `get_params_groups_with_decay`.
    """
    exempt = backbone.no_weight_decay()
    found = {}
    for name, param in backbone.named_parameters():
        lr = layerwise_decay ** (backbone.depth + 1 - backbone.layer_id(name))
        if name.startswith("patch_embed."):
            lr *= patch_embed_lr_mult
        found[name] = Multipliers(lr, 0.0 if param.ndim <= 1 or name in exempt else 1.0, is_backbone=True)
    return found


def head_multipliers(head: DINOHead, *, wd_multiplier: float = 1.0) -> dict[str, Multipliers]:
    """Give each parameter of a head its multipliers, by name; vectors (biases) are exempt from weight decay."""
    last_layer = {f"last_layer.{name}" for name, _ in head.last_layer.named_parameters()}
    return {
        name: Multipliers(1.0, 0.0 if param.ndim <= 1 else wd_multiplier, name in last_layer)
        for name, param in head.named_parameters()
    }


def param_groups(
    student: nn.ModuleDict,
    *,
    layerwise_decay: float,
    patch_embed_lr_mult: float,
    dino_head_wd_multiplier: float = 1.0,
) -> list[dict]:
    """Fuse the trained parameters of a student with equal multipliers into groups for an optimiser.

    Matrices of low-rank updates decay towards 0, which takes the weights back to those that training started from.

    Args:
        student: modules `backbone`, `dino_head` and, if separate, `ibot_head`.
        layerwise_decay: see `backbone_multipliers`.
        patch_embed_lr_mult: factor on the learning rate of the patch embedding.
        dino_head_wd_multiplier: factor on the weight decay of `dino_head`, not of `ibot_head`. DINOv3 looks for the
            name of the head in names that do not hold it, so there it acts on nothing.

    Returns:
        Groups with keys params, names, lr_multiplier, wd_multiplier, is_last_layer, is_backbone.
    """
    groups: dict[Multipliers, dict] = {}
    for module_name, module in student.items():
        if isinstance(module, DINOHead):
            wd_multiplier = dino_head_wd_multiplier if module_name == "dino_head" else 1.0
            multipliers = head_multipliers(module, wd_multiplier=wd_multiplier)
        else:
            multipliers = backbone_multipliers(
                module, layerwise_decay=layerwise_decay, patch_embed_lr_mult=patch_embed_lr_mult
            )
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            key = multipliers[name]
            group = groups.setdefault(key, {"params": [], "names": [], **vars(key)})
            group["params"].append(param)
            group["names"].append(f"{module_name}.{name}")
    return list(groups.values())


def common_groups(per_stage: Sequence[list[dict]]) -> list[dict]:
    """Split groups until the parameters of each share their multipliers in every stage of a run.

    Args:
        per_stage: what `param_groups` makes of one student under the settings of each stage; left unchanged.

    Returns:
        Groups with the multipliers of the first stage; of one stage, its own.
    """
    common, *others = per_stage
    for groups in others:
        place = {name: number for number, group in enumerate(groups) for name in group["names"]}
        split: dict[tuple[int, int], dict] = {}
        for number, group in enumerate(common):
            for param, name in zip(group["params"], group["names"], strict=True):
                part = split.setdefault((number, place[name]), group | {"params": [], "names": []})
                part["params"].append(param)
                part["names"].append(name)
        common = list(split.values())
    return common


def set_multipliers(optimizer: torch.optim.Optimizer, groups: Sequence[dict]) -> None:
    """Give an optimiser's groups the multipliers of other groups of the same parameters, which may be fused further."""
    multipliers = {
        name: {key: value for key, value in group.items() if key not in ("params", "names")}
        for group in groups
        for name in group["names"]
    }
    for group in optimizer.param_groups:
        group.update(multipliers[group["names"][0]])


def apply_schedules(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Set the learning rate and weight decay of every group for this step."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        factor = values.backbone_lr_factor if group["is_backbone"] else values.head_lr_factor
        group["lr"] = lr * factor * group["lr_multiplier"]
        group["weight_decay"] = values.wd * group["wd_multiplier"]
