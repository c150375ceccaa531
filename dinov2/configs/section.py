"""Base of the config sections: a frozen dataclass that knows its dotted name and checks its own keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dinov2.errors import ConfigError


def show_value(value: Any) -> str:
    """Write a value the way it is typed in YAML: null, true, 'text', [1, 2]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(show_value(item) for item in value) + "]"
    return repr(value)


def is_range(pair: Sequence[float], low: float, high: float) -> bool:
    """Tell whether a (smallest, largest) pair is in order and inside low..high."""
    return low <= pair[0] <= pair[1] <= high


def nearest_multiples(value: int, divisor: int) -> str:
    """Name the multiples of `divisor` around `value`, for the end of an error sentence: '208 or 224'."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings. `KEY` is its dotted name, as in `<KEY>.<field>=value`."""

    KEY: ClassVar[str] = ""

    def require(self, name: str, holds: bool, must_be: str) -> None:
        """Raise the error sentence of field `name` unless `holds`."""
        if not holds:
            raise ConfigError(f"{self.KEY}.{name}={show_value(getattr(self, name))}: must be {must_be}")


def require_rising_and_falling(section: Section) -> None:
    """Check the five keys of a schedule: linear from start to peak, cosine to end, then constant."""
    for name in ("start", "peak", "end", "warmup_epochs"):
        section.require(name, getattr(section, name) >= 0, "at least 0")
    section.require("cosine_epochs", (section.cosine_epochs or 0) >= 0, "at least 0, or null")
