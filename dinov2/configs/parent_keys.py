"""Keys of the parents' config files that this project names differently, ignores or refuses.

A parent's key that stands in our schema needs no entry. All others fall into three classes: honoured (translated to a
key of ours), without effect (accepted; a note is logged if it is set to anything but the parent's default), refused
(an error with the reason, unless it is set to the value that changes nothing).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dinov2.configs.section import show_value
from dinov2.configs.tree import leaves
from dinov2.configs.values import convert
from dinov2.errors import ConfigError

NO_DEFAULT = object()  # stands for "any value is refused"


@dataclass(frozen=True)
class ParentKey:
    """What becomes of one key of a parent's file."""

    kind: Literal["honoured", "without effect", "refused"]
    reason: str
    default: Any = NO_DEFAULT  # the parent's value that asks for nothing


@dataclass(frozen=True)
class Given:
    """A value that the user gave; of two, the one of the later layer wins (0: file, 1: command line)."""

    value: Any
    layer: int


# Order of precedence when the parents' per-module settings disagree: the student's backbone decides.
_MODULES = [f"{net}.{part}" for net in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")]
_PER_MODULE = {
    "sharding_strategy": "sharding_strategy",
    "param_dtype": "mixed_precision.param_dtype",
    "reduce_dtype": "mixed_precision.reduce_dtype",
}


def _per_module_keys(suffix: str) -> list[str]:
    return [f"compute_precision.{module}.{suffix}" for module in _MODULES]


PARENT_KEYS: Mapping[str, ParentKey] = {
    "train.saveckp_freq": ParentKey("honoured", "epochs between saves; becomes checkpointing.period in steps"),
    **{
        key: ParentKey("honoured", f"becomes compute_precision.{target}, one value for all modules")
        for target, suffix in _PER_MODULE.items()
        for key in _per_module_keys(suffix)
    },
    **{
        key: ParentKey("without effect", "buffers keep their own type", "fp32")
        for key in _per_module_keys("mixed_precision.buffer_dtype")
    },
    "student.block_chunks": ParentKey(
        "without effect", "blocks are one flat list, and weights saved in chunks are read all the same", 0
    ),
    "train.cache_dataset": ParentKey("without effect", "file lists are read anew at each start", True),
    "train.cudagraphs": ParentKey("without effect", "steps are not recorded as CUDA graphs", False),
    "train.compile": ParentKey("without effect", "the model runs uncompiled", False),
    "train.monitor_gradient_norm": ParentKey("without effect", "gradient norms are always recorded", False),
    "train.fsdp_reshard_after_forward": ParentKey(
        "without effect", "compute_precision.sharding_strategy decides what is split when", True
    ),
    "optim.lr": ParentKey(
        "without effect", "the learning rate is computed from optim.base_lr and optim.scaling_rule", 0.0
    ),
    "optim.multi_tensor_optim": ParentKey("without effect", "optimisers always take many tensors at once", True),
    "MODEL.META_ARCHITECTURE": ParentKey(
        "refused", "it marks a DINOv3 config, and only DINOv2's settings are supported; start from configs/train"
    ),
    "defaults": ParentKey("refused", "only dinov2's defaults are supported", "dinov2"),
    "student.channel_adaptive": ParentKey(
        "refused", "channels are trained together; set student.in_chans to their number", False
    ),
    "train.cell_augmentation": ParentKey("refused", "set the keys of augmentation instead", False),
    "train.checkpointing": ParentKey("refused", "activations cannot be recomputed in the backward pass", False),
    "train.checkpointing_full": ParentKey("refused", "activations cannot be recomputed in the backward pass", False),
}


def refuse_parent_key(key: str, value: Any) -> None:
    """Raise ConfigError if `key` is of the class refused and `value` is not the one that changes nothing."""
    entry = PARENT_KEYS.get(key)
    if entry is not None and entry.kind == "refused" and value != entry.default:
        raise ConfigError(f"{key}={show_value(value)} is not supported: {entry.reason}")


def translate_parent_keys(
    given: Mapping[str, Given], *, epoch_length: int | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Translate the parents' keys among the given ones.

    Args:
        given: resolved values by dotted key, ours and the parents'; left unchanged.
        epoch_length: `train.OFFICIAL_EPOCH_LENGTH` in steps; None if it depends on the dataset.

    Returns:
        Values by dotted key, ours only, and one sentence for each thing the user should know.

    Raises:
        ConfigError: a parent's key has a value of the wrong kind, or cannot be translated.
    """
    translated, notes = _translate_per_module(given)
    if "train.saveckp_freq" in given:
        freq = given["train.saveckp_freq"]
        translated["checkpointing.period"] = Given(_period_in_steps(freq.value, epoch_length), freq.layer)
    ours = {key: value for key, value in given.items() if key not in PARENT_KEYS}
    for key, new in translated.items():
        if key not in ours or new.layer > ours[key].layer:
            ours[key] = new
        elif ours[key].value != new.value:
            notes.append(f"{key}={show_value(ours[key].value)} overrules {show_value(new.value)} from its older names")
    notes += [
        f"{key}={show_value(value.value)} has no effect: {PARENT_KEYS[key].reason}"
        for key, value in given.items()
        if key in PARENT_KEYS and PARENT_KEYS[key].kind == "without effect" and value.value != PARENT_KEYS[key].default
    ]
    return {key: value.value for key, value in ours.items()}, tuple(notes)


def _period_in_steps(epochs: Any, epoch_length: int | None) -> int:
    epochs = convert("train.saveckp_freq", epochs, int)
    if epochs < 1:
        raise ConfigError(f"train.saveckp_freq={epochs}: must be at least 1 epoch")
    if epoch_length is None:
        raise ConfigError(
            f"train.saveckp_freq={epochs} counts epochs, whose length train.OFFICIAL_EPOCH_LENGTH=null leaves open; "
            "set checkpointing.period (optimiser steps) instead"
        )
    return epochs * epoch_length


def _translate_per_module(given: Mapping[str, Given]) -> tuple[dict[str, Given], list[str]]:
    """Bring the parents' settings per module down to one value each."""
    translated: dict[str, Given] = {}
    notes: list[str] = []
    for target, suffix in _PER_MODULE.items():
        key = f"compute_precision.{target}"
        named = {module_key: given[module_key] for module_key in _per_module_keys(suffix) if module_key in given}
        if not named:
            continue
        if target == "reduce_dtype" and any(value.value == "fp16" for value in named.values()):
            notes.append(f"{key}: gradients are summed over ranks in fp32 where fp16 was asked for")
            named = {k: Given("fp32" if v.value == "fp16" else v.value, v.layer) for k, v in named.items()}
        for name, value in named.items():
            convert(name, value.value, leaves()[key].annotation)  # so that an error names the key as it was given
        decides, chosen = next(iter(named.items()))
        translated[key] = Given(chosen.value, max(value.layer for value in named.values()))
        others = [name for name, value in named.items() if value.value != chosen.value]
        if others:
            notes.append(f"{key}={show_value(chosen.value)} from {decides} also stands for {', '.join(others)}")
    return translated, notes
