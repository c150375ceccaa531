"""Dataset strings: `Name:key=value:key=value`, or several with a plus between two, each with a weight or none.

A value with a colon or plus stands in single quotes.
"""

import math
import re
from dataclasses import dataclass

from dinov2.errors import ConfigError

_NAME = re.compile(r"\s*(?:(?P<weight>[^:+*'=]*)\*)?\s*(?P<name>[^:+]*?)\s*(?P<end>[:+]|\Z)")
_KEY = re.compile(r"\s*(?P<key>[^:+=]*?)\s*=")
# A value and what stands behind it; inside quotes, two quotes stand for one.
_VALUE = re.compile(r"\s*(?:'(?P<quoted>(?:[^']|'')*)'|(?!')(?P<plain>[^:+]*?))\s*(?P<end>[:+]|\Z)")
_PLUS = "put a value that holds a plus in single quotes"


@dataclass(frozen=True)
class DatasetString:
    """One part of a dataset string."""

    name: str  # of the registry, or package.module.Class
    options: dict[str, str]
    text: str  # the part as it was written, without its weight
    weight: float | None = None  # > 0; share of the part in training, after division by the sum of all


def parse_dataset_str(text: str) -> tuple[DatasetString, ...]:
    """Take a dataset string apart.

    Args:
        text: e.g. `ImageFolder:root='C:/photos':split=TRAIN` or `0.7*A:root=x+0.3*B:root=y`. A value is quoted if it
            starts with a quote; inside quotes, two quotes stand for one.

    Returns:
        Its parts, one at least; all have weights, or none has.

    Raises:
        ConfigError: the string is empty, a quote is not closed, an option is not `key=value`, or a weight is wrong.
    """
    if not text.strip():
        raise ConfigError("the dataset string is empty; give one such as ImageFolder:root=photos")
    parts, place = [], 0
    while place is not None:
        part, place = _part(text, place)
        parts.append(part)
    if len({part.weight is None for part in parts}) > 1:
        raise ConfigError(f"dataset string {text!r} gives a weight to some parts only; give one to each, or to none")
    return tuple(parts)


def _part(text: str, start: int) -> tuple[DatasetString, int | None]:
    """Read one part from `start` on; also tells where the next one starts."""
    head = _NAME.match(text, start)
    assert head is not None, "the pattern fits anything"
    name, weight = head["name"], _weight(text, head["weight"])
    if not name and (start or head["end"] == "+"):
        raise ConfigError(f"dataset string {text!r} has a plus with nothing on one side; {_PLUS}")
    if "=" in name and start:
        raise ConfigError(f"dataset string {text!r}: {name!r} behind a plus is no name of a dataset; {_PLUS}")
    if not name or "=" in name:
        raise ConfigError(f"dataset string {text!r} does not start with a name; write it as ImageFolder:root=photos")
    options: dict[str, str] = {}
    end, place = head["end"], head.end()
    while end == ":":
        key, value, end, place = _option(text, place)
        if key in options:
            raise ConfigError(f"dataset string {text!r} gives {key} twice")
        options[key] = value
    stop = place - 1 if end == "+" else place
    first = head.start("name")
    return DatasetString(name, options, text[first:stop].strip(), weight), place if end == "+" else None


def _option(text: str, place: int) -> tuple[str, str, str, int]:
    """Read `key=value` and the sign behind it: key, value, sign, place behind the sign."""
    if not text[place:].strip():
        raise ConfigError(f"dataset string {text!r} ends in a colon without a key=value behind it")
    key = _KEY.match(text, place)
    if key is None or not key["key"]:
        field = re.split("[:+]", text[place:])[0].strip()
        raise ConfigError(
            f"dataset string {text!r}: {field!r} is not key=value; put a value that holds a colon in single quotes"
        )
    value = _VALUE.match(text, key.end())
    if value is None:
        raise ConfigError(f"dataset string {text!r}: the single quote after {key['key']}= is not closed")
    quoted = value["quoted"]
    plain = value["plain"] if quoted is None else quoted.replace("''", "'")
    return key["key"], plain, value["end"], value.end()


def _weight(text: str, weight: str | None) -> float | None:
    """Read a weight."""
    if weight is None:
        return None
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigError(f"dataset string {text!r}: the weight {weight.strip()!r} must be a number above 0")
    return number
