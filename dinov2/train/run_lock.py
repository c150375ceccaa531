"""One run at a time in an output folder: a lock that rank 0 holds until the program ends, however it ends.

`fcntl.lockf` locks belong to the process: loader workers do not inherit them, and the kernel frees them with their
owner, also after a kill -9. They are lost as soon as the owner closes any descriptor of the file: it is opened once.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from dinov2.distributed import is_main_process, on_main_first
from dinov2.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
_FLOCK = "hhqqi"  # struct flock of Linux: type, whence, start, length, process


@dataclass(frozen=True, kw_only=True)
class LockOwner:
    """The program that has entered the lock of a folder and, unless it still holds it, has not left it: it was killed.

    A lock may not be seen from another machine, where the file system does not share locks.
    """

    holds: bool
    pid: int | None  # None: not known
    host: str | None
    started: str | None  # UTC


class RunLock:
    """While entered, by all ranks together, no other program can enter the lock of this folder.

    The file stays behind, empty: removing it would let two programs lock two files of the same name. Its content while
    it is locked says who holds it.

    Args:
        folder: exists.
        setting: key and value that name the folder in the sentence, such as train.output_dir=outputs/run1.

    Raises:
        ConfigError: on entering: another program holds the lock, or the file cannot be written.
    """

    def __init__(self, folder: Path, *, setting: str) -> None:
        self._path = folder / LOCK_NAME
        self._setting = setting
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        on_main_first(self._acquire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_main_process() and self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def _acquire(self) -> None:
        try:
            file = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self._setting} cannot be written ({error.strerror}); choose another folder") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD_BY_ANOTHER:
                logger.warning("%s cannot be locked (%s): start no second run in it", self._setting, error.strerror)
                file.close()
                return
            file.seek(0)
            owner = _describe(file.read())
            file.close()
            raise ConfigError(
                f"{self._setting} is in use by another run ({owner}); wait for its end, or choose another folder"
            ) from None
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": now}, file)
        file.flush()
        self._file = file


def look_at_lock(folder: Path) -> LockOwner | None:
    """Say who is in the lock of a folder, without taking it; None: nobody, or the file cannot be read.

    Not for the program that holds it: closing the file would free the lock.
    """
    try:
        with (folder / LOCK_NAME).open(encoding="utf-8", errors="replace") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            text = file.read()
    except OSError:
        return None
    owner = _read_owner(text)
    if kind == fcntl.F_UNLCK and owner is None:
        return None
    known = owner or {"pid": None, "host": None, "started": None}
    return LockOwner(holds=kind != fcntl.F_UNLCK, **known)


def _read_owner(text: str) -> dict[str, Any] | None:
    """Return what the owner wrote; None where it has left the lock, or is about to write."""
    try:
        owner = json.loads(text)
        return {key: owner[key] for key in ("pid", "host", "started")}
    except (ValueError, TypeError, KeyError):
        return None


def _describe(text: str) -> str:
    """Say who holds the lock."""
    owner = _read_owner(text)
    if owner is None:
        return "just started"
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"
