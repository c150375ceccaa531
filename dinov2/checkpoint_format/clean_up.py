"""Removing checkpoints and what is left of unfinished ones, so that a kill at any instant leaves a sound folder."""

import re
import zipfile
from pathlib import Path

from dinov2.checkpoint_format.manifest import remove_manifest
from dinov2.checkpoint_format.names import find_checkpoints, split_path

_LEFTOVER = re.compile(r"(.+\.rank_\d+\.pth|.+\.manifest\.json|last_checkpoint\.rank_\d+|best_checkpoint\.json)\.tmp")


def remove_checkpoint(folder: Path, name: str) -> None:
    """Delete a checkpoint, its manifest first."""
    remove_manifest(folder, name)
    for path in folder.glob(f"{name}.rank_*.pth"):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, num_ranks: int | None = None) -> None:
    """Delete what writers that were killed left under temporary names.

    Args:
        folder: of the run.
        num_ranks: also delete the tags (`last_checkpoint.rank_3`) of higher ranks, which a run with more had; None
            leaves them.
    """
    for path in folder.glob("*.tmp"):
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
    for path in folder.glob("last_checkpoint.rank_*"):
        rank = path.name.rpartition("_")[2]
        if num_ranks is not None and rank.isdigit() and int(rank) >= num_ranks:
            path.unlink(missing_ok=True)


def remove_incomplete(folder: Path, *, before_iteration: int | None = None) -> None:
    """Delete rank files of numbered checkpoints that have no manifest; those of other programs stay.

    Args:
        folder: of the run.
        before_iteration: only those older than this; None removes all, for a start when nothing is being written.
    """
    for path in _without_manifest(folder):
        number = int(split_path(path)[1].removeprefix("model_"))
        if (before_iteration is None or number < before_iteration) and not _is_foreign(path):
            path.unlink(missing_ok=True)


def foreign_rank_files(folder: Path) -> list[Path]:
    """List the files that are called like rank files but were saved by another program, as the official code does."""
    return sorted(filter(_is_foreign, _without_manifest(folder)))


def _without_manifest(folder: Path) -> list[Path]:
    complete = set(find_checkpoints(folder))
    names = {path: split_path(path)[1] for path in folder.glob("model_*.rank_*.pth")}
    return [path for path, name in names.items() if name not in complete and name.removeprefix("model_").isdigit()]


def _is_foreign(path: Path) -> bool:
    """Say whether a file is a whole one of `torch.save` without what every rank file has; a damaged one is not."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [archive.read(name) for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    except (OSError, zipfile.BadZipFile):
        return False
    return not any(b"checkpointables" in content for content in pickles)
