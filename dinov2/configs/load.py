"""Read a YAML file and `key=value` arguments, lay them over the defaults, and build the checked tree."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs.config import Config
from dinov2.configs.default_layers import LAYERS
from dinov2.configs.files import Loader, read_config_file
from dinov2.configs.known_keys import flatten
from dinov2.configs.parent_keys import PARENT_KEYS
from dinov2.configs.section import show_value
from dinov2.configs.stages import OF_A_STAGE, read_stages, with_overrides
from dinov2.configs.translate import Given, translate
from dinov2.configs.tree import REQUIRED, build, leaves, nest, optional_sections
from dinov2.configs.values import convert, is_text
from dinov2.errors import ConfigError


def load_config(config_file: str | None, overrides: Sequence[str] = ()) -> Config:
    """Build the settings: defaults, then the file, then the overrides; later ones win.

    Args:
        config_file: path of a YAML file, ours or a parent's, see `dinov2.configs.files`; None: defaults and overrides
            only. A value may refer to another key or to the environment as OmegaConf does:
            `${crops.global_crops_size}`, `${oc.env:HOME}`.
        overrides: `section.key=value` each, the value written as in YAML (text needs no quotes); for a stage,
            `stages.<name>.section.key=value`.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; the sentence names it.
    """
    given: dict[str, Given] = {}
    of_stages: list[tuple[str, Any]] = []
    if config_file is not None:
        given = {key: Given(value, 0) for key, value in read_config_file(config_file).items()}
    for override in overrides:
        parsed = _parse_override(override)
        if override.startswith(OF_A_STAGE):
            of_stages += parsed.items()
            continue
        for section in optional_sections():
            if section in parsed and parsed[section] is None:  # takes back what the file or an earlier argument gave
                given = {key: value for key, value in given.items() if not key.startswith(f"{section}.")}
        for key, value in flatten(parsed, source="on the command line"):
            given[key] = Given(value, 1)
    given["stages"] = Given(with_overrides(given["stages"].value if "stages" in given else [], of_stages), 0)
    resolved = _resolve(_over_defaults(given))
    stages = resolved.pop("stages").value
    translated = translate(resolved)
    read = read_stages(stages, given=resolved, base=translated)
    return build(
        translated.values,
        stages=read.stages,
        notes=(*translated.notes, *read.notes),
        refusals=(*translated.refusals, *read.refusals),
    )


def _over_defaults(given: Mapping[str, Given]) -> dict[str, Given]:
    """Lay the given values over the layer of defaults that they name, or that a DINOv3 file stands for."""
    if "defaults" in given:
        named = given["defaults"]
        family = convert("defaults", named.value, leaves()["defaults"].annotation)
        layer = named.layer
    else:
        family = "dinov3" if "MODEL.META_ARCHITECTURE" in given else leaves()["defaults"].default
        layer = -1
    defaults = {key: Given(value, -1) for key, value in LAYERS[family].items()}
    return defaults | dict(given) | {"defaults": Given(family, layer)}


def _parse_override(override: str) -> Mapping[str, Any]:
    """Split `key=value`; the value of a text key is taken as it stands, others are read as YAML."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"argument {override!r}: must be written key=value, e.g. optim.epochs=10")
    text = text.strip()
    known_as = key.removeprefix(OF_A_STAGE).partition(".")[2] if key.startswith(OF_A_STAGE) else key
    known = leaves().get(known_as) or PARENT_KEYS.get(known_as)
    if known is not None and is_text(known.annotation) and not _is_quoted(text) and text not in ("null", "~"):
        return {key: text}
    try:
        return {key: yaml.load(text, Loader=Loader)}
    except yaml.YAMLError:
        raise ConfigError(f"argument {override!r}: the value is not valid YAML") from None


def _is_quoted(text: str) -> bool:
    return len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""


def _resolve(given: Mapping[str, Given]) -> dict[str, Given]:
    """Replace `${...}` in the given values, looking at the defaults as well."""
    if not any("${" in text or text == "???" for value in given.values() for text in _texts(value.value)):
        return dict(given)  # building OmegaConf's tree takes longer than all the rest
    defaults = {key: leaf.default for key, leaf in leaves().items() if leaf.default is not REQUIRED}
    tree = nest(defaults | {key: value.value for key, value in given.items()})
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        written = f"{key}={show_value(given[key].value)}" if key in given else key
        raise ConfigError(f"{written}: cannot be resolved ({str(error).splitlines()[0]})") from None
    return {key: Given(_at(resolved, key), value.layer) for key, value in given.items()}


def _texts(value: Any) -> Iterator[str]:
    """Walk through the texts that a value holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree
