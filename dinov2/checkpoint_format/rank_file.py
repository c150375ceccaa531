"""Writing a rank file: a dict of tensors and plain values as `torch.save` writes it, summed up while it is written."""

import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dinov2.checkpoint_format.disk import copy_file, flush_folder
from dinov2.checkpoint_format.manifest import BLOCK_BYTES, FileRecord
from dinov2.checkpoint_format.names import rank_file_name, temporary

_PLAIN_TYPES = (type(None), bool, int, float, str, bytes)


def to_plain(value: Any, where: str = "") -> Any:
    """Copy nested data into what a rank file may hold: tensors on the CPU that own their memory, plain containers.

    Raises:
        TypeError: a value of another type, which could not be read back.
    """
    if isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        owns_memory = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if owns_memory else tensor.clone()
    if isinstance(value, Mapping):
        return {key: to_plain(item, f"{where}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_plain(item, f"{where}/{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if type(value) not in _PLAIN_TYPES:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and lists")
    return value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield tensors and plain values of nested data with their paths, as in `model/teacher.cls_token`.

    An empty container is a value.
    """
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}/{index}")
    else:
        yield path, value


def write_rank_file(folder: Path, *, name: str, rank: int, data: Mapping[str, Any]) -> FileRecord:
    """Write one rank's data under its temporary name and wait until it is on the disk.

    Args:
        folder: must exist.
        name: of the checkpoint.
        rank: whose file it is.
        data: as `to_plain` returns it.

    Returns:
        Its size, and the checksums of what was handed to the file system.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    path = temporary(folder / rank_file_name(name, rank))
    try:
        with open(path, "wb") as file:
            summed = _SummedFile(file)
            torch.save(data, summed)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the system's error in a RuntimeError
        with contextlib.suppress(OSError):
            path.unlink()
        cause = error if isinstance(error, OSError) else error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from None
    return summed.record()


def copy_rank_file(folder: Path, target: Path, *, name: str, rank: int) -> None:
    """Copy a rank file into another folder under its temporary name.

    Raises:
        OSError: it could not be copied; nothing is left behind.
    """
    path = temporary(target / rank_file_name(name, rank))
    try:
        copy_file(folder / rank_file_name(name, rank), path)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def publish_rank_file(folder: Path, *, name: str, rank: int) -> None:
    """Give a written rank file its final name, and wait until it has it on the disk."""
    path = folder / rank_file_name(name, rank)
    os.replace(temporary(path), path)
    flush_folder(folder)


def discard_rank_file(folder: Path, *, name: str, rank: int, published: bool = True) -> None:
    """Remove a rank file of a checkpoint that is not going to be complete.

    Args:
        folder: of the checkpoint.
        name: of the checkpoint.
        rank: whose file it is.
        published: remove it under its final name, too; False leaves an earlier checkpoint of this name alone.
    """
    path = folder / rank_file_name(name, rank)
    for written in (path, temporary(path)) if published else (temporary(path),):
        with contextlib.suppress(OSError):  # the write has already failed, which is what the user must hear
            written.unlink()


class _SummedFile:
    """A file that takes the checksum of each of its blocks as they are written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = 0
        self._checksums: list[int] = []

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._file.write(view)
        start = 0
        while start < len(view):
            used = self._size % BLOCK_BYTES
            part = view[start : start + BLOCK_BYTES - used]
            if not used:
                self._checksums.append(0)
            self._checksums[-1] = zlib.crc32(part, self._checksums[-1])
            self._size += len(part)
            start += len(part)
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def record(self) -> FileRecord:
        return FileRecord(size_bytes=self._size, crc32=tuple(self._checksums))
