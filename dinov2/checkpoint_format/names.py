"""What the files of a checkpoint are called."""

import re
from pathlib import Path

MANIFEST_SUFFIX = ".manifest.json"
TEMPORARY_SUFFIX = ".tmp"

_NAME = re.compile(r"model_\d{7,}")
_NUMBERED = re.compile(r"model_(\d{7,})\.manifest\.json")
_RANK_FILE = re.compile(r"(?P<name>.+)\.rank_(\d+|\{rank\})\.pth")


def checkpoint_name(iteration: int) -> str:
    """Name the checkpoint after an iteration, e.g. `model_0003749`."""
    return f"model_{iteration:07d}"


def iteration_of(name: str) -> int:
    """Read the iteration from a checkpoint's name."""
    return int(name.removeprefix("model_"))


def rank_file_name(name: str, rank: int) -> str:
    """Name one rank's file of a checkpoint."""
    return f"{name}.rank_{rank}.pth"


def manifest_name(name: str) -> str:
    """Name the manifest of a checkpoint."""
    return f"{name}{MANIFEST_SUFFIX}"


def temporary(path: Path) -> Path:
    """Name a file while it is being written."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def split_path(path: str | Path) -> tuple[Path, str]:
    """Split the path of a checkpoint into its folder and name.

    Args:
        path: a rank file, the pattern `model_0003749.rank_{rank}.pth`, the manifest, or `folder/model_0003749`.
    """
    path = Path(path)
    if match := _RANK_FILE.fullmatch(path.name):
        return path.parent, match["name"]
    return path.parent, path.name.removesuffix(MANIFEST_SUFFIX)


def is_checkpoint_path(path: str | Path) -> bool:
    """Say whether a path names a rank-sharded checkpoint, in one of the ways `split_path` knows, by its form alone."""
    name = Path(path).name
    return bool(_RANK_FILE.fullmatch(name) or name.endswith(MANIFEST_SUFFIX) or _NAME.fullmatch(name))


def find_checkpoints(folder: Path) -> list[str]:
    """List the names of the checkpoints of a run that have a manifest, oldest iteration first."""
    if not folder.is_dir():
        return []
    matches = [_NUMBERED.fullmatch(entry.name) for entry in folder.iterdir()]
    return [checkpoint_name(iteration) for iteration in sorted(int(match[1]) for match in matches if match)]


def has_manifest(folder: Path, name: str) -> bool:
    """Say whether a checkpoint has a manifest, sound or not."""
    return (folder / manifest_name(name)).is_file()
