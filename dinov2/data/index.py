"""Indexes of many files: columns in one file that is memory-mapped, so that a million names cost a process nothing.

Layout of an index file: 8 bytes `DV2INDEX`, the length of the header in 8 bytes (little-endian), the header as JSON,
then the columns, each at a multiple of 64 bytes. The header holds the columns' kinds, lengths and places, a digest of
their content, and attributes. A column of strings is two arrays: all bytes end to end, and where each string ends.
"""

import contextlib
import fcntl
import json
import logging
import mmap
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from dinov2.errors import DatasetError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAGIC = b"DV2INDEX"
_ALIGNMENT = 64  # bytes
_MAX_HEADER = 1 << 28  # bytes
_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float32", "float64", "bool")
_CHUNK = 4096  # strings copied at a time when all are gone through
_LINE_PERIOD_S = 30


class Strings(Sequence[bytes]):
    """Many byte strings in two arrays.

    Args:
        letters: their bytes end to end, uint8.
        ends: where each ends, int64.
    """

    def __init__(self, letters: np.ndarray, ends: np.ndarray) -> None:
        self.letters = letters
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[bytes]) -> "Strings":
        """Copy strings, one after the other."""
        letters, ends = bytearray(), array("q")
        for string in strings:
            letters += string
            ends.append(len(letters))
        return cls(np.frombuffer(letters, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self.ends):
            raise IndexError(f"index {index} of a dataset of {len(self.ends)} images")
        start = self.ends[index - 1] if index else 0
        return self.letters[start : self.ends[index]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for first in range(0, len(self.ends), _CHUNK):
            start = int(self.ends[first - 1]) if first else 0
            ends = (self.ends[first : first + _CHUNK] - start).tolist()
            letters = self.letters[start : start + ends[-1]].tobytes()
            yield from (letters[begin:end] for begin, end in zip([0, *ends], ends, strict=False))


Column = np.ndarray | Strings


class Index:
    """Columns about files, each of a length of its own, in memory or memory-mapped.

    A mapped index is handed to another process as the name of its file, so that all share its pages.

    Args:
        columns: by name.
        attributes: anything that JSON can hold.
        path: file that the columns are mapped from, if they are.
    """

    def __init__(
        self, columns: Mapping[str, Column], attributes: Mapping[str, Any] | None = None, *, path: str | None = None
    ) -> None:
        self.columns = dict(columns)
        self.attributes = dict(attributes or {})
        self.path = path
        self._digest: str | None = None

    def __getitem__(self, name: str) -> Any:
        """Column of that name, an array or `Strings`."""
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            return Index, (self.columns, self.attributes)
        return _reopen, (self.path, self.digest)

    @property
    def digest(self) -> str:
        """Hash of the columns, the same wherever they were found to be the same."""
        if self._digest is None:
            state = blake2b(digest_size=16)
            for name, kind, data in _arrays(self.columns):
                state.update(f"{name} {kind} {data.dtype} {len(data)} ".encode())
                state.update(np.ascontiguousarray(data).data)
            self._digest = state.hexdigest()
        return self._digest

    def save(self, path: Path) -> None:
        """Write a file; it appears whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        entries, place = [], 0
        arrays = list(_arrays(self.columns))
        for name, kind, data in arrays:
            entry = {"name": name, "kind": kind, "dtype": data.dtype.name, "length": len(data), "place": place}
            entries.append(entry)
            place += -(-data.nbytes // _ALIGNMENT) * _ALIGNMENT
        header = json.dumps({"columns": entries, "digest": self.digest, "attributes": self.attributes}).encode()
        header += b" " * (-(len(_MAGIC) + 8 + len(header)) % _ALIGNMENT)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
                for _, _, data in arrays:
                    file.write(np.ascontiguousarray(data).data)
                    file.write(bytes(-data.nbytes % _ALIGNMENT))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Map a file.

        Raises:
            OSError: it cannot be opened.
            ValueError: it is no index, or a part of one.
        """
        with open(path, "rb") as file:
            start, header = _read_header(file.read(len(_MAGIC) + 8), file.read, os.fstat(file.fileno()).st_size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        columns: dict[str, Column] = {}
        for name, parts in _grouped(header["columns"]).items():
            arrays = {kind: _view(mapped, start, entry) for kind, entry in parts.items()}
            columns[name] = arrays["array"] if "array" in arrays else Strings(arrays["letters"], arrays["ends"])
        index = cls(columns, header["attributes"], path=str(path))
        index._digest = header["digest"]
        return index


def stored_index(
    cache_dir: str | None,
    *,
    name: str,
    key: Any,
    build: Callable[[], Index],
    is_current: Callable[[Index], bool] = lambda index: True,
) -> Index:
    """Take an index from the cache folder, or make it and keep it there.

    Several processes may ask at once: one makes it, the others wait for it. Where it cannot be kept, for a full or
    read-only disk, a warning says so and it stays in the memory of each process.

    Args:
        cache_dir: folder, made if needed; None: the index stays in memory.
        name: start of the file's name, of letters, digits and `_`.
        key: all that the index depends on and that `is_current` does not check, as JSON can hold it.
        build: makes it.
        is_current: whether one that was kept is still true.

    Returns:
        The index, mapped if it could be kept.
    """
    if cache_dir is None:
        return build()
    folder = Path(cache_dir).expanduser() / "index"
    stem = f"{name}-{blake2b(json.dumps(key).encode(), digest_size=8).hexdigest()}"
    found = _find(folder, stem, is_current)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder / f"{stem}.lock"))
        except OSError as error:
            _warn_unkept(folder, error.strerror)
            return build()
        found = _find(folder, stem, is_current)
        if found is not None:
            return found
        index = build()
        try:
            for leftover in folder.glob(f".{stem}-*.tmp"):
                leftover.unlink()
            path = folder / f"{stem}-{index.digest}.index"
            index.save(path)
            return Index.open(path)
        except OSError as error:
            _warn_unkept(folder, error.strerror)
            return index


def counted(items: Iterable[T], *, description: str, unit: str = "files") -> Iterator[T]:
    """Yield the items and show how many there were: a bar on a terminal, elsewhere a log line each half minute."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=description, unit=f" {unit}", dynamic_ncols=True, file=sys.stderr, leave=False)
        return
    started_s = shown_s = time.monotonic()
    count = 0
    for item in items:
        yield item
        count += 1
        if count % _CHUNK == 0 and time.monotonic() - shown_s > _LINE_PERIOD_S:
            shown_s = time.monotonic()
            logger.info("%s: %s=%d after_s=%.0f", description, unit, count, shown_s - started_s)


def _arrays(columns: Mapping[str, Column]) -> Iterator[tuple[str, str, np.ndarray]]:
    """All arrays that make up columns, with the columns' names and what part they are."""
    for name, column in columns.items():
        if isinstance(column, Strings):
            yield name, "letters", column.letters
            yield name, "ends", column.ends
        else:
            yield name, "array", column


def _grouped(entries: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Header entries by column and part."""
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        grouped.setdefault(entry["name"], {})[entry["kind"]] = entry
    return grouped


def _read_header(head: bytes, read: Callable[[int], bytes], size: int) -> tuple[int, dict[str, Any]]:
    """Where the columns start, and the header, of a file whose size holds all its columns."""
    length = int.from_bytes(head[len(_MAGIC) :], "little")
    start = len(head) + length
    if not head.startswith(_MAGIC) or length > min(_MAX_HEADER, size):
        raise ValueError("no index file")
    header = json.loads(read(length))
    for entry in header["columns"]:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"a column of type {entry['dtype']}")
        end = start + entry["place"] + entry["length"] * np.dtype(entry["dtype"]).itemsize
        if entry["place"] < 0 or entry["length"] < 0 or end > size:
            raise ValueError("cut off")
    return start, header


def _view(mapped: mmap.mmap, start: int, entry: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(mapped, dtype=entry["dtype"], count=entry["length"], offset=start + entry["place"])


def _reopen(path: str, digest: str) -> Index:
    """Map an index again, in another process."""
    try:
        index = Index.open(Path(path))
    except (OSError, ValueError) as error:
        raise DatasetError(f"index {path} cannot be read any more: {error}; start the program again") from error
    if index.digest != digest:
        raise DatasetError(f"index {path} was replaced while it was in use; start the program again")
    return index


def _find(folder: Path, stem: str, is_current: Callable[[Index], bool]) -> Index | None:
    """Newest usable index of a key."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.name.startswith(f"{stem}-")]
    except OSError:
        return None
    for name in sorted(names):
        if name.endswith(".index"):
            # an unreadable or damaged file is made again
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                index = Index.open(folder / name)
                if is_current(index):
                    return index
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes; on a file system without locks, none: then some make the same index at once."""
    with open(path, "ab") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that makes an index in %s", path.parent)
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


@cache  # so that it is said once
def _warn_unkept(folder: Path, reason: str | None) -> None:
    logger.warning(
        "an index of the files cannot be kept in %s (%s); each process holds its own in memory and makes it anew at "
        "each start; set data.cache_dir to a folder with space",
        folder,
        reason or "unknown error",
    )
