"""Load a backbone's weights from a file, whole or not at all, and say what was loaded.

Recognised: a bare state dict with the official names (`blocks.0.attn.qkv.weight`), one under `model`, or one under
`teacher` / `student` whose names start with `backbone.`; each with or without `module.` in front, and with the blocks
of a training run with block chunks (`blocks.0.3.*` for block 3).
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.errors import CheckpointError
from dinov2.hub.mismatch import explain_mismatch
from dinov2.hub.read_weights import read_weights
from dinov2.models.vision_transformer import DinoVisionTransformer, interpolate_positions

__all__ = ["LoadReport", "extract_backbone", "flatten_block_chunks", "load_backbone_weights", "read_weights"]

logger = logging.getLogger(__name__)

MAY_BE_MISSING = frozenset({"mask_token"})  # used in training only; some released files come without it
_WRAPPERS = ("teacher", "student", "model")
_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")
_BACKBONE = "backbone."
_CHUNKED_BLOCK = re.compile(r"^blocks\.\d+\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What `load_backbone_weights` did: tensor names by fate."""

    path: str
    found_under: str | None  # key of the file that held the state dict; None: the file is the state dict
    loaded: tuple[str, ...]
    resized: tuple[str, ...]  # of those, the ones interpolated to the model's grid of patches
    missing: tuple[str, ...]  # in the model, not in the file: left at their initial value
    unused: tuple[str, ...]  # in the file, not part of the backbone (heads)

    def __str__(self) -> str:
        """Give the counts in one line."""
        names = f" ({', '.join(self.missing)})" if self.missing else ""
        fates = f"loaded={len(self.loaded)} resized={len(self.resized)} missing={len(self.missing)}{names}"
        return f"weights={self.path} {fates} unused={len(self.unused)}"


def load_backbone_weights(model: nn.Module, path: str | Path, *, checkpoint_key: str = "teacher") -> LoadReport:
    """Copy the weights of a file into a backbone, in place; nothing is changed when they do not fit.

    Args:
        model: backbone with the official parameter names, on any device, not yet sharded.
        path: `.pth` or `.safetensors` file.
        checkpoint_key: which network to take from a file that holds several, `teacher` or `student`.

    Raises:
        CheckpointError: the file cannot be read, or it is not exactly this backbone (`mask_token` may be missing).
    """
    state, unused, found_under = extract_backbone(read_weights(path), path=path, checkpoint_key=checkpoint_key)
    own = model.state_dict()
    resized = _resize_positions(model, state)
    problem = explain_mismatch(own, state, may_be_missing=MAY_BE_MISSING)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(f"{path}: {len(bad)} of {len(state)} tensors hold NaN or infinity (first: {bad[0]})")
    model.load_state_dict(state, strict=False)  # the names were compared above
    report = LoadReport(
        path=str(path),
        found_under=found_under,
        loaded=tuple(state),
        resized=resized,
        missing=tuple(name for name in own if name not in state),
        unused=unused,
    )
    logger.info("%s", report)
    return report


def _resize_positions(model: nn.Module, state: dict[str, Tensor]) -> tuple[str, ...]:
    """Interpolate the file's positions to the model's grid, in place, by the model's own rule; names what changed."""
    if not isinstance(model, DinoVisionTransformer) or "pos_embed" not in state:
        return ()
    have, want = state["pos_embed"].shape, model.pos_embed.shape
    side, wanted_side = math.isqrt(have[1] - 1), math.isqrt(want[1] - 1)
    if have == want or have[2] != want[2] or side**2 != have[1] - 1:
        return ()  # fits, or a mismatch that has its own sentence
    state["pos_embed"] = interpolate_positions(
        state["pos_embed"],
        wanted_side,
        wanted_side,
        offset=model.interpolate_offset,
        antialias=model.interpolate_antialias,
    )
    return ("pos_embed",)


def extract_backbone(
    content: Mapping[str, Any], *, path: str | Path, checkpoint_key: str = "teacher"
) -> tuple[dict[str, Tensor], tuple[str, ...], str | None]:
    """Find the backbone's state dict in what a file holds and give its tensors their official names.

    Args:
        content: as `read_weights` returns it; left unchanged.
        path: for error sentences.
        checkpoint_key: which network to take from a file that holds several.

    Returns:
        (state dict, names of tensors that are not part of the backbone, key of the file that held the state dict).

    Raises:
        CheckpointError: there is no state dict, or not the one asked for.
    """
    found_under = _choose_wrapper(content, path=path, checkpoint_key=checkpoint_key)
    state = content if found_under is None else content[found_under]
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        where = "" if found_under is None else f" under '{found_under}'"
        raise CheckpointError(
            f"{path}: is not a known file of weights; '{others[0]}'{where} is a {type(state[others[0]]).__name__}, "
            "not a tensor (known: a state dict, bare or under 'teacher', 'student' or 'model')"
        )
    state = {_PREFIX.sub("", name): tensor for name, tensor in state.items()}
    unused: tuple[str, ...] = ()
    if any(name.startswith(_BACKBONE) for name in state):
        unused = tuple(name for name in state if not name.startswith(_BACKBONE))
        state = {
            _PREFIX.sub("", name.removeprefix(_BACKBONE)): tensor
            for name, tensor in state.items()
            if name.startswith(_BACKBONE)
        }
    return flatten_block_chunks(state), unused, found_under


def _choose_wrapper(content: Mapping[str, Any], *, path: str | Path, checkpoint_key: str) -> str | None:
    present = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    if checkpoint_key not in (*_WRAPPERS, *content):
        raise CheckpointError(
            f"{path}: has no '{checkpoint_key}'; use one of {', '.join(present) or 'teacher, student'}"
        )
    if isinstance(content.get(checkpoint_key), Mapping):
        return checkpoint_key
    if {"optimizer", "iteration"} <= content.keys():
        raise CheckpointError(
            f"{path}: is a training checkpoint, not a backbone; "
            "give a teacher_checkpoint.pth from the eval folder of the run"
        )
    if "model" in present:
        return "model"
    if present:
        raise CheckpointError(f"{path}: has no '{checkpoint_key}' but has '{present[0]}'; ask for that key")
    return None


def flatten_block_chunks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the blocks of a chunked training run: `blocks.1.7.*` (block 7, in chunk 1) becomes `blocks.7.*`."""
    return {_CHUNKED_BLOCK.sub(r"blocks.\1.", name): tensor for name, tensor in state.items()}
