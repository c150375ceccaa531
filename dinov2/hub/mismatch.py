"""Say in one sentence why a state dict does not fit a backbone: which setting is off, and what it should be.

The settings are read from tensor names and shapes, the same way for the file and for the model, and compared in the
order in which one explains the next (a wrong width makes every tensor differ).
"""

import re
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

State = Mapping[str, Tensor]

_SIZES = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large", 1536: "vit_giant2"}
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_FOREIGN = (
    ("embeddings.patch_embeddings", "Hugging Face transformers"),
    ("embeddings.cls_token", "Hugging Face transformers"),
    ("reg_token", "timm"),
    ("rope_embed.periods", "DINOv3"),
    ("storage_tokens", "DINOv3"),
)


def explain_mismatch(model: State, file: State, *, may_be_missing: Collection[str]) -> str | None:
    """Compare names and shapes.

    Args:
        model: state dict of the backbone.
        file: state dict with the official names.
        may_be_missing: names that the file need not have.

    Returns:
        None when the file fits, else a sentence that names the likely cause.
    """
    missing = [name for name in model if name not in file and name not in may_be_missing]
    unexpected = [name for name in file if name not in model]
    reshaped = [name for name in model if name in file and model[name].shape != file[name].shape]
    if not (missing or unexpected or reshaped):
        return None
    for start, origin in _FOREIGN:
        if any(name.startswith(start) for name in unexpected):
            return f"holds a backbone with the names of {origin}, which cannot be read here; use DINOv2's own .pth file"
    if "cls_token" not in file or "patch_embed.proj.weight" not in file:
        return (
            f"is not a vision transformer of DINOv2 (no cls_token or patch_embed); its first name is {next(iter(file))}"
        )
    for explain in _EXPLANATIONS:
        sentence = explain(model, file)
        if sentence:
            return sentence
    parts = [
        f"{len(names)} {what} (first: {names[0]})"
        for names, what in ((missing, "tensors missing"), (unexpected, "unknown"), (reshaped, "of another shape"))
        if names
    ]
    return f"does not fit the model: {', '.join(parts)}"


def _explain_width(model: State, file: State) -> str | None:
    want, have = model["cls_token"].shape[-1], file["cls_token"].shape[-1]
    if want == have:
        return None
    size = f"; set student.arch={_SIZES[have]}" if have in _SIZES else f"; set student.embed_dim={have}"
    return f"its embedding has {have} features but the model's has {want}{size}"


def _explain_depth(model: State, file: State) -> str | None:
    want, have = _num_blocks(model), _num_blocks(file)
    return None if want == have else f"it has {have} blocks but the model has {want}; set student.arch or student.depth"


def _num_blocks(state: State) -> int:
    return len({match[1] for name in state if (match := _BLOCK.match(name))})


def _explain_ffn(model: State, file: State) -> str | None:
    want, have = _ffn(model), _ffn(file)
    return (
        None
        if want == have
        else f"its blocks have the FFN '{have}' but the model's '{want}'; set student.ffn_layer={have}"
    )


def _ffn(state: State) -> str:
    return "swiglufused" if "blocks.0.mlp.w12.weight" in state else "mlp"


def _explain_registers(model: State, file: State) -> str | None:
    want, have = _num_registers(model), _num_registers(file)
    if want == have:
        return None
    return f"it has {have} register tokens but the model has {want}; set student.num_register_tokens={have}"


def _num_registers(state: State) -> int:
    return state["register_tokens"].shape[1] if "register_tokens" in state else 0


def _explain_layer_scale(model: State, file: State) -> str | None:
    want, have = "blocks.0.ls1.gamma" in model, "blocks.0.ls1.gamma" in file
    if want == have:
        return None
    if have:
        return "it has LayerScale but the model has none; set student.layerscale=1e-5"
    return "it has no LayerScale but the model has; set student.layerscale=null"


def _explain_patch_embed(model: State, file: State) -> str | None:
    name = "patch_embed.proj.weight"  # [D, channels, p, p]
    want, have = model[name].shape, file[name].shape
    if want[-1] != have[-1]:
        return f"its patch size is {have[-1]} but the model's is {want[-1]}; set student.patch_size={have[-1]}"
    if want[1] != have[1]:
        return f"it takes images of {have[1]} channels but the model takes {want[1]}; set student.in_chans={have[1]}"
    return None


def _explain_positions(model: State, file: State) -> str | None:
    want, have = model["pos_embed"].shape[1], file["pos_embed"].shape[1]
    if want == have:
        return None
    return f"its pos_embed has {have} positions, which are not a class token and a square grid; the model has {want}"


_EXPLANATIONS: tuple[Callable[[State, State], str | None], ...] = (
    _explain_width,
    _explain_depth,
    _explain_ffn,
    _explain_registers,
    _explain_layer_scale,
    _explain_patch_embed,
    _explain_positions,
)
