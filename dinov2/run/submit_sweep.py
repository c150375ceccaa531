"""Several runs at once: `--sweep key=a,b`, the product of which is a list of runs, each with a folder of its own."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dinov2.errors import ConfigError

_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\](){}]*[\])}])")
_UNSAFE = re.compile(r"[^A-Za-z0-9._=,+-]+")
_MAX_NAME_CHARS = 200  # of the 255 of a file system
_EXAMPLE = "e.g. --sweep optim.base_lr=1e-4,5e-5"


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep."""

    name: str  # of its folder
    overrides: tuple[str, ...]  # key=value each


def read_sweep(flags: Sequence[str], *, given: Sequence[str]) -> list[SweepRun]:
    """Return all combinations of the values that the flags list, the last flag's changing fastest.

    Args:
        flags: `key=a,b` each; a comma within brackets separates nothing: `crops.global_crops_scale=[0.3,1],[0.5,1]`.
        given: the program's other arguments, which must not set a swept key as well.

    Returns:
        At least one run; without flags it has no name and no overrides.

    Raises:
        ConfigError: a flag is not written so, a key comes twice, or two runs would have one folder.
    """
    keys: list[str] = []
    values: list[list[str]] = []
    for flag in flags:
        key, equals, text = flag.partition("=")
        listed = [value.strip() for value in _OUTSIDE_BRACKETS.split(text)]
        if not key or not equals or "" in listed:
            raise ConfigError(f"--sweep {flag}: must be a key and its values, {_EXAMPLE}")
        if len(set(listed)) < len(listed):
            raise ConfigError(f"--sweep {flag}: names a value twice")
        if key in keys:
            raise ConfigError(f"--sweep {flag}: {key} is swept already; list all its values in one flag")
        if any(argument.partition("=")[0] == key for argument in given):
            raise ConfigError(f"--sweep {flag}: {key} is also given by itself; remove one of the two")
        keys.append(key)
        values.append(listed)
    runs = []
    for chosen in itertools.product(*values):
        overrides = tuple(f"{key}={value}" for key, value in zip(keys, chosen, strict=True))
        runs.append(SweepRun(name=_UNSAFE.sub("_", ",".join(overrides)), overrides=overrides))
    _require_own_folders(runs)
    return runs


def _require_own_folders(runs: Sequence[SweepRun]) -> None:
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--sweep: two runs would share the folder {name}; sweep names instead of paths")
        if len(name) > _MAX_NAME_CHARS:
            raise ConfigError(f"--sweep: the folder {name} would have more than {_MAX_NAME_CHARS} letters; sweep less")
