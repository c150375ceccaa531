"""Names of settings: nested ones brought to dotted keys, and the sentence about a key that there is not."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from dinov2.configs.parent_keys import PARENT_KEYS, parent_sections
from dinov2.configs.section import show_value
from dinov2.configs.tree import leaves, section_names
from dinov2.errors import ConfigError


def flatten(content: Mapping[Any, Any], *, source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk down to the keys, so that {'a': {'b': 1}} gives ('a.b', 1).

    Args:
        content: nested settings, as a YAML file holds them; keys may be dotted.
        source: where they come from, for the sentence.
        prefix: of all names.

    Raises:
        ConfigError: a key is neither one of ours nor a parent's.
    """
    for name, value in content.items():
        key = f"{prefix}{name}"
        is_leaf = key in leaves() or key in PARENT_KEYS
        if isinstance(value, dict) and not is_leaf:
            yield from flatten(value, source=source, prefix=f"{key}.")
        elif value is not None or key not in _all_sections():  # an empty section says nothing
            _require_known(key, value, source=source)
            yield key, value


def _all_sections() -> set[str]:
    return {*section_names(), *parent_sections()}


def _require_known(key: str, value: Any, *, source: str) -> None:
    """Raise ConfigError if `key` is no key of ours and no parent's."""
    names = [*leaves(), *PARENT_KEYS]
    if key in names:
        return
    if key in _all_sections():
        example = next(name for name in names if name.startswith(f"{key}."))
        raise ConfigError(f"{key}={show_value(value)} {source}: is a section; set its keys, e.g. {example}")
    raise ConfigError(f"unknown key {key} {source}; the nearest known key is {_nearest(key)}")


def _nearest(key: str) -> str:
    """Return the key that was probably meant: of the same name elsewhere, else of a similar name in the section."""
    section, _, last = key.casefold().rpartition(".")
    names = {name.casefold(): name for name in [*PARENT_KEYS, *leaves()]}
    parts = {name: name.rpartition(".") for name in names}
    beside = {end: name for name, (start, _, end) in parts.items() if start == section}
    same = [name for name, (_, _, end) in parts.items() if end == last]
    containing = [name for end, name in beside.items() if last in end or (len(end) > 3 and end in last)]
    similar = [beside[end] for end in difflib.get_close_matches(last, beside, n=1)]
    candidates = same or containing or similar or [name.casefold() for name in leaves()]
    return names[difflib.get_close_matches(key.casefold(), candidates, n=1, cutoff=0.0)[0]]
