"""What the commands of `run/checkpoint.py` share: finding and opening the checkpoint that a path means, and sizes."""

import json
from pathlib import Path
from typing import Any

from dinov2 import checkpoint_format as files
from dinov2.errors import CheckpointError
from dinov2.hub.open_checkpoint import explain_damage

CHECKPOINT_HELP = (
    "checkpoint of a run: RUN/model_0003749, one of its rank files, its manifest, or the folder RUN, "
    "which means the newest in it"
)


def find_checkpoint(path: str) -> tuple[Path, str]:
    """Return the folder and the name of the checkpoint that a path means; of a folder, the newest.

    Raises:
        CheckpointError: there is none, or the path is not that of a checkpoint of a run.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        names = files.find_checkpoints(place)
        if not names:
            raise CheckpointError(f"{path}: holds no complete checkpoint of a training run")
        return place, names[-1]
    if not files.is_checkpoint_path(place):
        what = "is no checkpoint of a training run" if place.exists() else "no such checkpoint"
        raise CheckpointError(f"{path}: {what}; give RUN/model_0003749, a rank file, or the folder of a run")
    return files.split_path(place)


def open_stored(path: str) -> files.StoredCheckpoint:
    """Open the checkpoint that a path means; sizes and structure are verified, tensors when they are read.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder, name = find_checkpoint(path)
    try:
        return files.StoredCheckpoint.open(folder, name)
    except files.DamagedCheckpointError as error:
        raise explain_damage(folder, name, error) from error


def read_settings(text: str) -> dict[str, Any]:
    """Return the nested settings that a checkpoint was saved with; empty where it has none."""
    try:
        settings = json.loads(text)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    if not isinstance(tree, dict):
        return {path: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{path}.{key}" if path else key)
    return flat


def format_bytes(count: int) -> str:
    """Write a number of bytes for people: `344.3 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def format_plural(count: int, noun: str) -> str:
    """Write a number of things: `1 file`, `2 files`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def format_columns(rows: list[list[str]]) -> str:
    """Lay rows out in columns that are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
