"""Bring tensors that already have official names into the official shapes."""

import math
import re

import torch

from dinov2.hub.formats_naming import concatenate, constant, slice_part
from dinov2.hub.stored_tensor import State

_BLOCK = re.compile(r"^(blocks\.\d+\.)")
_LAYER = re.compile(r"^blocks\.\d+\.(?:attn\.proj|mlp\.\w+)\.weight$")


def normalise(state: State) -> set[str]:
    """Give tensors the official shape and, where two official names share a spelling, the right one; in place."""
    changed = _normalise_tokens(state)
    for block in dict.fromkeys(match[1] for name in state if (match := _BLOCK.match(name))):
        changed |= _normalise_ffn(state, f"{block}mlp.", has_rope="pos_embed" not in state)
    return changed


def _normalise_tokens(state: State) -> set[str]:
    changed = set()
    mask = state.get("mask_token")
    if mask is not None and len(mask.shape) == 3:
        state["mask_token"] = mask.map(mask.shape[1:], lambda values: values[0])
        changed.add("mask_token")
    positions = state.get("pos_embed")
    if positions is not None and _is_square(positions.shape[1]) and not _is_square(positions.shape[1] - 1):
        state["pos_embed"] = positions.map((1, positions.shape[1] + 1, positions.shape[2]), _add_class_position)
        changed.add("pos_embed")
    for name in ("register_tokens", "storage_tokens"):
        if name in state and state[name].shape[1] == 0:
            del state[name]
    return changed


def is_packed(state: State, mlp: str) -> bool:
    """Say whether `fc1` is twice as wide as the input of `fc2`: timm's packed gate and value."""
    names = (f"{mlp}fc1.weight", f"{mlp}fc2.weight")
    return all(name in state for name in names) and state[names[0]].shape[0] == 2 * state[names[1]].shape[1]


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _add_class_position(positions: torch.Tensor) -> torch.Tensor:
    """Put a position of zeros in front: the class token already holds its own."""
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def _normalise_ffn(state: State, mlp: str, *, has_rope: bool) -> set[str]:
    """Name the layers of one gated network: w12 and w3 with learned positions, w1, w2 and w3 with RoPE."""
    changed = set()

    def move(old: str, new: str) -> None:
        for kind in ("weight", "bias"):
            if (tensor := state.pop(f"{mlp}{old}.{kind}", None)) is not None:
                state[f"{mlp}{new}.{kind}"] = tensor
                changed.add(f"{mlp}{new}.{kind}")

    if is_packed(state, mlp):
        move("fc1", "w12")
    elif f"{mlp}w1.weight" in state and f"{mlp}w2.weight" not in state:
        move("fc1", "w2")
    if f"{mlp}w1.weight" in state or f"{mlp}w12.weight" in state:
        move("fc2", "w3")
    for kind in ("weight", "bias"):
        parts = [f"{mlp}w1.{kind}", f"{mlp}w2.{kind}"]
        whole = f"{mlp}w12.{kind}"
        if has_rope and whole in state:
            fused = state.pop(whole)
            state |= {name: slice_part(fused, part, 2) for part, name in enumerate(parts)}
            changed |= set(parts)
        elif not has_rope and parts[0] in state and parts[1] in state:
            state[whole] = concatenate([state.pop(name) for name in parts])
            changed.add(whole)
    return changed


def zero_biases(state: State) -> State:
    """Make the biases of a block's layers, queries, keys and values apart, that this backbone does without."""
    return {
        bias: constant(0, weight.shape[:1], weight.dtype)
        for name, weight in state.items()
        if _LAYER.search(name) and (bias := name.removesuffix("weight") + "bias") not in state
    }


def neutral_layer_scale(depth: int, width: int, dtype: torch.dtype) -> State:
    """Make LayerScales of one, for libraries that always have them."""
    names = (f"blocks.{i}.{name}.gamma" for i in range(depth) for name in ("ls1", "ls2"))
    return {name: constant(1, (width,), dtype) for name in names}
