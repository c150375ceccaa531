"""The stages of a run: which settings may differ between them, reading them, and the whole settings of each."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dinov2.configs.config import Config
from dinov2.configs.known_keys import flatten
from dinov2.configs.parent_keys import PARENT_KEYS
from dinov2.configs.section import show_value
from dinov2.configs.stage_section import StageConfig
from dinov2.configs.translate import Given, Translated, translate
from dinov2.configs.tree import build, leaves, optional_sections
from dinov2.configs.values import convert
from dinov2.configs.write import to_dict
from dinov2.errors import ConfigError

OF_A_STAGE = "stages."  # how an override of a stage's key begins
_LAYER = 2  # above the defaults, the file and the command line
_EPOCHS = "optim.epochs"  # `epochs` beside the name stands for it

_OF_NETWORKS = "networks are built once"
_OF_THE_OPTIMISER = "the optimiser is built once and keeps what it has gathered"
_OF_GRAM = "the Gram teacher is built once; gram.loss_weight may differ, and 0 turns its loss off"
# Keys, and beginnings of keys that end in a dot or an underscore: None where stages may differ, else why they may not.
# The longest that fits decides.
_MAY_DIFFER: Mapping[str, str | None] = {
    "": "it holds for the whole run",
    "optim.": None,
    "optim.optimizer": _OF_THE_OPTIMISER,
    "optim.adamw_": _OF_THE_OPTIMISER,
    "optim.sgd_": _OF_THE_OPTIMISER,
    "optim.freeze": "parts rest for the whole run; optim.freeze_backbone_epochs may differ",
    "teacher.": None,
    "schedules": None,
    "schedules.": None,
    "crops.": None,
    "augmentation.": None,
    "dino.loss_weight": None,
    "dino.koleo_loss_weight": None,
    "dino.reweight_dino_local_loss": None,
    "dino.local_loss_weight_schedule.": None,
    "dino.head_": _OF_NETWORKS,
    "ibot.loss_weight": None,
    "ibot.mask_": None,
    "ibot.head_": _OF_NETWORKS,
    "ibot.separate_head": _OF_NETWORKS,
    "gram.": _OF_GRAM,
    "gram.loss_weight": None,
    "gram.loss_weight_schedule.": None,
    "anchor.cls_weight": None,
    "anchor.patch_weight": None,
    "train.batch_size_per_gpu": None,
    "train.global_batch_size": None,
    "train.OFFICIAL_EPOCH_LENGTH": None,
    "evaluation.eval_period_iterations": None,
    "student.": _OF_NETWORKS,
    "lora.": _OF_NETWORKS,
    "compute_precision.": _OF_NETWORKS,
}


@dataclass(frozen=True)
class ReadStages:
    """The stages, and sentences as in `Translated`."""

    stages: tuple[StageConfig, ...]
    notes: tuple[str, ...]
    refusals: tuple[str, ...]


def with_overrides(listed: Any, overrides: Sequence[tuple[str, Any]]) -> Any:
    """Lay `stages.<name>.<key>` of the command line over the stages that a file lists, which are left unchanged.

    Raises:
        ConfigError: there is no such stage.
    """
    if not overrides:
        return listed
    stages = [dict(_as_mapping(stage)) for stage in _as_list(listed)]
    for path, value in overrides:
        name, _, key = path.removeprefix(OF_A_STAGE).partition(".")
        names = [stage.get("name") for stage in stages]
        if name not in names or not key:
            known = f"the stages are {', '.join(map(str, names))}" if names else "there are no stages"
            raise ConfigError(f"{path}={show_value(value)} on the command line: must be stages.<name>.<key>; {known}")
        stage = stages[names.index(name)]
        given = dict(_keys_of({key_: inner for key_, inner in stage.items() if key_ != "name"}, name=name))
        stages[names.index(name)] = {"name": name} | given | dict(_keys_of({key: value}, name=name))
    return stages


def read_stages(listed: Any, *, given: Mapping[str, Given], base: Translated) -> ReadStages:
    """Read and check the stages of a config.

    Args:
        listed: value of `stages`: a list of mappings, or null.
        given: all given values outside of it, resolved, as `translate` takes them.
        base: what `translate` made of these.

    Raises:
        ConfigError: a stage is malformed, sets a key that holds for the whole run, or does not fit together.
    """
    base_cfg = build(base.values)
    stages: list[StageConfig] = []
    notes: list[str] = []
    refusals: list[str] = []
    for number, content in enumerate(_as_list(listed)):
        name = _name(_as_mapping(content), number=number, others=[stage.name for stage in stages])
        own = dict(_keys_of({key: value for key, value in content.items() if key != "name"}, name=name))
        try:
            _require_own(own)
            absent = {key for key in optional_sections() if key in own and own.pop(key) is None}
            below = {key: value for key, value in given.items() if key.partition(".")[0] not in absent}
            translated = translate(below | {key: Given(value, _LAYER) for key, value in own.items()})
            keys = _changes(base.values, translated.values, named=own)
            _require_own(keys)
            stage = StageConfig(name=name, keys=dict.fromkeys(sorted(absent)) | keys)
            _require_networks(build(_laid_over(base.values, stage)), base=base_cfg)
            _require_batch_that_holds(stage, base=base_cfg)
        except ConfigError as error:
            raise ConfigError(f"stage {name}: {error}") from error
        stages.append(stage)
        notes += [f"stage {name}: {note}" for note in translated.notes if note not in base.notes]
        refusals += [sentence for sentence in translated.refusals if sentence not in (*base.refusals, *refusals)]
    return ReadStages(tuple(stages), tuple(notes), tuple(refusals))


def stage_configs(cfg: Config) -> list[tuple[str, Config]]:
    """Return name and whole settings of each stage; of a config that lists none, itself without a name."""
    if not cfg.stages:
        return [("", cfg)]
    base = flat_settings(to_dict(cfg))
    return [(stage.name, build(_laid_over(base, stage))) for stage in cfg.stages]


def flat_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as `to_dict` gives them by dotted key, without the stages and the sections that are absent."""
    flat: dict[str, Any] = {}
    for key in leaves():
        value: Any = plain
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
        else:
            flat[key] = value
    flat.pop("stages", None)
    return flat


def _laid_over(base: Mapping[str, Any], stage: StageConfig) -> dict[str, Any]:
    absent = {key for key in optional_sections() if key in stage.keys}
    kept = {key: value for key, value in base.items() if key.partition(".")[0] not in absent}
    return kept | {key: value for key, value in stage.keys.items() if key not in absent}


def _as_list(listed: Any) -> list[Any]:
    if listed is None:
        return []
    if not isinstance(listed, list | tuple):
        raise ConfigError(f"stages={show_value(listed)}: must be a list, e.g. [{{name: heads, epochs: 2}}]")
    return list(listed)


def _as_mapping(content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise ConfigError(f"stages: {show_value(content)} must be a mapping of name, epochs and keys")
    return content


def _name(content: Mapping[str, Any], *, number: int, others: Sequence[str]) -> str:
    name = content.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"stages: name={show_value(name)} of stage {number + 1}: must be letters, digits, - and _")
    if name in others:
        raise ConfigError(f"stages: two stages have the name {name}; give each its own")
    return name


def _keys_of(content: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Return the keys of a stage by their dotted names, `epochs` by its own."""
    absent = [(section, None) for section in optional_sections() if section in content and content[section] is None]
    epochs = [(_EPOCHS, content["epochs"])] if "epochs" in content else []
    others = {key: value for key, value in content.items() if key != "epochs"}
    found: dict[str, Any] = {}
    for key, value in (*absent, *epochs, *flatten(others, source=f"in stage {name}")):
        if key in found:
            raise ConfigError(f"stage {name}: {key} is given twice; give it once")
        found[key] = value
    return found


def _require_own(keys: Iterable[str]) -> None:
    """Raise ConfigError at a key of ours that cannot differ between stages."""
    for key in keys:
        fitting = [start for start in _MAY_DIFFER if key == start or (key.startswith(start) and start[-1:] in "._")]
        reason = _MAY_DIFFER[max(fitting, key=len)]
        if reason is not None and key not in PARENT_KEYS:
            raise ConfigError(f"{key} cannot differ between stages: {reason}; set it outside of stages")


def _changes(base: Mapping[str, Any], stage: Mapping[str, Any], *, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a stage that it names itself, or that are others than the base's, converted."""
    chosen = [key for key in leaves() if key in stage and (key in named or _differs(base, stage, key))]
    return {key: convert(key, stage[key], leaves()[key].annotation) for key in chosen}


def _differs(base: Mapping[str, Any], stage: Mapping[str, Any], key: str) -> bool:
    return stage[key] != base.get(key, leaves()[key].default)


def _require_networks(stage: Config, *, base: Config) -> None:
    """Raise ConfigError if a stage turns on a loss whose network is built only where it is on outside of stages."""
    has_head = base.ibot.loss_weight > 0 or not base.ibot.separate_head
    for key, is_missing in (
        ("ibot.loss_weight", stage.ibot.loss_weight > 0 and not has_head),
        ("anchor.cls_weight", stage.anchor.cls_weight > 0 and not base.anchor.is_on),
        ("anchor.patch_weight", stage.anchor.patch_weight > 0 and not base.anchor.is_on),
    ):
        if is_missing:
            section, name = key.split(".")
            raise ConfigError(
                f"{key}={getattr(getattr(stage, section), name)} needs a network that is built only if it is above 0 "
                f"outside of stages; set it there, and to 0 in the stages that are to do without"
            )


def _require_batch_that_holds(stage: StageConfig, *, base: Config) -> None:
    """Raise ConfigError if a stage sets the batch of a process where the global one overrules it."""
    batch = stage.keys.get("train.global_batch_size", base.train.global_batch_size)
    if "train.batch_size_per_gpu" in stage.keys and batch is not None:
        raise ConfigError(
            f"train.batch_size_per_gpu={stage.keys['train.batch_size_per_gpu']} is overruled by "
            f"train.global_batch_size={batch}; set train.global_batch_size in the stage"
        )
