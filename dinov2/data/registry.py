"""From a dataset string to a dataset: entry points of the group `dinov2.datasets`, and dotted class names.

The keys of a dataset are the keyword arguments of its class, converted as annotated: str, int, float, bool, or one of
these or None.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import entry_points
from typing import Any

from dinov2.data.dataset_strings import DatasetString, parse_dataset_str
from dinov2.data.datasets.mixed import MixedDataset
from dinov2.data.names import nearest
from dinov2.errors import ConfigError

_GROUP = "dinov2.datasets"
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class UnknownDatasetError(ConfigError):
    """No dataset is registered under a name."""


def known_datasets() -> list[str]:
    """Names that a dataset string may start with, sorted."""
    return sorted({entry.name for entry in entry_points(group=_GROUP)})


def build_dataset(dataset_str: str, settings: Mapping[str, Any]) -> Any:
    """Find the classes that a dataset string names and call them.

    Args:
        dataset_str: `Name:key=value:...`, or several such parts; see `parse_dataset_str`.
        settings: arguments that come from the config rather than from the string; a class gets those that its
            constructor names.

    Returns:
        The dataset, a `MixedDataset` if the string has several parts.

    Raises:
        ConfigError: the name or a key is unknown, a key is missing, or a value has the wrong type.
    """
    parts = parse_dataset_str(dataset_str)
    if len(parts) == 1:
        return _prepare(parts[0], settings)()
    try:
        builders = [_prepare(part, settings) for part in parts]
    except UnknownDatasetError as error:
        raise ConfigError(f"{error}; a value that holds a plus stands in single quotes") from error
    weights = None if parts[0].weight is None else [part.weight or 0.0 for part in parts]
    return MixedDataset([build() for build in builders], [part.text for part in parts], weights=weights)


def _prepare(part: DatasetString, settings: Mapping[str, Any]) -> Callable[[], Any]:
    """Find the class of one part and check its keys; what is returned builds the dataset."""
    factory = _find(part.name)
    parameters = _parameters(factory)
    keys = [name for name in parameters if name not in settings]
    arguments = {name: value for name, value in settings.items() if name in parameters}
    for key, text in part.options.items():
        if key not in keys:
            raise ConfigError(f"dataset {part.name} has no key {key!r}{nearest(key, keys)}")
        arguments[key] = _convert(text, parameters[key].annotation, f"dataset {part.name}: {key}={text}")
    missing = [key for key in keys if key not in arguments and parameters[key].default is parameters[key].empty]
    if missing:
        raise ConfigError(f"dataset {part.name} needs {missing[0]}=...; its keys are {', '.join(keys)}")
    return partial(factory, **arguments)


def _find(name: str) -> Callable[..., Any]:
    """Look a class up by its registered or dotted name."""
    if "." in name:
        return _import(name)
    found = [entry for entry in entry_points(group=_GROUP) if entry.name == name]
    if not found:
        known = known_datasets()
        raise UnknownDatasetError(
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
    hidden = getattr(factory, "HIDDEN_KEYS", ())
    return {name: parameter for name, parameter in found.items() if name not in hidden}


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
