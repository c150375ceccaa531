"""The settings as a flat table of dotted keys, and back."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from dinov2.configs.config import Config
from dinov2.configs.stage_section import StageConfig
from dinov2.configs.values import convert, split_optional
from dinov2.errors import ConfigError

REQUIRED = dataclasses.MISSING  # the default of a key that an optional section cannot do without


@dataclass(frozen=True)
class Leaf:
    """One key of the schema: its type and default."""

    annotation: Any
    default: Any


def subsections(section: type) -> dict[str, type]:
    """Return the fields of a dataclass that are sections themselves, optional ones too, by name, in order."""
    kinds = {name: split_optional(hint)[0] for name, hint in get_type_hints(section).items()}
    return {f.name: kinds[f.name] for f in dataclasses.fields(section) if dataclasses.is_dataclass(kinds[f.name])}


def is_setting(field: dataclasses.Field) -> bool:
    """Tell settings from what loading adds to the root, such as its notes."""
    return field.compare


def optional_sections(section: type = Config) -> list[str]:
    """Return the dotted names of the sections that may be absent."""
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    names = []
    for name, inner in subsections(section).items():
        names += [name] if defaults[name] is None else []
        names += [f"{name}.{deeper}" for deeper in optional_sections(inner)]
    return names


@cache
def leaves(section: type = Config) -> Mapping[str, Leaf]:
    """Return all keys below a section by dotted name, in the order of the schema."""
    table: dict[str, Leaf] = {}
    inner = subsections(section)
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        if field.name in inner:
            table |= {f"{field.name}.{key}": leaf for key, leaf in leaves(inner[field.name]).items()}
        elif is_setting(field):
            table[field.name] = Leaf(annotation=hints[field.name], default=field.default)
    return table


@cache
def section_names(section: type = Config) -> list[str]:
    """Return the dotted names of all sections."""
    names = []
    for name, inner in subsections(section).items():
        names += [name, *(f"{name}.{deeper}" for deeper in section_names(inner))]
    return names


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn {'a.b': 1} into {'a': {'b': 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        folder = nested
        for part in path:
            folder = folder.setdefault(part, {})
        folder[name] = value
    return nested


def build(
    flat: Mapping[str, Any],
    *,
    stages: tuple[StageConfig, ...] = (),
    notes: tuple[str, ...] = (),
    refusals: tuple[str, ...] = (),
) -> Config:
    """Build the checked tree from raw values by dotted key; keys that are absent keep their defaults."""
    values = {key: convert(key, value, leaves()[key].annotation) for key, value in flat.items()}
    return Config(**_build_sections(Config, nest(values)), stages=stages, notes=notes, refusals=refusals)


def _build_sections(section: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with each nested dict of a subsection replaced by that subsection."""
    _require_complete(section, values)
    inner = subsections(section)
    return {
        name: inner[name](**_build_sections(inner[name], value)) if name in inner else value
        for name, value in values.items()
    }


def _require_complete(section: type, values: Mapping[str, Any]) -> None:
    """Raise ConfigError if a section that was begun lacks a key that has no default."""
    for field in dataclasses.fields(section):
        if field.name in values or field.default is not REQUIRED or field.default_factory is not REQUIRED:
            continue
        inner = subsections(section).get(field.name)
        if inner is None:
            raise ConfigError(f"{section.KEY}.{field.name} is not set: it has no default")
        raise ConfigError(
            f"{section.KEY}.{field.name}.{next(iter(leaves(inner)))} is not set: whoever sets a key of {section.KEY} "
            f"must set all of its sections: {', '.join(subsections(section))}"
        )
