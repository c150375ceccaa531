"""Write a file of `torch.save` or of safetensors one tensor after another, so that no more than one is in memory."""

import json
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dinov2.hub.stored_tensor import State, StoredTensor

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_ALIGNMENT_BYTES = 8
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a record in a zip file: signature, lengths of its name and extra field
_DIRECTORY_ENTRY = struct.Struct("<4s12xI8xHHH12x")  # signature, CRC32, lengths of name, extra field and comment
_DATA_DESCRIPTOR = b"PK\x07\x08"  # followed by the CRC32 of the record before it


def stream_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write what `torch.save(content)` writes.

    `torch.save` leaves the tensors' bytes out, which are then filled in together with their checksums.

    Args:
        path: of the file; one that is there is written over.
        content: nested dicts and lists of plain values, tensors and stored tensors, which are read one after another.

    Raises:
        OSError, RuntimeError: the file cannot be written.
    """
    tensors: list[StoredTensor] = []
    empty = _without_values(content, tensors)
    with path.open("w+b") as file:  # with a name alone, PyTorch would not pass on the system's error
        with torch.serialization.skip_data():
            torch.save(empty, file)
        del empty
        with zipfile.ZipFile(file) as archive:
            records = [info for info in archive.infolist() if "/data/" in info.filename]
            directory, num_entries = archive.start_dir, len(archive.infolist())
        checksums = {}
        for record, tensor in zip(records, tensors, strict=True):
            checksums[record.filename.encode()] = _fill(file, record, tensor)
        file.seek(directory)
        for _ in range(num_entries):
            _sum_up(file, checksums)


def stream_safetensors(path: Path, state: State, *, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; larger number formats come first, so that all tensors are aligned.

    Raises:
        OSError: the file cannot be written.
        ValueError: the format has no place for a type of number.
    """
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    ordered = dict(sorted(state.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered.items():
        if tensor.dtype not in names:
            raise ValueError(f"{name} has the type {tensor.dtype}, which safetensors does not have")
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered.values():
            file.write(_bytes(tensor.read()))


def _without_values(value: Any, tensors: list[StoredTensor]) -> Any:
    """Copy nested data with empty tensors, and collect the stored ones in the order in which they are pickled."""
    if isinstance(value, Tensor):
        value = StoredTensor.of(value)
    if isinstance(value, StoredTensor):
        tensors.append(value)
        return torch.empty(value.shape, dtype=value.dtype)  # memory that is never touched is never taken
    if isinstance(value, Mapping):
        return {key: _without_values(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_values(item, tensors) for item in value)
    return value


def _fill(file: BinaryIO, record: zipfile.ZipInfo, tensor: StoredTensor) -> int:
    """Write a tensor into its record; returns its checksum."""
    file.seek(record.header_offset)
    _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    file.seek(name_length + extra_length, 1)
    content = _bytes(tensor.read())
    assert len(content) == record.file_size, f"{record.filename} has {record.file_size} bytes, not {len(content)}"
    file.write(content)
    checksum = zlib.crc32(content)
    position = file.tell()
    if file.read(len(_DATA_DESCRIPTOR)) == _DATA_DESCRIPTOR:
        file.seek(position + len(_DATA_DESCRIPTOR))
        file.write(struct.pack("<I", checksum))
    return checksum


def _sum_up(file: BinaryIO, checksums: Mapping[bytes, int]) -> None:
    """Write the checksum of a record into the zip file's directory, and go to the next entry."""
    position = file.tell()
    entry = file.read(_DIRECTORY_ENTRY.size)
    _, _, *lengths = _DIRECTORY_ENTRY.unpack(entry)
    if (name := file.read(lengths[0])) in checksums:
        file.seek(position + 16)
        file.write(struct.pack("<I", checksums[name]))
    file.seek(position + _DIRECTORY_ENTRY.size + sum(lengths))


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
