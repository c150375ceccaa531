"""Finding the images below a folder, once: their paths go into an index that stays true until a folder changes.

Hidden files and folders are left out. A link may point to another place below the root, not out of it.
"""

import fnmatch
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dinov2.data.index import Index, Strings, counted, stored_index
from dinov2.errors import DatasetError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".ppm", ".pgm")
_SETTLED_NS = 2 * 10**9  # a folder changed so shortly before its scan may change again within one tick of its clock


def scan_images(
    root: str,
    *,
    cache_dir: str | None = None,
    folders: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    extensions: Sequence[str] = EXTENSIONS,
    folder_extensions: Sequence[str] = (),
) -> Index:
    """Find all images below a folder, in the order of their paths.

    Args:
        root: the folder.
        cache_dir: where the index is kept; None: in memory.
        folders: names right below `root` to look into; None: all, and `root` itself.
        exclude: patterns with `*`, `?` and `[...]` of files and folders to leave out; one with a slash is compared
            with the path below `root`, where `*` also stands for slashes, others with the name alone.
        extensions: of images, in lower case.
        folder_extensions: of folders that are images themselves, such as `.zarr`, in lower case.

    Returns:
        An index with column `path`, `Strings` below `root`, and columns about folders for its own use.

    Raises:
        DatasetError: the folder is missing, cannot be read, holds no image, or a link leaves it.
    """
    if not os.path.isdir(root):
        problem = "is not a folder" if os.path.exists(root) else "does not exist"
        raise DatasetError(f"folder {root} {problem}; check root= in the dataset string")
    chosen = None if folders is None else list(folders)
    return stored_index(
        cache_dir,
        name="folder",
        key=["folder", 1, os.fsencode(os.path.realpath(root)).hex(), chosen, list(exclude), list(extensions)]
        + ([list(folder_extensions)] if folder_extensions else []),
        build=lambda: _scan(root, chosen, exclude, extensions, folder_extensions),
        is_current=lambda index: _is_unchanged(root, index),
    )


def _scan(
    root: str,
    folders: Sequence[str] | None,
    exclude: Sequence[str],
    extensions: Sequence[str],
    folder_extensions: Sequence[str],
) -> Index:
    """Go through the folder."""
    started_ns = time.time_ns()
    endings, folder_endings = (tuple(map(os.fsencode, texts)) for texts in (extensions, folder_extensions))
    walk = _Walk(os.fsencode(root), folders, exclude, endings, folder_endings)
    paths = Strings.pack(counted(walk.images(), description=f"looking for images in {root}"))
    if not len(paths):
        raise _nothing_found(root, walk, exclude, [*extensions, *folder_extensions])
    return Index(
        {
            "path": paths,
            "folder": Strings.pack(walk.folders),
            "folder_changed_ns": np.array(walk.changed_ns, dtype=np.int64),
        },
        {"scanned_ns": started_ns},
    )


def _nothing_found(root: str, walk: "_Walk", exclude: Sequence[str], extensions: Sequence[str]) -> DatasetError:
    if walk.num_excluded:
        return DatasetError(f"folder {root}: all its images are left out by exclude={','.join(exclude)}")
    if not walk.num_others:
        return DatasetError(f"folder {root} is empty")
    return DatasetError(
        f"folder {root} holds {walk.num_others} files but no image ({' '.join(extensions)}); "
        f"the first: {os.fsdecode(walk.first_other)}"
    )


def _is_unchanged(root: str, index: Index) -> bool:
    """Tell whether no folder has changed since it was scanned; a changed file in an unchanged folder is no change."""
    changed_ns = index["folder_changed_ns"]
    if changed_ns.max() + _SETTLED_NS > index.attributes["scanned_ns"]:
        return False
    top = os.fsencode(root)
    try:
        return all(
            _changed_ns(os.path.join(top, folder)) == known
            for folder, known in zip(index["folder"], changed_ns.tolist(), strict=True)
        )
    except OSError:
        return False


def _changed_ns(folder: bytes) -> int:
    """When a folder last changed by the clock of its file system, which no program can set back."""
    return os.stat(folder).st_ctime_ns


@dataclass
class _Level:
    """A folder that is being gone through."""

    path: bytes  # absolute, or as the root was given
    below: bytes  # below the root, with a slash at its end; empty for the root
    real: tuple[bytes, ...]  # the real folders from the root to it
    names: Iterator[bytes]
    special: dict[bytes, "os.DirEntry[bytes]"]  # links and folders among them


@dataclass
class _Walk:
    """One way through a folder, and what was met."""

    root: bytes
    only: Sequence[str] | None
    exclude: Sequence[str]
    extensions: tuple[bytes, ...]
    folder_extensions: tuple[bytes, ...] = ()
    folders: list[bytes] = field(default_factory=list)  # below the root; the root is empty
    changed_ns: list[int] = field(default_factory=list)
    num_excluded: int = 0
    num_others: int = 0
    first_other: bytes = b""

    def images(self) -> Iterator[bytes]:
        """Yield the images, below the root, in order."""
        levels = [self._enter(self.root, b"", (os.path.realpath(self.root),))]
        while levels:
            level = levels[-1]
            for name in level.names:
                entry = level.special.get(name)
                target = b"" if entry is None else _real_path(entry, level.real)
                is_folder = entry is not None and entry.is_dir()
                if is_folder and name.lower().endswith(self.folder_extensions):
                    yield level.below + name
                    continue
                if entry is not None and is_folder:
                    below = level.below + name + b"/"
                    levels.append(self._enter(entry.path, below, (*level.real, target)))
                    break
                if entry is not None and not entry.is_file():
                    continue
                if name.lower().endswith(self.extensions):
                    yield level.below + name
                else:
                    self.num_others += 1
                    self.first_other = self.first_other or os.path.join(level.path, name)
            else:
                levels.pop()

    def _enter(self, path: bytes, below: bytes, real: tuple[bytes, ...]) -> _Level:
        """List a folder; of plain files, which may be a million, the names alone are kept."""
        names: list[bytes] = []
        special: dict[bytes, os.DirEntry[bytes]] = {}
        try:
            self.changed_ns.append(_changed_ns(path))
            self.folders.append(below)
            with os.scandir(path) as entries:
                for entry in entries:
                    if not self._is_wanted(entry.name, below):
                        continue
                    names.append(entry.name)
                    if not entry.is_file(follow_symlinks=False):
                        special[entry.name] = entry
        except OSError as error:
            raise DatasetError(f"folder {os.fsdecode(path)} cannot be read: {error.strerror}") from error
        names.sort()
        return _Level(path, below, real, iter(names), special)

    def _is_wanted(self, name: bytes, below: bytes) -> bool:
        if name.startswith(b"."):
            return False
        if self.only is not None and not below and os.fsdecode(name) not in self.only:
            return False
        if self.exclude and is_excluded(os.fsdecode(below + name), self.exclude):
            self.num_excluded += 1
            return False
        return True


def is_excluded(path: str, patterns: Iterable[str]) -> bool:
    """Tell whether a path below the root, or its last name, fits one of the patterns of `exclude`."""
    name = path.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)


def _real_path(entry: "os.DirEntry[bytes]", real: tuple[bytes, ...]) -> bytes:
    """Where an entry really is; refuses links that leave the root or lead back to a folder they lie in."""
    if not entry.is_symlink():
        return os.path.join(real[-1], entry.name)
    target = os.path.realpath(entry.path)
    link = os.fsdecode(entry.path)
    if os.path.commonpath((real[0], target)) != real[0]:
        raise DatasetError(f"link {link} leaves the dataset's folder; copy the files, or set root= above both")
    if target in real:
        raise DatasetError(f"link {link} leads back to a folder it lies in; remove it")
    return target
