"""Which settings of a run that goes on are not those it was saved with, as far as they alter its results."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dinov2.configs.stages import flat_settings

# Keys and sections that change no result of training, or nothing but rounding, or act only where a run begins.
WITHOUT_EFFECT_ON_RESULTS = (
    "MODEL.WEIGHTS",
    "checkpointing",
    "compute_precision.hybrid_shard_size",
    "compute_precision.sharding_strategy",
    "data.cache_dir",
    "defaults",  # the values that follow from it are compared
    "dino.prototype_init",
    "evaluation",
    "guard_rails",
    "ibot.prototype_init",
    "gram.ckpt",
    "logging",
    "student.allow_partial_weights",
    "student.attention_backend",
    "student.pretrained_weights",
    "train.checkpointing",
    "train.checkpointing_full",
    "train.compile",
    "train.compile_mode",
    "train.compile_target",
    "train.batch_size_per_gpu",  # the images of a step over all ranks count
    "train.global_batch_size",  # compared as the number that holds, by the caller of `changed_settings`
    "train.max_steps",
    "train.num_workers",
    "train.output_dir",
    "train.prototype_init_crops",
    "train.resume",
    "train.resume_path",
)


def changed_settings(saved: Mapping[str, Any], running: Mapping[str, Any]) -> list[str]:
    """List the settings that alter results and differ, one sentence part each: `optim.base_lr 0.004 -> 0.002`, of a
    stage `stages.heads.optim.base_lr 0.004 -> 0.002`.

    Args:
        saved: settings of the run when it was saved, as `to_dict` returns them, perhaps by an older version.
        running: settings of this run. A key that one of the two does not know is left out.
    """
    found = (*_differences(saved, running, ""), *_between_stages(saved, running))
    return [f"{key} {json.dumps(before)} -> {json.dumps(now)}" for key, before, now in found]


def _differences(saved: Mapping[str, Any], running: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any, Any]]:
    for name, now in running.items():
        key = f"{path}{name}"
        if name not in saved or key in WITHOUT_EFFECT_ON_RESULTS or key == "stages":
            continue
        before = saved[name]
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{key}.")
        elif before != now:
            yield key, before, now


def _between_stages(saved: Mapping[str, Any], running: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Compare stages of one name key by key, where one of them sets it; a key that it does not set is the base's."""
    before, now = ({stage["name"]: stage for stage in plain.get("stages") or ()} for plain in (saved, running))
    bases = flat_settings(saved), flat_settings(running)
    for name in dict.fromkeys((*before, *now)):
        if name not in before or name not in now:
            yield f"stages.{name}", before.get(name), now.get(name)
            continue
        own = flat_settings(before[name]), flat_settings(now[name])
        for key in dict.fromkeys((*own[0], *own[1])):
            one, other = (keys.get(key, base.get(key)) for keys, base in zip(own, bases, strict=True))
            if one != other and not _is_quiet(key):
                yield f"stages.{name}.{key}", one, other


def _is_quiet(key: str) -> bool:
    return any(key == quiet or key.startswith(f"{quiet}.") for quiet in WITHOUT_EFFECT_ON_RESULTS)
