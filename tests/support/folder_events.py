"""What happens in folders, as the kernel tells it at once (inotify): nobody has to look again and again."""

import ctypes
import os
import struct
from pathlib import Path

_EVENTS = {0x100: "created", 0x80: "renamed", 0x200: "deleted"}  # IN_CREATE, IN_MOVED_TO, IN_DELETE
_HEADER = struct.Struct("iIII")  # watch, mask, cookie, bytes of the name


class FolderEvents:
    """Tells which files are created, renamed (the new name) and deleted in folders, which exist.

    `descriptor` can be read when there is something to tell.
    """

    def __init__(self, *folders: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for folder in folders:
            if libc.inotify_add_watch(self.descriptor, os.fsencode(folder), sum(_EVENTS)) < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))

    def read(self) -> list[tuple[str, str]]:
        """Return what has happened since the last call: (created, renamed or deleted; name of the file)."""
        try:
            data = os.read(self.descriptor, 1 << 16)
        except BlockingIOError:
            return []
        found, offset = [], 0
        while offset < len(data):
            _, mask, _, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size + length
            name = data[offset - length : offset].rstrip(b"\0")
            found += [(kind, os.fsdecode(name)) for bit, kind in _EVENTS.items() if mask & bit]
        return found

    def close(self) -> None:
        """Stop watching."""
        os.close(self.descriptor)
