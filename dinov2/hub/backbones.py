"""The released backbones by their official names, with random weights or those of a file.

    model = dinov2_vits14_reg(weights="dinov2_vits14_reg4_pretrain.pth")
    model = dinov3_vits16(pretrained=True)                # from Hugging Face
    model = dinov2_vitl14(weights="hf:facebook/dinov2-large", img_size=224)

Models come in training mode, as in the parents' hubs: call `.eval()` before using features. Overrides are arguments of
`DinoVisionTransformer` (or `ResNet`); DINOv3's names for them are known too, and `block_chunks` has no effect.

Source: names and numbers of the parents' `hub/backbones.py`; ResNets are torchvision's.
"""

import difflib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dinov2.errors import CheckpointError
from dinov2.hub.weights import load_backbone_weights
from dinov2.models import RESNETS, DinoVisionTransformer, ResNet, build_model

Weights = str | Path | None

_V2 = {"patch_size": 14, "img_size": 518, "init_values": 1.0}
_V2_GIANT = {"arch": "vit_giant2", "ffn_layer": "swiglufused"}
_REG = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
_V3 = {
    "patch_size": 16,
    "img_size": 224,
    "init_values": 1e-5,
    "num_register_tokens": 4,
    "norm_layer": "layernormbf16",
    "mask_k_bias": True,
    "pos_embed_type": "rope",
    "pos_embed_rope_rescale_coords": 2.0,
    "pos_embed_rope_dtype": "fp32",
}
_V3_PLUS = {"mlp_ratio": 6.0, "ffn_layer": "swiglu"}
_V3_7B = {"ffn_layer": "swiglu64", "qkv_bias": False, "untie_global_and_local_cls_norm": True}

BACKBONES: dict[str, dict[str, Any]] = {  # arguments of `build_model`
    "dinov2_vits14": _V2 | {"arch": "vit_small"},
    "dinov2_vitb14": _V2 | {"arch": "vit_base"},
    "dinov2_vitl14": _V2 | {"arch": "vit_large"},
    "dinov2_vitg14": _V2 | _V2_GIANT,
    "dinov2_vits14_reg": _V2 | _REG | {"arch": "vit_small"},
    "dinov2_vitb14_reg": _V2 | _REG | {"arch": "vit_base"},
    "dinov2_vitl14_reg": _V2 | _REG | {"arch": "vit_large"},
    "dinov2_vitg14_reg": _V2 | _REG | _V2_GIANT,
    "dinov3_vits16": _V3 | {"arch": "vit_small"},
    "dinov3_vits16plus": _V3 | _V3_PLUS | {"arch": "vit_small"},
    "dinov3_vitb16": _V3 | {"arch": "vit_base"},
    "dinov3_vitl16": _V3 | {"arch": "vit_large"},
    "dinov3_vitl16plus": _V3 | _V3_PLUS | {"arch": "vit_large"},
    "dinov3_vith16plus": _V3 | _V3_PLUS | {"arch": "vit_huge2"},
    "dinov3_vit7b16": _V3 | _V3_7B | {"arch": "vit_7b"},
    **{name: {"arch": name} for name in RESNETS},
}
PRETRAINED: dict[str, str] = {  # where `pretrained=True` finds weights
    **{
        f"dinov2_vit{size[0]}14{suffix}": f"hf:facebook/dinov2-{infix}{size}"
        for size in ("small", "base", "large", "giant")
        for suffix, infix in (("", ""), ("_reg", "with-registers-"))
    },
    **{
        f"dinov3_{size}": f"hf:facebook/dinov3-{size}-pretrain-lvd1689m"
        for size in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")
    },
    **{name: f"timm:{name}.tv_in1k" for name in RESNETS},
}
_DINOV3_NAMES = {"ffn_ratio": "mlp_ratio", "n_storage_tokens": "num_register_tokens", "layerscale_init": "init_values"}


def make_backbone(
    name: str, *, pretrained: bool = False, weights: Weights = None, **overrides: Any
) -> DinoVisionTransformer | ResNet:
    """Build a released backbone, on the CPU.

    Args:
        name: a key of `BACKBONES`.
        pretrained: without `weights`, load those of `PRETRAINED` through the package that has them.
        weights: file, model folder or name (`timm:...`, `hf:...`) to load, see `dinov2.hub.weights`; it must fill the
            whole backbone, whose positions, patch size and channels it is fitted to.
        overrides: settings that replace those of `BACKBONES`.

    Raises:
        CheckpointError: the weights cannot be found or read, or do not fit.
        ConfigError: an override has an impossible value.
        TypeError: the model has no such setting.
        ValueError: there is no such backbone.
    """
    if name not in BACKBONES:
        raise ValueError(f"{name}: is no released backbone{_nearest(name, BACKBONES)}")
    settings = BACKBONES[name] | _known(name, overrides)
    if weights is None and pretrained:
        if name not in PRETRAINED:
            raise CheckpointError(f"{name}: has no weights on the Hugging Face hub; pass weights=FILE with Meta's .pth")
        weights = PRETRAINED[name]
    if weights is None:
        return build_model(**settings)
    with torch.device("meta"):
        model = build_model(**settings)
    load_backbone_weights(model, weights)
    return model


def _known(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Give overrides this project's names; raise TypeError for one that is no setting of the model."""
    model = ResNet if name in RESNETS else DinoVisionTransformer
    known = inspect.signature(model).parameters.keys() - {"arch"}
    found = {}
    for given, value in overrides.items():
        setting = _DINOV3_NAMES.get(given, given)
        if setting == "block_chunks" and model is DinoVisionTransformer:
            continue  # the official code's blocks in chunks compute the same
        if setting not in known:
            raise TypeError(f"{name}() has no setting '{given}'{_nearest(given, known)}")
        found[setting] = value
    return found


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f"; nearest: {close[0]}" if close else ""


def dinov2_vits14(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv2's ViT-S/14; see `make_backbone` for the arguments."""
    return make_backbone("dinov2_vits14", pretrained=pretrained, weights=weights, **overrides)


def dinov2_vitb14(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv2's ViT-B/14; see `make_backbone` for the arguments."""
    return make_backbone("dinov2_vitb14", pretrained=pretrained, weights=weights, **overrides)


def dinov2_vitl14(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv2's ViT-L/14; see `make_backbone` for the arguments."""
    return make_backbone("dinov2_vitl14", pretrained=pretrained, weights=weights, **overrides)


def dinov2_vitg14(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv2's ViT-g/14; see `make_backbone` for the arguments."""
    return make_backbone("dinov2_vitg14", pretrained=pretrained, weights=weights, **overrides)


def dinov2_vits14_reg(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv2's ViT-S/14 with 4 registers; see `make_backbone` for the arguments."""
    return make_backbone("dinov2_vits14_reg", pretrained=pretrained, weights=weights, **overrides)


def dinov2_vitb14_reg(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv2's ViT-B/14 with 4 registers; see `make_backbone` for the arguments."""
    return make_backbone("dinov2_vitb14_reg", pretrained=pretrained, weights=weights, **overrides)


def dinov2_vitl14_reg(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv2's ViT-L/14 with 4 registers; see `make_backbone` for the arguments."""
    return make_backbone("dinov2_vitl14_reg", pretrained=pretrained, weights=weights, **overrides)


def dinov2_vitg14_reg(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv2's ViT-g/14 with 4 registers; see `make_backbone` for the arguments."""
    return make_backbone("dinov2_vitg14_reg", pretrained=pretrained, weights=weights, **overrides)


def dinov3_vits16(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv3's ViT-S/16; see `make_backbone` for the arguments."""
    return make_backbone("dinov3_vits16", pretrained=pretrained, weights=weights, **overrides)


def dinov3_vits16plus(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv3's ViT-S+/16; see `make_backbone` for the arguments."""
    return make_backbone("dinov3_vits16plus", pretrained=pretrained, weights=weights, **overrides)


def dinov3_vitb16(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv3's ViT-B/16; see `make_backbone` for the arguments."""
    return make_backbone("dinov3_vitb16", pretrained=pretrained, weights=weights, **overrides)


def dinov3_vitl16(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv3's ViT-L/16; see `make_backbone`. Satellite weights: `untie_global_and_local_cls_norm=True`."""
    return make_backbone("dinov3_vitl16", pretrained=pretrained, weights=weights, **overrides)


def dinov3_vitl16plus(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv3's ViT-L+/16; see `make_backbone` for the arguments."""
    return make_backbone("dinov3_vitl16plus", pretrained=pretrained, weights=weights, **overrides)


def dinov3_vith16plus(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv3's ViT-H+/16; see `make_backbone` for the arguments."""
    return make_backbone("dinov3_vith16plus", pretrained=pretrained, weights=weights, **overrides)


def dinov3_vit7b16(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> DinoVisionTransformer:
    """Build DINOv3's ViT-7B/16; see `make_backbone` for the arguments."""
    return make_backbone("dinov3_vit7b16", pretrained=pretrained, weights=weights, **overrides)


def resnet18(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> ResNet:
    """Build torchvision's ResNet-18 without its classifier; see `make_backbone` for the arguments."""
    return make_backbone("resnet18", pretrained=pretrained, weights=weights, **overrides)


def resnet34(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> ResNet:
    """Build torchvision's ResNet-34 without its classifier; see `make_backbone` for the arguments."""
    return make_backbone("resnet34", pretrained=pretrained, weights=weights, **overrides)


def resnet50(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> ResNet:
    """Build torchvision's ResNet-50 without its classifier; see `make_backbone` for the arguments."""
    return make_backbone("resnet50", pretrained=pretrained, weights=weights, **overrides)


def resnet101(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> ResNet:
    """Build torchvision's ResNet-101 without its classifier; see `make_backbone` for the arguments."""
    return make_backbone("resnet101", pretrained=pretrained, weights=weights, **overrides)


def resnet152(*, pretrained: bool = False, weights: Weights = None, **overrides: Any) -> ResNet:
    """Build torchvision's ResNet-152 without its classifier; see `make_backbone` for the arguments."""
    return make_backbone("resnet152", pretrained=pretrained, weights=weights, **overrides)
