"""`training_metrics.json`: one JSON object a line, one line a step, in the order of the steps."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dinov2.errors import ConfigError

logger = logging.getLogger(__name__)

_DIGITS = 9  # enough to tell any two float32 numbers apart


class MetricsFile:
    """Append lines to the file of a run; one process owns it.

    Args:
        path: the file; its folder exists.
        start_step: lines of this step and later ones, from before the run was interrupted, are removed.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, *, start_step: int) -> None:
        self.path = path
        self._last: tuple[int, dict[str, float]] | None = None
        self._last_offset = 0
        try:
            cut_back(path, start_step=start_step)
            self._file = path.open("ab")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error

    def append(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Write one line for each (step, values)."""
        for step, values in rows:
            self._last_offset = self._file.tell()
            self._file.write(_line(step, values))
        if rows:
            self._last = rows[-1]
        self._file.flush()

    def add_to_last(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the line of the step written last, or write a new line where the last is of another step."""
        if self._last is None or self._last[0] != step:
            self.append([(step, dict(values))])
            return
        merged = self._last[1] | dict(values)
        self._file.truncate(self._last_offset)
        self.append([(step, merged)])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines one by one; a line that was not completely written is left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(values, dict) and isinstance(values.get("iteration"), int):
                yield values


def cut_back(path: Path, *, start_step: int) -> None:
    """Remove the lines of `start_step` and later ones; the file is replaced in one move, or left alone."""
    if not path.exists():
        return
    if start_step == 0:
        path.unlink()
        return
    partial = path.with_name(f"{path.name}.tmp")
    kept = 0
    with partial.open("wb") as file:
        for values in read_metrics(path):
            if values["iteration"] < start_step:
                file.write(_line(values.pop("iteration"), values))
                kept += 1
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    logger.info("metrics_file=%s kept_lines=%d start_step=%d", path.name, kept, start_step)


def _line(step: int, values: Mapping[str, float | None]) -> bytes:
    """JSON has no NaN or infinity: they are written as null."""
    shown = {name: None if value is None else _rounded(value) for name, value in values.items()}
    return json.dumps({"iteration": step, **shown}, allow_nan=False).encode() + b"\n"


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
