"""From the keys and values that a parent's file or the command line gives to keys of ours, with what is to be said."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinov2.configs.default_layers import LAYERS
from dinov2.configs.parent_keys import (
    PARENT_KEYS,
    PARENT_VALUES,
    PER_MODULE,
    REPLACED_BY_SCHEDULES,
    OneOrMore,
    per_module_keys,
)
from dinov2.configs.section import show_value
from dinov2.configs.student_section import RESNET_ARCHS
from dinov2.configs.tree import leaves
from dinov2.configs.values import convert
from dinov2.errors import ConfigError

_OF_RESNETS = ("arch", "in_chans", "pretrained_weights", "allow_partial_weights", "sync_batchnorm")
_OF_COMPILING = {"train.compile", "train.compile_mode", "train.compile_target"}
_CROP_SIZES = ("crops.global_crops_size", "crops.local_crops_size", "crops.gram_teacher_crops_size")


@dataclass(frozen=True)
class Given:
    """A given value; of two, the one of the later layer wins (-1: defaults, 0: file, 1: command line)."""

    value: Any
    layer: int


@dataclass(frozen=True)
class Translated:
    """Values by dotted key, ours only, and one sentence for each thing the user should know or training cannot do."""

    values: dict[str, Any]
    notes: tuple[str, ...]
    refusals: tuple[str, ...]


def translate(given: Mapping[str, Given]) -> Translated:
    """Translate the parents' keys and values among the given ones.

    Args:
        given: resolved values by dotted key, ours and the parents'; left unchanged. The layer of defaults is among them
            as layer -1.

    Raises:
        ConfigError: a parent's key has a value of the wrong kind, cannot be translated, or changes the backbone into
            one that is not built here.
    """
    given = _without_replaced_nulls(given)
    _check_kinds(given)
    given, refusals = _with_one_crop_size(given)
    translated, notes = _translate_per_module(given)
    for key, new in _renamed(given).items():
        if key not in translated or new.layer >= translated[key].layer:
            translated[key] = new
    ours = {key: _our_value(key, value) for key, value in given.items() if key not in PARENT_KEYS}
    for key, new in translated.items():
        if key not in ours or new.layer > ours[key].layer or _is_empty_beside(key, ours[key], new):
            ours[key] = new
        elif ours[key].value != new.value and new.layer >= 0:
            notes.append(f"{key}={show_value(ours[key].value)} overrules {show_value(new.value)} from its older names")
    return Translated(
        values={key: value.value for key, value in ours.items()},
        notes=(*notes, *_effectless(given), *_idle(ours)),
        refusals=(*refusals, *_refused(given)),
    )


def _value(given: Mapping[str, Given], key: str) -> Any:
    """Return the value that a key of ours ends up with."""
    return given[key].value if key in given else leaves()[key].default


def _our_value(key: str, given: Given) -> Given:
    """Replace a value that only the parents know."""
    meanings = PARENT_VALUES.get(key, {})
    is_known = isinstance(given.value, str | int) and given.value in meanings
    return Given(meanings[given.value], given.layer) if is_known else given


def _without_replaced_nulls(given: Mapping[str, Given]) -> dict[str, Given]:
    """Drop the nulls of keys that `schedules` replaces."""
    if not any(key.startswith("schedules.") for key in given):
        return dict(given)
    return {key: value for key, value in given.items() if value.value is not None or key not in REPLACED_BY_SCHEDULES}


def _check_kinds(given: Mapping[str, Given]) -> None:
    """Raise ConfigError if a parent's key has a value of the wrong kind, or one that would change the backbone."""
    for key, value in given.items():
        entry = PARENT_KEYS.get(key)
        if entry is None or entry.annotation is Any:
            continue
        if isinstance(entry.annotation, OneOrMore):
            for item in value.value if isinstance(value.value, list) else [value.value]:
                convert(key, item, entry.annotation.kind | None)
        elif entry.annotation is list:
            if not isinstance(value.value, list):
                raise ConfigError(f"{key}={show_value(value.value)}: must be a list")
        else:
            convert(key, value.value, entry.annotation)
        if entry.kind == "refused at once" and not entry.is_quiet(value.value):
            raise ConfigError(f"{key}={show_value(value.value)} is not supported: {entry.reason}")


def _with_one_crop_size(given: Mapping[str, Given]) -> tuple[dict[str, Given], list[str]]:
    """Replace lists of crop sizes, DINOv3's training at several resolutions, by their first size."""
    single, refusals = dict(given), []
    for key in _CROP_SIZES:
        if key not in given or not isinstance(given[key].value, list) or not given[key].value:
            continue
        sizes = given[key].value
        for size in sizes:
            convert(key, size, leaves()[key].annotation)
        single[key] = Given(sizes[0], given[key].layer)
        if len(sizes) > 1:
            refusals.append(_refusal(key, sizes, "crops have one size; give one number"))
    return single, refusals


def _renamed(given: Mapping[str, Given]) -> dict[str, Given]:
    """Return what the parents' keys say in keys of ours, DINOv2's keys per module apart."""
    is_dinov3 = _value(given, "defaults") == "dinov3"
    renamed = {}
    for key, ours, translated in (
        ("student.n_storage_tokens", "student.num_register_tokens", lambda value: value),
        ("crops.horizontal_flips", "augmentation.horizontal_flip_probability", lambda value: 0.5 if value else 0.0),
        ("crops.rgb_mean", "augmentation.mean", lambda value: value),
        ("crops.rgb_std", "augmentation.std", lambda value: value),
        (
            "train.fsdp_reshard_after_forward",
            "compute_precision.sharding_strategy",
            lambda value: "FULL_SHARD" if value else "SHARD_GRAD_OP",
        ),
    ):
        if key in given:
            renamed[ours] = Given(translated(given[key].value), given[key].layer)
    weights = given.get("student.resume_from_teacher_chkpt")
    if weights is not None and weights.value:
        renamed["MODEL.WEIGHTS"] = weights
    if "train.saveckp_freq" in given and not is_dinov3:
        freq = given["train.saveckp_freq"]
        renamed["checkpointing.period"] = Given(_period_in_steps(freq.value, given), freq.layer)
    if "optim.lr" in given and is_dinov3:
        # DINOv3 multiplies by 4 * sqrt(batch / 1024), DINOv2 by sqrt(batch / 1024); the other rules are the same.
        factor = 4 if _value(given, "optim.scaling_rule") == "sqrt_wrt_1024" else 1
        renamed["optim.base_lr"] = Given(factor * given["optim.lr"].value, given["optim.lr"].layer)
    return renamed


def _is_empty_beside(key: str, ours: Given, new: Given) -> bool:
    """Tell whether MODEL.WEIGHTS, which DINOv3's files list empty, leaves the choice to its older name."""
    return key == "MODEL.WEIGHTS" and not ours.value and ours.layer <= new.layer


def _period_in_steps(epochs: int, given: Mapping[str, Given]) -> int:
    key = "train.OFFICIAL_EPOCH_LENGTH"
    epoch_length = convert(key, _value(given, key), leaves()[key].annotation)
    if epochs < 1:
        raise ConfigError(f"train.saveckp_freq={epochs}: must be at least 1 epoch")
    if epoch_length is None:
        raise ConfigError(
            f"train.saveckp_freq={epochs} counts epochs, whose length train.OFFICIAL_EPOCH_LENGTH=null leaves open; "
            "set checkpointing.period (optimiser steps) instead"
        )
    return epochs * epoch_length


def _translate_per_module(given: Mapping[str, Given]) -> tuple[dict[str, Given], list[str]]:
    """Bring DINOv2's settings per module down to one value each."""
    translated: dict[str, Given] = {}
    notes: list[str] = []
    for target, suffix in PER_MODULE.items():
        key = f"compute_precision.{target}"
        named = {module_key: given[module_key] for module_key in per_module_keys(suffix) if module_key in given}
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


def _effectless(given: Mapping[str, Given]) -> list[str]:
    """Name the given keys that ask in vain for something else than what happens here."""
    reasons = {
        key: PARENT_KEYS[key].reason
        for key, value in given.items()
        if key in PARENT_KEYS
        and PARENT_KEYS[key].kind == "without effect"
        and not PARENT_KEYS[key].is_quiet(value.value)
    }
    is_dinov3 = _value(given, "defaults") == "dinov3"
    if "optim.lr" in given and not is_dinov3 and given["optim.lr"].value != 0:
        reasons["optim.lr"] = "the learning rate is computed from optim.base_lr and optim.scaling_rule"
    if "train.saveckp_freq" in given and is_dinov3 and given["train.saveckp_freq"].value != 20:
        reasons["train.saveckp_freq"] = "DINOv3 saves by checkpointing.period"
    if "teacher.in_chans" in given and given["teacher.in_chans"].value != _value(given, "student.in_chans"):
        reasons["teacher.in_chans"] = PARENT_KEYS["teacher.in_chans"].reason
    return [f"{key}={show_value(given[key].value)} has no effect: {reason}" for key, reason in reasons.items()]


def _idle(ours: Mapping[str, Given]) -> list[str]:
    """Name the given keys of ours that another key leaves without effect, where they differ from the defaults.

    Left out are those that the parents' files set in vain: interpolation with rope, mask_k_bias without a bias.
    """
    arch = _value(ours, "student.arch")
    parts: list[tuple[set[str], str]] = []
    if arch in RESNET_ARCHS:
        of_vit = {key for key in leaves() if key.startswith("student.")} - {f"student.{name}" for name in _OF_RESNETS}
        parts.append((of_vit | _OF_COMPILING, f"student.arch={arch} is no ViT"))
    else:
        if _value(ours, "student.pos_embed_type") == "learned":
            rope = {key for key in leaves() if key.startswith("student.pos_embed_rope_")}
            parts.append((rope, "student.pos_embed_type=learned has no such part"))
        if not _value(ours, "crops.local_crops_number"):
            parts.append(({"student.untie_global_and_local_cls_norm"}, "there are no local crops"))
        if not _value(ours, "train.compile"):
            parts.append((_OF_COMPILING, "train.compile=false"))
    if not _value(ours, "dino.reweight_dino_local_loss"):
        schedule = {key for key in leaves() if key.startswith("dino.local_loss_weight_schedule.")}
        parts.append((schedule, "dino.reweight_dino_local_loss=false"))
    of_gram = {key for key in leaves() if key.startswith("gram.")}
    if not _value(ours, "gram.use_loss"):
        parts.append((of_gram, "gram.use_loss=false"))
    elif any(key.startswith("gram.loss_weight_schedule.") for key in ours):
        parts.append(({"gram.loss_weight"}, "gram.loss_weight_schedule is set"))
    if not _value(ours, "dino.koleo_loss_distributed"):
        parts.append(({"dino.koleo_distributed_loss_group_size"}, "dino.koleo_loss_distributed=false"))
    if not _value(ours, "lora.rank"):
        parts.append(({key for key in leaves() if key.startswith("lora.")}, "lora.rank=0"))
    if _value(ours, "compute_precision.sharding_strategy") != "HYBRID_SHARD":
        reason = "compute_precision.sharding_strategy is not HYBRID_SHARD"
        parts.append(({"compute_precision.hybrid_shard_size"}, reason))
    defaults = {key: leaf.default for key, leaf in leaves().items()} | dict(LAYERS[_value(ours, "defaults")])
    return [
        f"{key}={show_value(given.value)} has no effect: {reason}"
        for keys, reason in parts
        for key, given in ours.items()
        if key in keys and given.layer >= 0 and _plain(given.value) != _plain(defaults[key])
    ]


def _plain(value: Any) -> Any:
    """Give a list for a tuple, as a file has it."""
    return list(value) if isinstance(value, tuple) else value


def _refused(given: Mapping[str, Given]) -> list[str]:
    """Say what training cannot honour."""
    refusals = [
        _refusal(key, value.value, PARENT_KEYS[key].reason)
        for key, value in given.items()
        if key in PARENT_KEYS and PARENT_KEYS[key].kind == "refused" and not PARENT_KEYS[key].is_quiet(value.value)
    ]
    key = "MODEL.META_ARCHITECTURE"
    if key in given and given[key].value == "MultiDistillationMetaArch":
        refusals.insert(0, _refusal(key, given[key].value, PARENT_KEYS["multidistillation.enabled"].reason))
    return refusals


def _refusal(key: str, value: Any, reason: str) -> str:
    return f"{key}={show_value(value)} is not supported in training: {reason}"
