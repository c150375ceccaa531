"""Say in one sentence why weights do not fit a backbone: which setting is off, and what it should be.

File and model are described by the same function, from names and shapes, and compared in the order in which one
difference explains the next (another family or width changes every tensor).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import (
    Architecture,
    Shapes,
    arch_of_width,
    describe_architecture,
    describe_head,
    format_settings,
)

__all__ = ["explain_head_mismatch", "explain_mismatch"]

_FAMILIES = {"dinov1": "DINO (v1)", "dinov2": "DINOv2", "dinov3": "DINOv3"}
_PARTIAL = "set student.allow_partial_weights=true to load what fits"


@dataclass(frozen=True)
class _Difference:
    """One difference of architectures: what is so in the file and in the model, and settings that end it."""

    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    alternative: str = ""


def explain_mismatch(model: Shapes, file: Shapes, *, may_be_missing: Collection[str]) -> str | None:
    """Compare names and shapes.

    Args:
        model: state dict of the backbone.
        file: the same names of the file; tensors that can be resized already have the model's shape.
        may_be_missing: names of the model that the file need not have.

    Returns:
        None when the file fits, else a sentence that names the likely cause, and all settings that differ.
    """
    missing = [name for name in model if name not in file and name not in may_be_missing]
    unknown = [name for name in file if name not in model]
    reshaped = [name for name in model if name in file and model[name].shape != file[name].shape]
    if not (missing or unknown or reshaped):
        return None
    try:
        differences = _compare(describe_architecture(file), describe_architecture(model))
    except CheckpointError as error:  # the file has not even the parts that tell its architecture
        if not any(name in file and name not in reshaped for name in model):  # nothing to load in part either
            return str(error)
        return _coverage(model, file, missing=missing, unknown=unknown, reshaped=reshaped)
    if not differences:
        return _coverage(model, file, missing=missing, unknown=unknown, reshaped=reshaped)
    first, *others = differences
    sentence = first.text
    if first.settings:
        sentence += f"; set {format_settings(first.settings)}{first.alternative}"
    more = {key: value for other in others for key, value in other.settings.items() if key not in first.settings}
    return f"{sentence}, and {format_settings(more)}" if more else sentence


def _coverage(model: Shapes, file: Shapes, *, missing: list[str], unknown: list[str], reshaped: list[str]) -> str:
    if "pos_embed" in reshaped:
        return (
            f"its pos_embed has {file['pos_embed'].shape[1]} positions, which are not a class token and a square grid"
        )
    parts = [
        f"{what}: {len(names)} (first: {names[0]})"
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", reshaped))
        if names
    ]
    fitting = sum(name in file for name in model) - len(reshaped)
    return f"it holds {fitting} of the model's {len(model)} tensors; {', '.join(parts)}; {_PARTIAL}"


def _compare(file: Architecture, model: Architecture) -> list[_Difference]:
    resnet = _compare_resnets(file, model)
    if resnet:
        return [resnet]
    return [difference for explain in _EXPLANATIONS if (difference := explain(file, model))]


def _compare_resnets(file: Architecture, model: Architecture) -> _Difference | None:
    if "resnet" not in (file.family, model.family) or file.arch == model.arch:
        return None
    return _Difference(f"it is {_kind(file)} but the model is {_kind(model)}", _size_settings(file, model))


def _kind(architecture: Architecture) -> str:
    if architecture.family == "resnet":
        return f"a ResNet ({architecture.arch})"
    return f"a vision transformer ({architecture.arch or f'{architecture.embed_dim} features'})"


def _explain_family(file: Architecture, model: Architecture) -> _Difference | None:
    if file.has_rope == model.has_rope:
        return None
    positions = {True: "rotary positions", False: "learned positions"}
    text = (
        f"it is a {_FAMILIES[file.family]} backbone ({positions[file.has_rope]}) "
        f"but the model is a {_FAMILIES[model.family]} one ({positions[model.has_rope]})"
    )
    defaults = "dinov3" if file.has_rope else "dinov2"
    settings = {"student.pos_embed_type": "rope" if file.has_rope else "learned"}
    if file.norm_layer != model.norm_layer:
        settings["student.norm_layer"] = file.norm_layer
    return _Difference(text, settings, f" (or defaults={defaults})")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _size_settings(file: Architecture, model: Architecture) -> dict[str, Any]:
    """Name the size of the file; numbers that made a size without a name are taken back."""
    arch = file.arch or arch_of_width(file.embed_dim)  # for its number of heads, which the shapes do not tell
    if arch is None:
        depth = {} if file.depth == model.depth else {"student.depth": file.depth}
        return {"student.embed_dim": file.embed_dim} | depth
    if file.family == "resnet":
        return {"student.arch": arch} | ({} if model.family == "resnet" else {"ibot.loss_weight": 0})
    numbers = {} if model.arch else {"student.embed_dim": None, "student.depth": None, "student.num_heads": None}
    return {"student.arch": arch} | numbers | ({} if file.arch else {"student.depth": file.depth})


def _explain_width(file: Architecture, model: Architecture) -> _Difference | None:
    if file.embed_dim == model.embed_dim:
        return None
    text = f"its embedding has {file.embed_dim} features but the model's has {model.embed_dim}"
    return _Difference(text, _size_settings(file, model))


def _explain_depth(file: Architecture, model: Architecture) -> _Difference | None:
    if file.depth == model.depth or file.embed_dim != model.embed_dim:
        return None
    settings = _size_settings(file, model) if file.arch else {"student.depth": file.depth}
    return _Difference(f"it has {_count(file.depth, 'block')} but the model has {model.depth}", settings)


def _explain_heads(file: Architecture, model: Architecture) -> _Difference | None:
    """Compare heads of rotary positions, where the shapes tell them."""
    same_width = file.embed_dim == model.embed_dim
    if not (file.has_rope and model.has_rope and same_width) or file.num_heads == model.num_heads:
        return None
    if None in (file.num_heads, model.num_heads):
        return None
    return _Difference(
        f"it has {file.num_heads} attention heads but the model has {model.num_heads}",
        {"student.num_heads": file.num_heads},
    )


def _explain_ffn(file: Architecture, model: Architecture) -> _Difference | None:
    ratio = {}
    if abs(file.ffn_ratio - model.ffn_ratio) * file.embed_dim >= 16:  # more than rounding to multiples of 8 makes
        ratio = {"student.ffn_ratio": file.ffn_ratio}
    if file.ffn_layer != model.ffn_layer:
        text = f"its blocks have the FFN '{file.ffn_layer}' but the model's '{model.ffn_layer}'"
        return _Difference(text, {"student.ffn_layer": file.ffn_layer} | ratio)
    if file.ffn_hidden == model.ffn_hidden or not ratio and file.embed_dim != model.embed_dim:
        return None
    text = f"the FFN of its blocks is {file.ffn_hidden} wide but the model's is {model.ffn_hidden}"
    return _Difference(text, {"student.ffn_ratio": file.ffn_ratio})


def _explain_registers(file: Architecture, model: Architecture) -> _Difference | None:
    if file.num_registers == model.num_registers:
        return None
    text = f"it has {_count(file.num_registers, 'register token')} but the model has {model.num_registers}"
    return _Difference(text, {"student.num_register_tokens": file.num_registers})


def _explain_interpolation(file: Architecture, model: Architecture) -> _Difference | None:
    """Tell the rule by which DINOv2's models with registers resize their positions; the others' is the default."""
    if file.family != "dinov2" or file.num_registers == 0 or model.num_registers > 0:
        return None
    settings = {"student.interpolate_antialias": True, "student.interpolate_offset": 0.0}
    return _Difference("its positions are resized by another rule", settings)


def _explain_layer_scale(file: Architecture, model: Architecture) -> _Difference | None:
    if file.layerscale == model.layerscale:
        return None
    if file.layerscale:
        return _Difference("it has LayerScale but the model has none", {"student.layerscale": 1e-5})
    origin = "; it may come from DINO (v1)" if file.family == "dinov1" else ""
    return _Difference(f"it has no LayerScale but the model has{origin}", {"student.layerscale": None})


def _explain_norm(file: Architecture, model: Architecture) -> _Difference | None:
    is_rms = file.norm_layer == "rmsnorm"
    if is_rms == (model.norm_layer == "rmsnorm"):
        return None
    names = {True: "RMSNorm", False: "LayerNorm"}
    return _Difference(
        f"it has {names[is_rms]} but the model {names[not is_rms]}", {"student.norm_layer": file.norm_layer}
    )


def _explain_flag(name: str, what: str) -> Callable[[Architecture, Architecture], _Difference | None]:
    def explain(file: Architecture, model: Architecture) -> _Difference | None:
        want, have = getattr(model, name), getattr(file, name)
        if want == have:
            return None
        text = f"it has {what} but the model has none" if have else f"it lacks {what}, which the model has"
        return _Difference(text, {f"student.{name}": have})

    return explain


def _explain_extra(name: str, what: str) -> Callable[[Architecture, Architecture], _Difference | None]:
    """Compare a part that a file need not have."""

    def explain(file: Architecture, model: Architecture) -> _Difference | None:
        if not getattr(file, name) or getattr(model, name):
            return None
        return _Difference(f"it has {what} but the model has none", {f"student.{name}": True})

    return explain


_EXPLANATIONS: tuple[Callable[[Architecture, Architecture], _Difference | None], ...] = (
    _explain_family,
    _explain_width,
    _explain_depth,
    _explain_heads,
    _explain_ffn,
    _explain_registers,
    _explain_interpolation,
    _explain_layer_scale,
    _explain_norm,
    _explain_flag("qkv_bias", "biases of query, key and value"),
    _explain_flag("proj_bias", "biases of the attention's output"),
    _explain_flag("ffn_bias", "biases of the feed-forward part"),
    _explain_extra("mask_k_bias", "a mask for the bias of keys (bias_mask)"),
    _explain_flag("untie_cls_and_patch_norms", "an own norm for the class token (cls_norm)"),
    _explain_extra("untie_global_and_local_cls_norm", "an own norm for local crops (local_cls_norm)"),
)


def explain_head_mismatch(model: Shapes, file: Shapes) -> str | None:
    """Compare a projection head of a file with the model's; None where it fits, else what differs."""
    if model.keys() == file.keys() and all(model[name].shape == file[name].shape for name in model):
        return None
    have, want = describe_head(file), describe_head(model)
    if have is None or want is None:
        return "it is not a projection head of this kind"
    counts = {
        "num_prototypes": "prototypes",
        "bottleneck_dim": "bottleneck features",
        "hidden_dim": "hidden features",
        "num_layers": "layers",
        "in_dim": "input features",
    }
    parts = [
        f"it has {getattr(have, name)} {what}, the model {getattr(want, name)}"
        for name, what in counts.items()
        if getattr(have, name) != getattr(want, name)
    ]
    if have.weight_norm != want.weight_norm:
        has = have.weight_norm
        parts.append(f"it has {'' if has else 'no '}weight normalisation, the model has{' none' if has else ''}")
    return "; ".join(parts) or "its tensors have other names"
