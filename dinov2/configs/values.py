"""From a raw YAML value to the type of its key, or to the sentence that says what the key must be."""

import math
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

from dinov2.configs.section import show_value
from dinov2.errors import ConfigError

_NAMES = {
    bool: ("true or false",),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("text", "names"),
}


def convert(key: str, value: Any, annotation: Any) -> Any:
    """Return `value` as the type `annotation` of config key `key`; lists become tuples.

    Whole floats pass for integers (1e3) and integers for floats; nothing else changes its kind. For text, null means
    empty; for text that may be null, empty means null.

    Raises:
        ConfigError: the value is of another kind, not one of the choices, or not finite.
    """
    kind, optional = split_optional(annotation)
    if value is None or (value == "" and kind is str):
        if optional:
            return None
        if kind is str:
            return ""
    try:
        return _as_kind(value, kind)
    except (TypeError, ValueError, OverflowError):
        hint = "; put it in quotes" if kind is str and isinstance(value, int | float) else ""
        null = " or null" if optional else ""
        raise ConfigError(f"{key}={show_value(value)}: must be {_describe(kind)}{null}{hint}") from None


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """Split `X | None` into (X, True); give any other annotation back with False."""
    if get_origin(annotation) in (Union, types.UnionType):
        (kind,) = (arg for arg in get_args(annotation) if arg is not type(None))
        return kind, True
    return annotation, False


def is_text(annotation: Any) -> bool:
    """Tell whether a key of this type holds text, free or one of some choices."""
    kind, _ = split_optional(annotation)
    return kind is str or get_origin(kind) is Literal


def _as_kind(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, or raise TypeError or ValueError."""
    if get_origin(kind) is tuple:
        return _as_tuple(value, get_args(kind))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(value)
        return value
    if kind in (bool, str):
        if type(value) is not kind:
            raise TypeError(value)
        return value
    if type(value) not in (int, float) or not math.isfinite(value) or kind(value) != value:
        raise TypeError(value)
    return kind(value)


def _as_tuple(value: Any, kinds: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(value)
    if kinds[-1] is Ellipsis:
        return tuple(_as_kind(item, kinds[0]) for item in value)
    return tuple(_as_kind(item, kind) for item, kind in zip(value, kinds, strict=True))


def _describe(kind: Any) -> str:
    """Name a type in the words of an error sentence."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        count = "" if kinds[-1] is Ellipsis else f"{len(kinds)} "
        return f"a list of {count}{_NAMES[kinds[0]][1]}"
    return _NAMES[kind][0]
