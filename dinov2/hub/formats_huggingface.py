"""Hugging Face's names of DINO (`ViTModel`), DINOv2 and DINOv3, and the config.json that fits a backbone.

The first spelling is that of the files on the Hub, which `from_pretrained` reads and `save_pretrained` writes; the
second is that of `state_dict()` in transformers 5 where it differs.
"""

from typing import Any

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import Architecture
from dinov2.hub.formats_dinov3 import apply_bias_mask, has_key_bias, rope_base
from dinov2.hub.formats_naming import Naming, constant, layers, tensors
from dinov2.hub.formats_normalise import neutral_layer_scale, zero_biases
from dinov2.hub.stored_tensor import State

_ATTENTION = {
    "attn.qkv": [
        ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ],
    "attn.proj": ["attention.output.dense", "attention.o_proj"],
}
_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_LAYER_SCALE = tensors({"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"})
_TOKENS = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token"}
_POSITIONS = {"pos_embed": "embeddings.position_embeddings"}
_PROJECTION = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}

HF_DINOV2 = Naming(
    title="Hugging Face Dinov2Model",
    blocks=("encoder.layer.",),
    trunk=tensors(_TOKENS | _POSITIONS | {"register_tokens": "embeddings.register_tokens"}) | layers(_PROJECTION),
    block=_LAYER_SCALE
    | layers(
        _ATTENTION
        | _NORMS
        | {
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
            "mlp.w12": ["mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")],
            "mlp.w3": ["mlp.weights_out", "mlp.down_proj"],
        }
    ),
)
HF_VIT = Naming(
    title="Hugging Face ViTModel",
    blocks=("encoder.layer.", "layers."),
    trunk=tensors(_TOKENS | _POSITIONS) | layers(_PROJECTION),
    block=layers(
        _ATTENTION
        | {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "mlp.fc1": ["intermediate.dense", "mlp.fc1"],
            "mlp.fc2": ["output.dense", "mlp.fc2"],
        }
    ),
)
HF_DINOV3 = Naming(
    title="Hugging Face DINOv3ViT",
    blocks=("layer.", "model.layer."),
    trunk=tensors(_TOKENS | {"storage_tokens": "embeddings.register_tokens"})
    | layers({"patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"}),
    block=_LAYER_SCALE
    | layers(
        _NORMS
        | {
            "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attn.proj": "attention.o_proj",
            "mlp.fc1": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
            "mlp.w1": "mlp.gate_proj",
            "mlp.w2": "mlp.up_proj",
            "mlp.w3": "mlp.down_proj",
        }
    ),
)


def to_huggingface(state: State, architecture: Architecture) -> tuple[State, dict[str, Any]]:
    """Rename a backbone for `from_pretrained`; see `formats.from_official`."""
    width, dtype = architecture.embed_dim, state["norm.weight"].dtype
    neutral = neutral_layer_scale(architecture.depth, width, dtype) | {"mask_token": constant(0, (1, width), dtype)}
    filled = neutral | state
    if architecture.has_rope:
        written, config = _to_dinov3(filled, architecture)
    else:
        written, config = HF_DINOV2.write(zero_biases(state) | filled), _dinov2_config(architecture)
    return written, config | {"dtype": str(dtype).removeprefix("torch.")}


def _sizes(architecture: Architecture) -> dict[str, Any]:
    return {
        "hidden_size": architecture.embed_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "num_channels": architecture.in_chans,
        "patch_size": architecture.patch_size,
        "hidden_act": "gelu",
        "layerscale_value": 1.0,
    }


def _dinov2_config(architecture: Architecture) -> dict[str, Any]:
    has_registers = architecture.num_registers > 0
    kind = {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers"}
    config = _sizes(architecture) | {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "image_size": architecture.image_size,
        "layer_norm_eps": 1e-6,
        "mlp_ratio": _whole_ratio(architecture),
        "qkv_bias": architecture.qkv_bias,
        "use_swiglu_ffn": architecture.ffn_layer != "mlp",
    }
    return config | kind | {"num_register_tokens": architecture.num_registers} if has_registers else config


def _whole_ratio(architecture: Architecture) -> int:
    """Find the whole number from which transformers' rule makes the width of the feed-forward part."""
    width, hidden = architecture.embed_dim, architecture.ffn_hidden
    for ratio in range(1, 17):
        made = width * ratio if architecture.ffn_layer == "mlp" else (int(width * ratio * 2 / 3) + 7) // 8 * 8
        if made == hidden:
            return ratio
    raise CheckpointError(
        f"its feed-forward part has {hidden} features at a width of {width}, which no whole mlp_ratio of Hugging "
        "Face's Dinov2 gives; export it as timm or dinov2"
    )


def _to_dinov3(filled: State, architecture: Architecture) -> tuple[State, dict[str, Any]]:
    width, dtype = architecture.embed_dim, filled["norm.weight"].dtype
    filled = apply_bias_mask(filled)
    filled.setdefault("storage_tokens", constant(0, (1, 0, width), dtype))
    filled["mask_token"] = filled["mask_token"].map((1, 1, width), lambda token: token.reshape(1, 1, -1))
    base = rope_base(filled.pop("rope_embed.periods", None))
    key_bias = has_key_bias(filled)
    written = HF_DINOV3.write(filled)
    if not key_bias:
        written = {name: tensor for name, tensor in written.items() if not name.endswith("k_proj.bias")}
    return written, _sizes(architecture) | {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "image_size": 224,
        "intermediate_size": architecture.ffn_hidden,
        "use_gated_mlp": architecture.ffn_layer != "mlp",
        "hidden_act": "gelu" if architecture.ffn_layer == "mlp" else "silu",
        "layer_norm_eps": 1e-5,
        "rope_theta": base,
        "num_register_tokens": architecture.num_registers,
        "query_bias": architecture.qkv_bias,
        "key_bias": key_bias,
        "value_bias": architecture.qkv_bias,
        "proj_bias": architecture.proj_bias,
        "mlp_bias": architecture.ffn_bias,
    }
