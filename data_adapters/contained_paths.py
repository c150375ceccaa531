"""Paths that a file of somebody else names: none may leave the dataset's folder, and missing ones are found at once."""

import os
from collections.abc import Iterable, Sequence

from dinov2.data.index import counted
from dinov2.errors import DatasetError


def why_outside(path: str) -> str | None:
    """Say why a relative path, with slashes or backslashes, leaves the folder it starts from; None if it does not.

    Links are not looked at; `require_inside` does that.
    """
    if "\0" in path:
        return "which holds a NUL character"
    parts = path.replace("\\", "/").split("/")
    if not parts[0] or (len(parts[0]) == 2 and parts[0].endswith(":")):
        return "which is an absolute path"
    if ".." in parts:
        return "which leads upwards by .."
    return None


def require_inside(root: str, path: str) -> None:
    """Refuse a path below `root` that leads out of it by a link.

    Args:
        root: of the dataset; may be a link itself.
        path: `root` joined with a path for which `why_outside` is None.

    Raises:
        DatasetError: it leaves `root`.
    """
    inside = os.path.realpath(root)
    if os.path.commonpath((inside, os.path.realpath(path))) != inside:
        raise DatasetError(f"link {path} leaves the dataset's folder; copy the files, or set root= above both")


def find_missing(root: str, paths: Sequence[bytes], *, description: str) -> list[int]:
    """Find the paths that are no files; each folder is listed once, with a progress bar if there are many.

    Args:
        root: of the dataset.
        paths: relative to it, for which `why_outside` is None.
        description: of the progress bar.

    Returns:
        Indices of the paths without a file, rising.

    Raises:
        DatasetError: a path leaves `root` by a link.
    """
    folders: dict[bytes, list[int]] = {}
    for index, path in enumerate(paths):
        folders.setdefault(os.path.dirname(path), []).append(index)
    missing: list[int] = []
    for folder, indices in counted(folders.items(), description=description, unit="folders"):
        missing += _missing_in(root, folder, [(index, os.path.basename(paths[index])) for index in indices])
    return sorted(missing)


def _missing_in(root: str, folder: bytes, names: Iterable[tuple[int, bytes]]) -> list[int]:
    """Indices of those names that are no files of a folder."""
    place = os.path.join(os.fsencode(root), folder)
    require_inside(root, os.fsdecode(place))
    try:
        with os.scandir(place) as entries:
            files = {entry.name: entry.is_symlink() for entry in entries if entry.is_file()}
    except OSError:
        return [index for index, _ in names]
    missing = []
    for index, name in names:
        if name not in files:
            missing.append(index)
        elif files[name]:
            require_inside(root, os.fsdecode(os.path.join(place, name)))
    return missing
