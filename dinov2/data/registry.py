"""From a dataset string to a dataset: entry points of the group `dinov2.datasets`, and dotted class names.

The keys of a dataset are the keyword arguments of its class, converted as annotated: str, int, float, bool, or one of
these or None.
"""

import difflib
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from dinov2.data.dataset_strings import parse_dataset_str
from dinov2.errors import ConfigError

_GROUP = "dinov2.datasets"
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def known_datasets() -> list[str]:
    """Names that a dataset string may start with, sorted."""
    return sorted({entry.name for entry in entry_points(group=_GROUP)})


def build_dataset(dataset_str: str, settings: Mapping[str, Any]) -> Any:
    """Find the class that a dataset string names and call it.

    Args:
        dataset_str: `Name:key=value:...`.
        settings: arguments that come from the config rather than from the string; a class gets those that its
            constructor names.

    Raises:
        ConfigError: the name or a key is unknown, a key is missing, or a value has the wrong type.
    """
    parsed = parse_dataset_str(dataset_str)
    factory = _find(parsed.name)
    parameters = _parameters(factory)
    keys = [name for name in parameters if name not in settings]
    arguments = {name: value for name, value in settings.items() if name in parameters}
    for key, text in parsed.options.items():
        if key not in keys:
            raise ConfigError(f"dataset {parsed.name} has no key {key!r}{nearest(key, keys)}")
        arguments[key] = _convert(text, parameters[key].annotation, f"dataset {parsed.name}: {key}={text}")
    missing = [key for key in keys if key not in arguments and parameters[key].default is parameters[key].empty]
    if missing:
        raise ConfigError(f"dataset {parsed.name} needs {missing[0]}=...; its keys are {', '.join(keys)}")
    return factory(**arguments)


def nearest(name: str, known: list[str]) -> str:
    """Tail of a message about an unknown name: the nearest known one and all of them."""
    close = difflib.get_close_matches(name.lower(), [item.lower() for item in known], n=1, cutoff=0.5)
    match = next((item for item in known if close and item.lower() == close[0]), None)
    guess = f"; did you mean {match}?" if match else ";"
    return f"{guess} known are {', '.join(known) or 'none'}"


def _find(name: str) -> Callable[..., Any]:
    """Look a class up by its registered or dotted name."""
    if "." in name:
        return _import(name)
    found = [entry for entry in entry_points(group=_GROUP) if entry.name == name]
    if not found:
        known = known_datasets()
        raise ConfigError(
            f"unknown dataset {name!r}{nearest(name, known)}; a class of your own is named package.module.Class"
        )
    return found[0].load()


def _import(dotted: str) -> Callable[..., Any]:
    """Import `package.module.Class`."""
    module_name, _, attribute = dotted.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"dataset {dotted!r}: no module named {error.name!r} can be imported") from error
    if not callable(getattr(module, attribute, None)):
        raise ConfigError(f"dataset {dotted!r}: module {module_name} has no class {attribute}")
    return getattr(module, attribute)


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a class, with those of its base classes where it passes on all others as `**options`."""
    constructors = [kind.__init__ for kind in factory.__mro__] if inspect.isclass(factory) else [factory]
    found: dict[str, inspect.Parameter] = {}
    for constructor in constructors:
        parameters = inspect.signature(constructor, eval_str=True).parameters.values()
        named = [item for item in parameters if item.kind in (item.KEYWORD_ONLY, item.POSITIONAL_OR_KEYWORD)]
        found |= {item.name: item for item in named if item.name != "self" and item.name not in found}
        if not any(item.kind is item.VAR_KEYWORD for item in parameters):
            break
    return found


def _convert(text: str, hint: Any, where: str) -> Any:
    """Turn the text of a value into the annotated type."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if text.lower() in ("null", "none"):
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    try:
        if hint is bool:
            return _BOOLEANS[text.lower()]
        return hint(text) if hint in (int, float) else text
    except (KeyError, ValueError) as error:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[hint]
        raise ConfigError(f"{where}: must be {wanted}") from error
