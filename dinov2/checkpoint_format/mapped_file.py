"""Reading a rank file without loading it: what it holds, where its tensors lie, and verified bytes of them.

The file is mapped into memory, so only what is asked for is read. Its structure is verified before it is unpickled.
"""

import dataclasses
import functools
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoint_format.manifest import DamagedCheckpointError, Manifest
from dinov2.checkpoint_format.names import rank_file_name
from dinov2.checkpoint_format.rank_file import leaves

OTHER_VALUES = "(other values)"  # version 1: name under which all that is not a tensor is checksummed

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_DATA_DESCRIPTORS = (0, 16, 24)  # bytes that may follow a record's data


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    path: str  # of keys, as in model/teacher.backbone.cls_token
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # first byte

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class RankIndex:
    """What one rank file holds, with a `TensorEntry` for every tensor; small, and can be sent to other processes."""

    rank: int
    values: dict[str, Any]


class MappedFile:
    """A rank file mapped into memory; its bytes are verified block by block, each block once."""

    def __init__(self, folder: Path, manifest: Manifest, rank: int) -> None:
        """Map the file; nothing is read yet.

        Raises:
            DamagedCheckpointError: the file is missing or has another size than the manifest says.
        """
        self.manifest = manifest
        self.name = rank_file_name(manifest.name, rank)
        self.path = folder / self.name
        self._record = manifest.files[self.name]
        self._require_size()
        size = self._record.size_bytes
        try:
            self.bytes = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)  # [size]
        except RuntimeError as error:  # no permission, or removed by now
            raise DamagedCheckpointError(f"{self.name} cannot be read: {str(error).splitlines()[0]}") from error
        self._memory = memoryview(self.bytes.numpy())
        self._verified: set[int | str] = set()  # numbers of blocks; version 1: paths of tensors

    def _require_size(self) -> None:
        try:
            size = os.stat(self.path).st_size
        except OSError as error:
            raise DamagedCheckpointError(f"{self.name} cannot be read: {error.strerror}") from error
        if size != self._record.size_bytes or not size:
            raise DamagedCheckpointError(f"{self.name} has {size} bytes but {self._record.size_bytes} were written")

    def verify(self, start: int, end: int) -> None:
        """Compare the blocks that hold these bytes with their checksums.

        Raises:
            DamagedCheckpointError: one differs.
        """
        block = self.manifest.block_bytes
        for number in range(start // block, -(-end // block)):
            if number not in self._verified:
                if zlib.crc32(self._memory[number * block : (number + 1) * block]) != self._record.crc32[number]:
                    raise DamagedCheckpointError(self._describe(number))
                self._verified.add(number)

    def tensor(self, entry: TensorEntry, *, first_row: int = 0, num_rows: int | None = None) -> Tensor:
        """Return rows of a tensor, verified; a view of the file, not to be changed.

        Raises:
            DamagedCheckpointError: the bytes are not those that were written.
        """
        shape = list(entry.shape)
        row_bytes = entry.num_bytes // shape[0] if shape and shape[0] else entry.num_bytes
        if shape and num_rows is not None:
            shape[0] = num_rows
        start = entry.start + first_row * row_bytes
        end = start + math.prod(shape) * entry.dtype.itemsize
        if end == start:
            return torch.empty(shape, dtype=entry.dtype)
        if self.manifest.format_version == 1:
            self._verify_whole(entry)
        else:
            self.verify(start, end)
        return self.bytes[start:end].view(entry.dtype).view(shape)

    def verify_all(self) -> None:
        """Compare every byte of the file with the manifest; raises DamagedCheckpointError."""
        if self.manifest.format_version > 1:
            self.verify(0, self._record.size_bytes)
        index = self.read_index()
        for _, entry in leaves(index.values):
            if isinstance(entry, TensorEntry):
                self.tensor(entry)

    def read_index(self) -> RankIndex:
        """Find out what the file holds; tensors are not read.

        Raises:
            DamagedCheckpointError: the file is damaged, or is not what its name says.
        """
        try:
            records = self._data_records()
            data = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except DamagedCheckpointError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedCheckpointError(f"{self.name} cannot be read: {reason}") from error
        if not isinstance(data, dict):
            raise DamagedCheckpointError(f"{self.name} holds no dict")
        base = self._base_address(data, records)
        if self.manifest.format_version == 1:
            self._compare_parts(data)
        rank = int(self.name.removeprefix(f"{self.manifest.name}.rank_").removesuffix(".pth"))
        return RankIndex(rank=rank, values=_with_entries(data, base, self.name))

    def _data_records(self) -> list[tuple[int, int]]:
        """Verify all that is not tensors and return where the tensors' records lie: first byte and length, in order."""
        with zipfile.ZipFile(self.path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            directory = archive.start_dir
        is_summed = self.manifest.format_version > 1
        if is_summed:
            self.verify(directory, self._record.size_bytes)
        records = []
        for info, end in zip(infos, [*(info.header_offset for info in infos[1:]), directory], strict=True):
            if info.compress_type != zipfile.ZIP_STORED:
                raise DamagedCheckpointError(f"{self.name} holds compressed records")
            header = self._memory[info.header_offset : info.header_offset + 30]
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            start = info.header_offset + 30 + name_length + extra_length
            # A header that says another length would move the tensor.
            if signature != b"PK\x03\x04" or end - start - info.file_size not in _DATA_DESCRIPTORS:
                raise DamagedCheckpointError(f"{self.name}: the header of {info.filename} is damaged")
            if "/data/" in info.filename:
                if info.file_size:
                    records.append((start, info.file_size))
            elif is_summed:
                self.verify(info.header_offset, end)
        return records

    def _base_address(self, data: Mapping[str, Any], records: list[tuple[int, int]]) -> int:
        """Return the address at which PyTorch has mapped the file, from where its tensors' records lie in it."""
        storages = {}
        for _, value in leaves(data):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes():
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        found = sorted(storages.items())
        bases = {address - start for (address, _), (start, _) in zip(found, records, strict=False)}
        if [size for _, size in found] != [size for _, size in records] or len(bases) > 1:
            raise DamagedCheckpointError(f"{self.name}: its tensors are not where its records are")
        return bases.pop() if bases else 0

    def _verify_whole(self, entry: TensorEntry) -> None:
        """Version 1: compare a whole tensor with its checksum."""
        if entry.path in self._verified:
            return
        kind = f"{entry.dtype}{list(entry.shape)}".encode()
        checksum = zlib.crc32(self._memory[entry.start : entry.start + entry.num_bytes], zlib.crc32(kind))
        if checksum != self._record.crc32.get(entry.path):
            raise DamagedCheckpointError(f"{self.name}: {entry.path} does not match its checksum")
        self._verified.add(entry.path)

    def _compare_parts(self, data: Mapping[str, Any]) -> None:
        """Version 1: compare the values that are no tensors with their checksum, and the names of the tensors."""
        checksum, expected = 0, set(self._record.crc32) - {OTHER_VALUES}
        for path, value in leaves(data):
            if isinstance(value, Tensor):
                expected ^= {path}
            else:
                checksum = zlib.crc32(f"{path}={value!r}\n".encode(), checksum)
        wrong = sorted(expected) or [OTHER_VALUES] * (checksum != self._record.crc32.get(OTHER_VALUES))
        if wrong:
            raise DamagedCheckpointError(f"{self.name}: {wrong[0]} does not match its checksum")

    def _describe(self, number: int) -> str:
        """Say what is wrong with a block."""
        block = self.manifest.block_bytes
        checksum = zlib.crc32(self._memory[number * block : (number + 1) * block])
        for other, record in self.manifest.files.items():
            if other != self.name and number < len(record.crc32) and record.crc32[number] == checksum:
                return f"{self.name} holds what was written as {other}"
        last = min((number + 1) * block, self._record.size_bytes)
        return f"{self.name}: bytes {number * block} to {last - 1} do not match their checksum"


def _with_entries(data: Mapping[str, Any], base: int, file: str) -> dict[str, Any]:
    """Copy nested data with tensors replaced by their places."""
    return {str(key): _with_entry(value, str(key), base=base, file=file) for key, value in data.items()}


def _with_entry(value: Any, path: str, *, base: int, file: str) -> Any:
    inner = functools.partial(_with_entry, base=base, file=file)
    if isinstance(value, Mapping):
        return {key: inner(item, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(inner(item, f"{path}/{index}") for index, item in enumerate(value))
    if not isinstance(value, Tensor):
        return value
    if not value.is_contiguous() or value.layout != torch.strided:
        raise DamagedCheckpointError(f"{file}: {path} is no plain tensor")
    start = value.data_ptr() - base if value.numel() else 0
    return TensorEntry(path, value.dtype, tuple(value.shape), start)
