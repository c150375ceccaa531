"""Load a backbone's weights from a file, whole or not at all, and say what was loaded.

Loading is planned first, from names and shapes alone: which network of the file, which naming, what is converted,
resized, missing, unused, and whether it fits. Tensors are then read one at a time, so that a model needs its own
memory and that of one tensor.
"""

import functools
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov2.errors import CheckpointError
from dinov2.hub.architecture import Architecture, describe_architecture
from dinov2.hub.formats import Converted, another_network, to_official
from dinov2.hub.low_rank import refuse_unmerged_updates
from dinov2.hub.mismatch import explain_head_mismatch, explain_mismatch
from dinov2.hub.open_weights import open_weights
from dinov2.hub.report import LoadReport
from dinov2.hub.resize import fit_sizes
from dinov2.hub.stored_tensor import State
from dinov2.hub.weights_file import WeightsFile

__all__ = [
    "LoadReport",
    "WeightsPlan",
    "choose_network",
    "describe_backbone",
    "explain_number_format",
    "load_backbone_weights",
    "open_weights",
    "plan_head",
    "plan_weights",
    "refuse_non_finite",
    "with_masks",
]

logger = logging.getLogger(__name__)

# Not in every released or converted file: used in training only, or the same in every model.
MAY_BE_MISSING = re.compile(
    r"mask_token|rope_embed\.periods|blocks\.\d+\.attn\.qkv\.bias_mask|local_cls_norm\.(weight|bias)"
    r"|.+\.num_batches_tracked"
)
_NETWORKS = ("teacher", "student")


@dataclass(frozen=True, kw_only=True)
class WeightsPlan:
    """How to fill a backbone. Reading a tensor of `state` or `heads` raises CheckpointError if it is not finite."""

    state: State  # the model's names; converted and resized when read
    missing: tuple[str, ...]  # names of the model that keep their initial values
    heads: dict[str, State]  # projection heads of the file: dino_head, ibot_head; see `plan_head`
    report: LoadReport


def plan_weights(
    model: nn.Module,
    weights: str | Path | WeightsFile,
    *,
    checkpoint_key: str | None = None,
    allow_partial: bool = False,
) -> WeightsPlan:
    """Find out, from names and shapes alone, how a file fills a backbone.

    Args:
        model: backbone, on any device, the meta device too; left unchanged.
        weights: a path or name that `open_weights` takes, or what it returned.
        checkpoint_key: which network to take from a file that holds several, `teacher` or `student`; None: the
            teacher, or the student of a file without one.
        allow_partial: leave the rest at its initial values where the file has less than the whole backbone.

    Raises:
        CheckpointError: the file cannot be read, or does not fit (with its likely cause), or fits in nothing.
    """
    file = weights if isinstance(weights, WeightsFile) else open_weights(weights)
    key = choose_network(file, checkpoint_key)
    converted = to_official(file.states[key], path=file.path, network=checkpoint_key)
    own = model.state_dict()
    implied = {name: tensor for name, tensor in converted.implied.items() if name in own}
    fitted, resized = fit_sizes(model, own, implied | converted.state)
    may_be_missing = [name for name in own if MAY_BE_MISSING.fullmatch(name)]
    problem = explain_mismatch(own, fitted, may_be_missing=may_be_missing)
    usable = {name: fitted[name] for name in own if name in fitted and fitted[name].shape == own[name].shape}
    if allow_partial and usable:
        problem = None
    if problem := problem or _explain_heads(file, model) or explain_number_format(own, usable):
        raise CheckpointError(f"{file.path}: {problem}")
    return WeightsPlan(
        state=refuse_non_finite(usable, path=file.path),
        missing=tuple(name for name in own if name not in usable),
        heads={name: refuse_non_finite(head, path=file.path) for name, head in converted.heads.items()},
        report=_report(file, key or None, own=own, converted=converted, usable=usable, resized=resized),
    )


def choose_network(file: WeightsFile, checkpoint_key: str | None) -> str:
    """Choose the key of `file.states` to load: the one asked for, else the only network, however it is wrapped.

    None asks for the teacher, and takes the student where there is nothing else.

    Raises:
        CheckpointError: there is no network, or only another than the one asked for, or its weights have low-rank
            updates beside them.
    """
    key = _find_network(file, checkpoint_key)
    refuse_unmerged_updates(file.states[key], path=file.path)
    return key


def _find_network(file: WeightsFile, checkpoint_key: str | None) -> str:
    states = file.states
    if not states:
        keys = f" ({', '.join(file.extra_keys)})" if file.extra_keys else ""
        raise CheckpointError(
            f"{file.path}: holds no network{keys}; give the file of the model, e.g. teacher_checkpoint.pth"
        )
    wanted = checkpoint_key or _NETWORKS[0]
    if wanted in states:
        return wanted
    if wanted not in _NETWORKS:
        present = ", ".join(filter(None, states)) or "teacher, student"
        raise CheckpointError(f"{file.path}: has no '{wanted}'; use one of {present}")
    wrappers = [key for key in ("", "model", "state_dict") if key in states]
    wrappers += [key for key in states if key not in (*_NETWORKS, *wrappers)]
    if not wrappers and checkpoint_key:
        raise CheckpointError(another_network(file.path, wanted, next(iter(states))))
    return next(iter(wrappers or states))


def with_masks(converted: Converted) -> State:
    """Return the backbone's tensors, with the masks of key biases that timm and Hugging Face leave out."""
    masks = {
        name: tensor
        for name, tensor in converted.implied.items()
        if name.endswith(".bias_mask") and name.removesuffix("_mask") in converted.state
    }
    return masks | converted.state


def describe_backbone(file: WeightsFile, converted: Converted) -> Architecture:
    """Describe the backbone of a file; its heads follow from a config beside the weights, if there is one.

    Raises:
        CheckpointError: it is no backbone, or only a part; a sentence without the file's name.
    """
    architecture = describe_architecture(with_masks(converted))
    return replace(architecture, num_heads=_stated_heads(file) or architecture.num_heads)


def _stated_heads(file: WeightsFile) -> int | None:
    """Return the attention heads that a config beside the weights states: of Hugging Face, or of timm."""
    config = file.config or {}
    num_heads = config.get("num_attention_heads") or (config.get("model_args") or {}).get("num_heads")
    return num_heads if isinstance(num_heads, int) else None


def _explain_heads(file: WeightsFile, model: nn.Module) -> str | None:
    """Compare the attention heads, which do not show in shapes, where both sides state them."""
    have, want = _stated_heads(file), getattr(model, "num_heads", None)
    if None in (have, want) or have == want:
        return None
    return f"its config states {have} attention heads but the model has {want}; set student.num_heads={have}"


def explain_number_format(own: Mapping[str, Tensor], state: State) -> str | None:
    """Find whole numbers where a model has others: quantised weights, which are nothing without their scales."""
    for name, tensor in state.items():
        quantised = own[name].is_floating_point() and not tensor.dtype.is_floating_point
        if quantised and not MAY_BE_MISSING.fullmatch(name):
            kind = str(tensor.dtype).removeprefix("torch.")
            return f"{name} holds numbers of type {kind}, as quantised models do; give weights of float32 or bfloat16"
    return None


def refuse_non_finite(state: State, *, path: str) -> State:
    """Make reading a tensor with NaN or infinity raise CheckpointError."""

    def check(name: str, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise CheckpointError(
                f"{path}: {name} holds NaN or infinity; the file is damaged, or its training had diverged"
            )
        return tensor

    return {name: tensor.map(tensor.shape, functools.partial(check, name)) for name, tensor in state.items()}


def _is_finite(tensor: Tensor) -> bool:
    """Look at the smallest and the largest value, which needs no second tensor; NaN is both."""
    if tensor.numel() == 0:
        return True
    comparable = tensor if tensor.dtype.itemsize > 1 else tensor.float()  # 8-bit numbers cannot be compared
    return all(bool(value.isfinite()) for value in comparable.aminmax())


def _report(
    file: WeightsFile,
    found_under: str | None,
    *,
    own: Mapping[str, Tensor],
    converted: Converted,
    usable: State,
    resized: Mapping[str, str],
) -> LoadReport:
    source = file.states[found_under or ""]
    left_over = [name for name in converted.state if name not in usable]
    in_heads = [tensor for state in converted.heads.values() for tensor in state.values()]
    unused = {name: math.prod(source[name].shape) for name in converted.unused if name in source}
    unused |= {name: converted.state[name].numel() for name in left_over}
    fates = {
        "loaded": tuple(usable),
        "converted": tuple(name for name in converted.converted if name in usable),
        "missing": tuple(name for name in own if name not in usable),
    }
    resized = {name: text for name, text in resized.items() if name in usable}
    counts = {fate: sum(own[name].numel() for name in names) for fate, names in (fates | {"resized": resized}).items()}
    return LoadReport(
        path=file.path,
        naming=converted.naming,
        found_under=found_under,
        resized=resized,
        unused=tuple(unused),
        heads=tuple(converted.heads),
        num_parameters=counts | {"unused": sum(unused.values()), "heads": sum(tensor.numel() for tensor in in_heads)},
        **fates,
    )


def plan_head(head: nn.Module, state: State) -> State | str:
    """Compare a projection head of `WeightsPlan.heads` with the model's.

    Args:
        head: `DINOHead`, on any device; left unchanged.
        state: the head of the file, without the head's name.

    Returns:
        The tensors to copy when it fits, else what differs, for a line in the log.
    """
    return explain_head_mismatch(head.state_dict(), state) or state


def load_backbone_weights(
    model: nn.Module, path: str | Path, *, checkpoint_key: str | None = None, allow_partial: bool = False
) -> LoadReport:
    """Copy the weights of a file into a backbone, in place; nothing is changed when they do not fit.

    A model on the meta device is made on the CPU, and what the file does not have is initialised as seed 0 does it;
    another model keeps what it has there. Memory: the model, and one tensor of the file at a time.

    Args:
        model: backbone with the official parameter names, not sharded.
        path: a path or name that `open_weights` takes.
        checkpoint_key: as for `plan_weights`.
        allow_partial: accept less than the whole backbone (`student.allow_partial_weights`).

    Raises:
        CheckpointError: the file cannot be read, does not fit, or holds NaN or infinity. The model is as before.
    """
    plan = plan_weights(model, path, checkpoint_key=checkpoint_key, allow_partial=allow_partial)
    is_meta = any(tensor.is_meta for tensor in model.state_dict().values())
    if is_meta:
        model.to_empty(device="cpu")
        if plan.missing or _has_unsaved_buffers(model):
            model.init_weights(torch.Generator().manual_seed(0))
    else:
        for stored in plan.state.values():  # a refusal must come before the first copy
            stored.read()
    own = model.state_dict()
    try:
        with torch.no_grad():
            for name, stored in plan.state.items():
                own[name].copy_(stored.read())
    except CheckpointError:
        if is_meta:
            model.to_empty(device="meta")
        raise
    logger.info("%s", plan.report)
    return plan.report


def _has_unsaved_buffers(model: nn.Module) -> bool:
    saved = model.state_dict().keys()
    return any(name not in saved for name, _ in model.named_buffers())
