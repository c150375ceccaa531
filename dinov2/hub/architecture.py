"""Read the architecture of a backbone from the names and shapes of its tensors, and say which settings build it.

Names are the official ones (DINOv2's, DINOv3's, torchvision's for ResNets). Nothing but `.shape` is asked of a tensor,
so a file's index or a model on the meta device will do.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dinov2.errors import CheckpointError
from dinov2.models.sizes import SIZES

__all__ = [
    "Architecture",
    "Head",
    "Shaped",
    "Shapes",
    "arch_of_width",
    "describe_architecture",
    "describe_head",
    "format_settings",
]


class Shaped(Protocol):
    """A tensor, or anything that knows its shape."""

    @property
    def shape(self) -> Any: ...


Shapes = Mapping[str, Shaped]

_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_NOT_PARAMETERS = re.compile(r"(^rope_embed\.periods|\.bias_mask|\.running_(mean|var)|\.num_batches_tracked)$")
# One of these tells which kind of positions a vision transformer has; some libraries do not keep RoPE's periods.
_POSITIONS = ("pos_embed", "rope_embed.periods", "storage_tokens", "blocks.0.attn.qkv.bias_mask")
# Blocks of the four stages, and whether a block is a bottleneck: torchvision's ResNets.
_RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What names and shapes tell of a backbone; fields of vision transformers keep their defaults in a ResNet."""

    family: str  # "dinov1" (no LayerScale, registers or mask token), "dinov2", "dinov3" or "resnet"
    arch: str | None  # name for student.arch; None: no named size has this width and depth
    embed_dim: int
    depth: int  # blocks
    in_chans: int
    num_parameters: int  # without buffers
    patch_size: int = 32  # px; of a ResNet: the stride of its last map
    num_heads: int | None = None  # None: the shapes do not tell, and it is no named size
    num_registers: int = 0
    ffn_layer: str = "mlp"
    ffn_hidden: int = 0  # width inside the feed-forward part
    layerscale: bool = False
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    mask_k_bias: bool = False
    norm_layer: str = "layernorm"
    untie_cls_and_patch_norms: bool = False
    untie_global_and_local_cls_norm: bool = False
    num_positions: int | None = None  # with the class token; None: rotary positions

    @property
    def has_rope(self) -> bool:
        """Say whether positions are rotary, as in DINOv3."""
        return self.family == "dinov3"

    @property
    def image_size(self) -> int | None:
        """Side of the images that learned positions are for, pixels; None for other positions or no square grid."""
        side = math.isqrt((self.num_positions or 1) - 1)
        return side * self.patch_size if side and side**2 + 1 == self.num_positions else None

    @property
    def ffn_ratio(self) -> float:
        """The `student.ffn_ratio` that gives `ffn_hidden`: nine decimals, rounded up because widths are cut off."""
        ratio = self.ffn_hidden / self.embed_dim * (1 if self.ffn_layer == "mlp" else 1.5)
        return math.ceil(ratio * 1e9) / 1e9

    def settings(self) -> dict[str, Any]:
        """Return the config keys, with values, that build this backbone.

        Number formats, RoPE's base and the order of registers do not show in shapes; a width that is no named size
        needs `student.num_heads` from elsewhere, when `num_heads` is None.
        """
        if self.family == "resnet":
            return {"student.arch": self.arch, "student.in_chans": self.in_chans, "ibot.loss_weight": 0}
        found = self._size() | {
            "student.patch_size": self.patch_size,
            "student.in_chans": self.in_chans,
            "student.ffn_layer": self.ffn_layer,
            "student.num_register_tokens": self.num_registers,
            "student.layerscale": 1e-5 if self.layerscale else None,
            "student.qkv_bias": self.qkv_bias,
            "student.proj_bias": self.proj_bias,
            "student.ffn_bias": self.ffn_bias,
            "student.pos_embed_type": "rope" if self.has_rope else "learned",
            "student.norm_layer": self.norm_layer,
            "student.mask_k_bias": self.mask_k_bias,
            "student.untie_cls_and_patch_norms": self.untie_cls_and_patch_norms,
            "student.untie_global_and_local_cls_norm": self.untie_global_and_local_cls_norm,
        }
        if self.family == "dinov2" and self.num_registers:  # DINOv2's models with registers were trained with these
            found |= {"student.interpolate_antialias": True, "student.interpolate_offset": 0.0}
        return found

    def _size(self) -> dict[str, Any]:
        base = self.arch or arch_of_width(self.embed_dim) or "vit_small"
        size: dict[str, Any] = {"student.arch": base}
        for key in ("embed_dim", "depth", "num_heads"):
            value = getattr(self, key)
            if value not in (None, SIZES[base][key]):
                size[f"student.{key}"] = value
        if not _ratio_fits(SIZES[base].get("mlp_ratio", 4.0), self):
            size["student.ffn_ratio"] = self.ffn_ratio
        return size


@dataclass(frozen=True, kw_only=True)
class Head:
    """What names and shapes tell of a DINO or iBOT head."""

    in_dim: int
    hidden_dim: int | None  # None: a single layer
    num_layers: int
    bottleneck_dim: int
    num_prototypes: int
    weight_norm: bool


def describe_architecture(state: Shapes) -> Architecture:
    """Read the architecture from the official names of a backbone.

    Args:
        state: names to anything with a shape; more names than the backbone's do not disturb.

    Raises:
        CheckpointError: it is neither a whole vision transformer nor a ResNet; a sentence without the file's name.
    """
    if "layer1.0.conv1.weight" in state and "conv1.weight" in state:
        return _describe_resnet(state)
    for name in ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        if name not in state:
            first = next(iter(state), None)
            raise CheckpointError(
                f"is not a whole backbone, it has no {name} (vision transformer) and no conv1.weight with "
                f"layer1.0.conv1.weight (ResNet); its first tensor is {first}"
            )
    if not any(name in state for name in _POSITIONS):
        raise CheckpointError(
            "is not a whole backbone, it has no pos_embed (DINOv2) and neither rope_embed.periods nor storage_tokens "
            "(DINOv3)"
        )
    return _describe_vit(state)


def _describe_vit(state: Shapes) -> Architecture:
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape  # [D, C, p, p]
    depth = len({match[1] for name in state if (match := _BLOCK.match(name))})
    ffn_layer, hidden = _ffn(state)
    is_rope = "pos_embed" not in state
    registers = state.get("storage_tokens", state.get("register_tokens"))
    layerscale = "blocks.0.ls1.gamma" in state
    arch = next((name for name, s in SIZES.items() if (s["embed_dim"], s["depth"]) == (embed_dim, depth)), None)
    is_v1 = not (layerscale or registers is not None or "mask_token" in state)
    return Architecture(
        family="dinov3" if is_rope else "dinov1" if is_v1 else "dinov2",
        arch=arch,
        embed_dim=embed_dim,
        depth=depth,
        in_chans=in_chans,
        num_parameters=_num_parameters(state),
        patch_size=patch_size,
        num_heads=_num_heads(state, embed_dim, arch),
        num_registers=0 if registers is None else registers.shape[1],
        ffn_layer=ffn_layer,
        ffn_hidden=hidden,
        layerscale=layerscale,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        proj_bias="blocks.0.attn.proj.bias" in state,
        ffn_bias=any(f"blocks.0.mlp.{name}.bias" in state for name in ("fc1", "w12", "w1")),
        mask_k_bias="blocks.0.attn.qkv.bias_mask" in state,
        norm_layer="rmsnorm" if "blocks.0.norm1.bias" not in state else "layernormbf16" if is_rope else "layernorm",
        untie_cls_and_patch_norms="cls_norm.weight" in state,
        untie_global_and_local_cls_norm="local_cls_norm.weight" in state,
        num_positions=None if is_rope else state["pos_embed"].shape[1],
    )


def _ffn(state: Shapes) -> tuple[str, int]:
    mlp = "blocks.0.mlp."
    if f"{mlp}w12.weight" in state:
        return "swiglufused", state[f"{mlp}w12.weight"].shape[0] // 2
    if f"{mlp}w1.weight" in state:
        return "swiglu", state[f"{mlp}w1.weight"].shape[0]
    return "mlp", state[f"{mlp}fc1.weight"].shape[0] if f"{mlp}fc1.weight" in state else 0


def _num_heads(state: Shapes, embed_dim: int, arch: str | None) -> int | None:
    if "rope_embed.periods" in state:  # one period for every fourth feature of a head
        return embed_dim // (4 * state["rope_embed.periods"].shape[0])
    return None if arch is None else SIZES[arch]["num_heads"]


def arch_of_width(embed_dim: int) -> str | None:
    """Name the first size of this width, if there is one."""
    return next((name for name, size in SIZES.items() if size["embed_dim"] == embed_dim), None)


def _ratio_fits(ratio: float, architecture: Architecture) -> bool:
    """Say whether a ratio gives the hidden width, by the rule of the layer."""
    hidden = int(architecture.embed_dim * ratio)
    if architecture.ffn_layer == "mlp":
        return hidden == architecture.ffn_hidden
    return -(-int(hidden * 2 / 3) // 8) * 8 == architecture.ffn_hidden


def _describe_resnet(state: Shapes) -> Architecture:
    blocks = tuple(
        len({name.split(".")[1] for name in state if name.startswith(f"layer{stage}.")}) for stage in (1, 2, 3, 4)
    )
    is_bottleneck = "layer1.0.conv3.weight" in state
    arch = _RESNETS.get((blocks, is_bottleneck))
    if arch is None:
        raise CheckpointError(
            f"is a ResNet with {', '.join(map(str, blocks))} blocks in its stages, which is none of "
            f"{', '.join(_RESNETS.values())}"
        )
    last = f"layer4.0.conv{3 if is_bottleneck else 2}.weight"
    return Architecture(
        family="resnet",
        arch=arch,
        embed_dim=state[last].shape[0],
        depth=sum(blocks),
        in_chans=state["conv1.weight"].shape[1],
        num_parameters=_num_parameters(state),
    )


def _num_parameters(state: Shapes) -> int:
    return sum(math.prod(tensor.shape) for name, tensor in state.items() if not _NOT_PARAMETERS.search(name))


def describe_head(state: Shapes) -> Head | None:
    """Read the sizes of a projection head (`mlp.0.weight`, ..., `last_layer.weight_v`); None if it is not one."""
    weight_norm = "last_layer.weight_v" in state
    last = state.get("last_layer.weight_v" if weight_norm else "last_layer.weight")
    layers = [tensor for name, tensor in state.items() if re.fullmatch(r"mlp\.(\d+\.)?weight", name)]
    layers = [tensor for tensor in layers if len(tensor.shape) == 2]  # leaves out batch normalisation
    if last is None or not layers:
        return None
    return Head(
        in_dim=layers[0].shape[1],
        hidden_dim=layers[0].shape[0] if len(layers) > 1 else None,
        num_layers=len(layers),
        bottleneck_dim=last.shape[1],
        num_prototypes=last.shape[0],
        weight_norm=weight_norm,
    )


def format_settings(settings: Mapping[str, Any]) -> str:
    """Write settings as a command line takes them: `student.arch=vit_small student.layerscale=null`."""
    return " ".join(f"{key}={_format_value(value)}" for key, value in settings.items())


def _format_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
