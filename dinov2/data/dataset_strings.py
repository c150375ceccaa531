"""Dataset strings: `Name:key=value:key=value`; a value with a colon or plus stands in single quotes."""

import re
from dataclasses import dataclass

from dinov2.errors import ConfigError

# A value and the colon or end behind it; inside quotes, two quotes stand for one.
_VALUE = re.compile(r"\s*(?:'(?P<quoted>(?:[^']|'')*)'|(?!')(?P<plain>[^:]*?))\s*(?::|\Z)")


@dataclass(frozen=True)
class DatasetString:
    """A parsed dataset string."""

    name: str  # of the registry, or package.module.Class
    options: dict[str, str]


def parse_dataset_str(text: str) -> DatasetString:
    """Take a dataset string apart.

    Args:
        text: e.g. `ImageFolder:root='C:/photos':split=TRAIN`. A value is quoted if it starts with a quote; inside
            quotes, two quotes stand for one.

    Raises:
        ConfigError: the string is empty, a quote is not closed, or an option is not `key=value`.
    """
    if not text.strip():
        raise ConfigError("the dataset string is empty; give one such as ImageFolder:root=photos")
    name, colon, rest = text.partition(":")
    name = name.strip()
    if "+" in name or "*" in name:
        raise _mixture(text)
    if not name or "=" in name:
        raise ConfigError(f"dataset string {text!r} does not start with a name; write it as ImageFolder:root=photos")
    if colon and not rest.strip():
        raise ConfigError(f"dataset string {text!r} ends in a colon without a key=value behind it")
    return DatasetString(name, _options(text, rest))


def _options(text: str, rest: str) -> dict[str, str]:
    """Read `key=value:key=value`; `text` is the whole string, for messages."""
    options: dict[str, str] = {}
    while rest:
        field = rest.partition(":")[0]
        key, equals, _ = field.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"dataset string {text!r}: {field.strip()!r} is not key=value; "
                "put a value that holds a colon in single quotes"
            )
        value = _VALUE.match(rest, len(key) + 1)
        if value is None:
            raise ConfigError(f"dataset string {text!r}: the single quote after {key.strip()}= is not closed")
        if "+" in (value["plain"] or ""):
            raise _mixture(text)
        if key.strip() in options:
            raise ConfigError(f"dataset string {text!r} gives {key.strip()} twice")
        quoted = value["quoted"]
        options[key.strip()] = value["plain"] if quoted is None else quoted.replace("''", "'")
        rest = rest[value.end() :]
    return options


def _mixture(text: str) -> ConfigError:
    return ConfigError(
        f"dataset string {text!r}: mixtures are not supported; put a value that holds a plus in single quotes"
    )
