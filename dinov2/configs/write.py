"""The settings as plain data, as a YAML file and as a digest."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dinov2.configs.config import Config
from dinov2.configs.section import Section
from dinov2.configs.stage_section import StageConfig
from dinov2.configs.tree import is_setting, nest, subsections
from dinov2.errors import ConfigError


def to_dict(cfg: Config | Section) -> dict[str, Any]:
    """Return the settings as nested dicts and lists, in the order of the schema; `cfg` may be a section too."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        name, value = field.name, vars(cfg)[field.name]
        if dataclasses.is_dataclass(value):
            plain[name] = to_dict(value)
        elif name in subsections(type(cfg)):  # an optional section that is absent
            plain[name] = None
        elif is_setting(field):
            plain[name] = [_plain_item(item) for item in value] if isinstance(value, tuple) else value
    return plain


def _plain_item(item: Any) -> Any:
    """Return an item of a list; a stage as it stands in a file."""
    if not isinstance(item, StageConfig):
        return item
    keys = {key: list(value) if isinstance(value, tuple) else value for key, value in item.keys.items()}
    return {"name": item.name} | nest(keys)


def to_yaml(cfg: Config) -> str:
    """Return the settings as YAML text that `load_config` reads back as they are."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(cfg)))


def write_config(cfg: Config, path: str | os.PathLike[str]) -> None:
    """Write all settings, resolved, to a YAML file; a reader sees the old file or the new one, never half of it.

    Called by one process only.

    Raises:
        ConfigError: the file or its folder cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(to_yaml(cfg), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None


def config_digest(cfg: Config) -> str:
    """Return the SHA-256 of all settings, as hexadecimal digits; it changes with any of them."""
    return hashlib.sha256(json.dumps(to_dict(cfg), sort_keys=True).encode()).hexdigest()
