"""Which parameters of a backbone are trained: parts that stay as they are, and low-rank updates in place of weights."""

from collections.abc import Sequence

import torch
from torch import nn

from dinov2.configs.parts import EMBEDDINGS, block_range
from dinov2.layers import LayerScale, Mlp, SelfAttention, SwiGLUFFN, SwiGLUFFNSeparate
from dinov2.layers.lora import add_low_rank_updates, update_parameters
from dinov2.models import Backbone

_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "norms": (nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d, nn.SyncBatchNorm),
    "layerscale": (LayerScale,),
    "attention": (SelfAttention,),
    "mlp": (Mlp, SwiGLUFFN, SwiGLUFFNSeparate),
}
_TOKENS = {"registers": ("register_tokens", "storage_tokens")}  # of the two families; other tokens have one name


def parameters_of(backbone: Backbone, parts: Sequence[str]) -> set[str]:
    """Name the parameters of parts of a backbone.

    Args:
        backbone: not sharded.
        parts: as in `optim.freeze`, checked: `norms`, `blocks:0-5`, ...
    """
    return {name for part in parts for name in _parameters_of(backbone, part)}


def freeze(backbone: Backbone, parts: Sequence[str]) -> None:
    """Let the parameters of parts of a backbone stay as they are: they get no gradient."""
    frozen = parameters_of(backbone, parts)
    for name, param in backbone.named_parameters():
        if name in frozen:
            param.requires_grad_(False)


def train_low_rank(
    backbone: Backbone, *, rank: int, alpha: float, targets: Sequence[str], dropout: float, also_train: Sequence[str]
) -> None:
    """Let low-rank updates be all of a backbone that is trained, but for the parts `also_train`."""
    trained = parameters_of(backbone, also_train)
    add_low_rank_updates(backbone, targets=targets, rank=rank, alpha=alpha, dropout=dropout, but_for=trained)
    trained |= update_parameters(backbone)
    for name, param in backbone.named_parameters():
        param.requires_grad_(name in trained)


def num_trained(network: nn.Module) -> int:
    """Count the values of a network that training may change."""
    return sum(param.numel() for param in network.parameters() if param.requires_grad)


def _parameters_of(backbone: Backbone, part: str) -> set[str]:
    blocks = block_range(part)
    names = [name for name, _ in backbone.named_parameters()]
    if blocks is not None:
        return {name for name in names if backbone.layer_id(name) - 1 in blocks}
    if part in _KINDS:
        modules = {name: module for name, module in backbone.named_modules() if isinstance(module, _KINDS[part])}
        return {f"{prefix}.{name}" for prefix, module in modules.items() for name, _ in module.named_parameters()}
    if part in ("patch_embed", "embeddings") and not hasattr(backbone, "patch_embed"):  # a ResNet
        return {name for name in names if backbone.layer_id(name) == 0}
    if part == "embeddings":
        return parameters_of(backbone, EMBEDDINGS)
    if part == "patch_embed":
        return {f"patch_embed.{name}" for name, _ in backbone.patch_embed.named_parameters()}
    return {name for name in _TOKENS.get(part, (part,)) if isinstance(getattr(backbone, name), torch.Tensor)}
