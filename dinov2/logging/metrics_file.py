"""`training_metrics.json`: one JSON object a line, one line a step, in the order of the steps."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dinov2.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

_DIGITS = 9  # enough to tell any two float32 numbers apart
_BYTES_A_LINE = 1024  # of most runs less


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
        try:
            self._last, self._last_offset = cut_back(path, start_step=start_step)
            path.touch()
            self._file = path.open("r+b")
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error

    def append(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Write one line for each (step, values).

        Raises:
            TrainingError: the file cannot be written any more.
        """
        try:
            for step, values in rows:
                self._last_offset = self._file.tell()
                self._file.write(_line(step, values))
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written ({error.strerror}); the last checkpoint is intact, start again once "
                f"there is room"
            ) from error
        if rows:
            self._last = rows[-1]

    def add_to_last(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the line of the step written last, or write a new line where the last is of another step.

        The line may be one from before the run was interrupted.
        """
        if self._last is None or self._last[0] != step:
            self.append([(step, dict(values))])
            return
        merged = self._last[1] | dict(values)
        self._file.seek(self._last_offset)  # written over in one call, so that a kill does not lose the line
        self.append([(step, merged)])
        self._file.truncate()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # `append` has said so; nothing else waits to be written
            self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines one by one; a line that was not completely written is left out."""
    with path.open("rb") as file:
        for line in file:
            if (values := _read_line(line)) is not None:
                yield values


def read_last_metrics(path: Path, num_lines: int) -> list[dict[str, Any]]:
    """Read the last lines, however long the file is; lines that were not completely written are left out."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        stretch = _BYTES_A_LINE * num_lines
        while True:
            start = max(size - stretch, 0)
            file.seek(start)
            lines = file.read(size - start).splitlines()
            found = [values for line in lines[1 if start else 0 :] if (values := _read_line(line)) is not None]
            if len(found) >= num_lines or start == 0:
                return found[-num_lines:]
            stretch *= 4


def cut_back(path: Path, *, start_step: int) -> tuple[tuple[int, dict[str, Any]] | None, int]:
    """Remove the lines of `start_step` and later ones; the file is replaced in one move, or left alone.

    Returns:
        Step and values of the last line that is left, None where there is none, and where this line begins, bytes.
    """
    last, offset = None, 0
    if not path.exists():
        return last, offset
    if start_step == 0:
        path.unlink()
        return last, offset
    partial = path.with_name(f"{path.name}.tmp")
    kept = 0
    with partial.open("wb") as file:
        for values in read_metrics(path):
            step = values.pop("iteration")
            if step < start_step:
                last, offset = (step, values), file.tell()
                file.write(_line(step, values))
                kept += 1
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    logger.info("metrics_file=%s kept_lines=%d start_step=%d", path.name, kept, start_step)
    return last, offset


def _read_line(line: bytes) -> dict[str, Any] | None:
    """Return the values of a step; None for a line that holds none."""
    try:
        values = json.loads(line)
    except ValueError:  # cut off, or not even text
        return None
    return values if isinstance(values, dict) and isinstance(values.get("iteration"), int) else None


def _line(step: int, values: Mapping[str, float | None]) -> bytes:
    """JSON has no NaN or infinity: they are written as null."""
    shown = {name: None if value is None else _rounded(value) for name, value in values.items()}
    return json.dumps({"iteration": step, **shown}, allow_nan=False).encode() + b"\n"


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
