"""Files that appear whole or not at all, and are on the disk when a function returns."""

import os
import shutil
from pathlib import Path

from dinov2.checkpoint_format.names import temporary


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it appears whole or not at all."""
    unfinished = temporary(path)
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and wait until the copy is on the disk."""
    with open(source, "rb") as original, open(target, "wb") as copy:
        shutil.copyfileobj(original, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until renames and deletions in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
