"""timm's names of DINOv2 (`VisionTransformer`) and DINOv3 (`Eva`), and the timm model that fits a backbone.

timm keeps no mask token, no RoPE periods and no bias of DINOv3's keys. Its DINOv2 models with registers hold the class
token with its position added, and the positions of the patches alone.
"""

from typing import Any

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import Architecture
from dinov2.hub.formats_dinov3 import apply_bias_mask, has_key_bias, rope_base
from dinov2.hub.formats_naming import Naming, change, layers, tensors
from dinov2.hub.formats_normalise import neutral_layer_scale, zero_biases
from dinov2.hub.formats_official import OFFICIAL
from dinov2.hub.stored_tensor import State

TIMM_DINOV2 = Naming(
    title="timm DINOv2",
    blocks=OFFICIAL.blocks,
    trunk=change(OFFICIAL.trunk, tensors({"register_tokens": "reg_token"})),
    block=change(OFFICIAL.block, layers({"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"})),
)
TIMM_DINOV3 = Naming(
    title="timm DINOv3",
    blocks=OFFICIAL.blocks,
    trunk=change(OFFICIAL.trunk, tensors({"storage_tokens": "reg_token"})),
    block=change(
        OFFICIAL.block,
        tensors(
            {
                "attn.qkv.bias": [
                    ("attn.q_bias", None, "attn.v_bias"),
                    ("attn.q_proj.bias", None, "attn.v_proj.bias"),
                ],
                "ls1.gamma": "gamma_1",
                "ls2.gamma": "gamma_2",
            }
        )
        | layers({"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}),
    ),
)

_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge_plus", 1536: "giant", 4096: "7b"}
_DINOV3_SIZES = {  # (gated, with bias) to the sizes that timm has
    (False, False): ("small", "base", "large"),
    (False, True): ("tiny", "small", "base", "large"),
    (True, False): ("small_plus", "huge_plus", "7b"),
    (True, True): ("small_plus", "huge_plus"),
}


def to_timm(state: State, architecture: Architecture) -> tuple[State, dict[str, Any]]:
    """Rename a backbone for `timm.create_model`; see `formats.from_official`."""
    if architecture.family == "resnet":
        return dict(state), _config(architecture.arch, {"in_chans": architecture.in_chans}, 224, first="conv1")
    kept = {name: tensor for name, tensor in state.items() if name != "mask_token"}
    kept = neutral_layer_scale(architecture.depth, architecture.embed_dim, state["norm.weight"].dtype) | kept
    kept |= zero_biases(kept)
    return _to_dinov3(kept, architecture) if architecture.has_rope else _to_dinov2(kept, architecture)


def _to_dinov2(state: State, architecture: Architecture) -> tuple[State, dict[str, Any]]:
    has_registers, gated = architecture.num_registers > 0, architecture.ffn_layer != "mlp"
    if has_registers:
        token, positions = state["cls_token"], state["pos_embed"]
        state["cls_token"] = token.map(token.shape, lambda values: values + positions.read()[:, :1])
        patches_only = (1, positions.shape[1] - 1, positions.shape[2])
        state["pos_embed"] = positions.map(patches_only, lambda values: values[:, 1:])
    size = _SIZES.get(architecture.embed_dim, "small")
    if size not in ("small", "base", "large", "giant") or gated != (size == "giant"):
        size = "giant" if gated else "small"  # any that has the layers; all numbers are given below
    model_args = _sizes(architecture, 2 if gated else 1) | {
        "img_size": architecture.image_size,
        "reg_tokens": architecture.num_registers,
        "no_embed_class": has_registers,
    }
    name = f"vit_{size}_patch14{'_reg4' if has_registers else ''}_dinov2"
    return TIMM_DINOV2.write(state), _config(name, model_args, architecture.image_size)


def _to_dinov3(state: State, architecture: Architecture) -> tuple[State, dict[str, Any]]:
    state = apply_bias_mask(state)
    base = rope_base(state.pop("rope_embed.periods", None))
    if has_key_bias(state):
        raise CheckpointError("its keys have a bias, for which timm's DINOv3 has no place; export it as hf or dinov2")
    gated = architecture.ffn_layer != "mlp"
    size = _SIZES.get(architecture.embed_dim, "small")
    known = _DINOV3_SIZES[gated, architecture.qkv_bias]
    size = next((name for name in (f"{size}_plus", size) if name in known), known[0])
    model_args = _sizes(architecture, 1) | {
        "num_reg_tokens": architecture.num_registers,
        "rope_temperature": base,
        "swiglu_mlp": gated,
        "swiglu_align_to": 8 if gated else 0,
    }
    name = f"vit_{size}_patch16_dinov3{'_qkvb' if architecture.qkv_bias else ''}"
    return TIMM_DINOV3.write(state), _config(name, model_args, 256)


def _sizes(architecture: Architecture, widths_in_first_layer: int) -> dict[str, Any]:
    width, hidden = architecture.embed_dim, architecture.ffn_hidden * widths_in_first_layer
    return {
        "patch_size": architecture.patch_size,
        "in_chans": architecture.in_chans,
        "embed_dim": width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "mlp_ratio": hidden / width if hidden % width == 0 else (hidden + 0.5) / width,  # timm cuts the product off
        "qkv_bias": architecture.qkv_bias,
        "init_values": 1e-5,
    }


def _config(
    name: str, model_args: dict[str, Any], image_size: int, *, first: str = "patch_embed.proj"
) -> dict[str, Any]:
    """Write timm's config.json; with `model.safetensors` beside it, `timm.create_model("local-dir:...")` reads both."""
    return {
        "architecture": name,
        "num_classes": 0,
        "model_args": model_args,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [model_args["in_chans"], image_size, image_size],
            "interpolation": "bicubic",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "first_conv": first,
            "classifier": "fc" if first == "conv1" else "head",
        },
    }
