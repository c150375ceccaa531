"""Find out which settings a piece of code reads."""

import dataclasses
import sys
from typing import Any

from dinov2.configs import Config


def recording(cfg: Config) -> tuple[Config, set[str]]:
    """Return a twin of `cfg` and the set, filled from now on, of the dotted keys that are read from the twin.

    The twin is an instance of the same dataclasses, so that `dataclasses.asdict` and `isinstance` work. Writing the
    settings out (`to_dict`, `write_config`, `config_digest`) or copying them (`dataclasses.replace`) does not count as
    reading; reading from the copy does.
    """
    read: set[str] = set()
    return _twin(cfg, prefix="", read=read), read


def _twin(section: Any, *, prefix: str, read: set[str]) -> Any:
    keys = {field.name: f"{prefix}{field.name}" for field in dataclasses.fields(section)}
    values = dict(vars(section))
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            values[name] = _twin(value, prefix=f"{keys.pop(name)}.", read=read)

    class Recording(type(section)):
        def __getattribute__(self, name: str) -> Any:
            if name in keys and sys._getframe(1).f_code.co_filename != dataclasses.__file__:
                read.add(keys[name])
            return super().__getattribute__(name)

        def __post_init__(self) -> None:
            """Leave a copy unchecked: checking a value does not read it."""

    twin = object.__new__(Recording)
    vars(twin).update(values)
    return twin
