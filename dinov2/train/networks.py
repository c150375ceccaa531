"""The networks of student and teacher, as a config describes them, and their first values."""

from collections.abc import Sequence

import torch
from torch import nn

from dinov2.configs import Config
from dinov2.configs.adaptation_sections import LoraConfig
from dinov2.configs.model_sections import HeadConfig
from dinov2.eval.build import build_backbone
from dinov2.hub.stored_tensor import State, StoredTensor
from dinov2.layers.dino_head import DINOHead
from dinov2.layers.lora import first_updates
from dinov2.models import Backbone
from dinov2.train.parts import freeze, train_low_rank


def build_networks(cfg: Config, *, of_teacher: bool = False) -> nn.ModuleDict:
    """Build `backbone`, `dino_head` and, if separate and used, `ibot_head` as the config says, without values.

    A teacher has no stochastic depth, no low-rank updates and nothing to compute again.
    """
    backbone = build_backbone(cfg, drop_path_rate=0.0 if of_teacher else cfg.student.drop_path_rate)
    if not of_teacher:
        _choose_trained(backbone, cfg.optim.freeze, cfg.lora)
        if not cfg.student.is_resnet:
            backbone.recompute(cfg.train.recomputation)
    networks = nn.ModuleDict({"backbone": backbone, "dino_head": _head(backbone.embed_dim, cfg.dino)})
    if cfg.ibot.separate_head and cfg.ibot.loss_weight > 0:
        networks["ibot_head"] = _head(backbone.embed_dim, cfg.ibot)
    return networks


def whole_state(module: nn.Module, given: State, generator: torch.Generator) -> State:
    """Complete the given tensors of a module, which is on the meta device, by drawn ones."""
    given = {name: StoredTensor.of(drawn) for name, drawn in first_updates(module, generator).items()} | given
    if given.keys() >= module.state_dict().keys():
        return given
    module.to_empty(device="cpu")
    module.init_weights(generator=generator)
    return {name: StoredTensor.of(tensor) for name, tensor in module.state_dict().items()} | given


def _choose_trained(backbone: Backbone, frozen: Sequence[str], lora: LoraConfig) -> None:
    """Decide, from the config, which parameters of a student's backbone learn; all do unless it says otherwise."""
    if lora.rank:
        train_low_rank(
            backbone,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            dropout=lora.dropout,
            also_train=lora.also_train,
        )
    freeze(backbone, frozen)


def _head(in_dim: int, section: HeadConfig) -> DINOHead:
    """Build a head from the config section `dino` or `ibot`."""
    return DINOHead(
        in_dim,
        section.head_n_prototypes,
        nlayers=section.head_nlayers,
        hidden_dim=section.head_hidden_dim,
        bottleneck_dim=section.head_bottleneck_dim,
        weight_norm=section.head_weight_norm,
    )
