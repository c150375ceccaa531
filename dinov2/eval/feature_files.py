"""Files that features are kept in: a finished pair of files, and the blocks it grows from.

    NAME.safetensors     values [n, D]; targets, places and, if known, groups [n] int64
    NAME.json            index: what the values are, columns of the images, digests, size and CRC-32 of the other file
    NAME.partial/        block_000007.bin ...: safetensors of some rows with a CRC-32 behind, until all are there

The index is written last and by rename; without it, or where size or checksum differ, there are no features. Equal
features make equal files, byte for byte.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.feature_set import FeatureSet

FORMAT_VERSION = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_CHUNK = 1 << 24  # bytes read at a time
_CRC_BYTES = 4


def index_path(path: Path) -> Path:
    """Name the index beside a file of values."""
    return path.with_suffix(".json")


def write_feature_set(path: Path, features: FeatureSet, *, parts: Mapping[str, str], values: Iterable[Tensor]) -> None:
    """Write both files, the index last; files that are there are replaced.

    Args:
        path: `NAME.safetensors`; its folder exists.
        features: all but the values, whose shape and type alone are used.
        parts: digests of what the features depend on.
        values: the rows, in several tensors one after the other.

    Raises:
        ConfigError: they cannot be written.
    """
    arrays = {"places": features.places, "targets": features.targets}
    if features.groups is not None:
        arrays["groups"] = features.groups
    numbers = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in sorted(arrays.items())}
    header = _header({**numbers, "values": features.values}, dataset=features.name, pool=features.pool)

    def write(file: BinaryIO) -> tuple[int, int]:
        crc = size = 0
        for part in (header, *map(_bytes, numbers.values()), *map(_bytes, values)):
            file.write(part)
            crc, size = zlib.crc32(part, crc), size + len(part)
        return size, crc

    index_path(path).unlink(missing_ok=True)
    size_bytes, crc32 = _replace(path, write)
    index = {
        "format_version": FORMAT_VERSION,
        "dataset": features.name,
        "pool": features.pool,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == features.values.dtype),
        "shape": list(features.values.shape),
        "weights": features.weights,
        "checkpoint_key": features.checkpoint_key,
        "digest": features.digest,
        "digests": dict(parts),
        "file": {"name": path.name, "size_bytes": size_bytes, "crc32": crc32},
        "class_names": list(features.class_names),
        "columns": {name: _column_to_json(column) for name, column in features.columns.items()},
        "targets": features.targets.tolist(),
    }
    text = json.dumps(index | {"crc32_of_the_rest": _checksum(index)}, allow_nan=False).encode()
    _replace(index_path(path), lambda file: file.write(text))


def why_unusable(path: Path) -> str | None:
    """Read both files through and compare sizes and checksum; None if they are sound, else what is wrong."""
    try:
        index = read_index(path)
        if path.stat().st_size != index["file"]["size_bytes"]:
            return f"it has {path.stat().st_size} bytes instead of {index['file']['size_bytes']}"
        crc = 0
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                crc = zlib.crc32(chunk, crc)
        if crc != index["file"]["crc32"] or index.pop("crc32_of_the_rest") != _checksum(index):
            return "its checksum is wrong"
    except OSError as error:
        return error.strerror or "it cannot be read"
    except (ValueError, KeyError, TypeError) as error:
        return f"its index cannot be read ({type(error).__name__})"
    return None


def read_index(path: Path) -> dict[str, Any]:
    """Read the index beside a file of values.

    Raises:
        OSError: there is none.
        ValueError: it is damaged, or of another version.
    """
    index = json.loads(index_path(path).read_text(encoding="utf-8"))
    if not isinstance(index, dict) or index.get("format_version") != FORMAT_VERSION:
        raise ValueError("another version")
    return index


def open_feature_set(path: str | Path) -> FeatureSet:
    """Open features that were kept; the values are a map of the file, read when they are used.

    Args:
        path: `NAME.safetensors`, with `NAME.json` beside it.

    Raises:
        DatasetError: the files are missing or damaged (the checksum is not looked at).
    """
    path = Path(path).expanduser()
    try:
        index = read_index(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        if list(tensors["values"].shape) != index["shape"]:
            raise ValueError("shape")
        return FeatureSet(
            name=index["dataset"],
            values=tensors["values"],
            targets=tensors["targets"].numpy(),
            places=tensors["places"].numpy(),
            groups=tensors["groups"].numpy() if "groups" in tensors else None,
            class_names=tuple(index["class_names"]),
            columns={name: _column_from_json(column) for name, column in index["columns"].items()},
            pool=index["pool"],
            weights=index["weights"],
            checkpoint_key=index["checkpoint_key"],
            digest=index["digest"],
        )
    except OSError as error:
        raise DatasetError(f"{path}: no features can be read there ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DatasetError(f"{path}: these features, or their index, are damaged; compute them again") from error


def write_block(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep some rows, whole or not at all.

    Raises:
        ConfigError: they cannot be written.
    """
    content = save(dict(tensors))
    _replace(path, lambda file: file.write(content + zlib.crc32(content).to_bytes(_CRC_BYTES, "little")))


def read_block(path: Path) -> dict[str, Tensor] | None:
    """Read rows that were kept; None if they are not there or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    content, crc = content[:-_CRC_BYTES], content[-_CRC_BYTES:]
    return load(content) if zlib.crc32(content).to_bytes(_CRC_BYTES, "little") == crc else None


def _checksum(index: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(index, allow_nan=False).encode())


def _header(tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    """Make the start of a safetensors file: length, then names, types, shapes and places as JSON."""
    texts = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in metadata.items()}
    entries: dict[str, Any] = {"__metadata__": texts}  # file names that are no UTF-8 would make it unreadable
    place = 0
    for name, tensor in tensors.items():
        end = place + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> Any:
    """Write a file under another name and wait until it is on the disk, then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return result
    except OSError as error:
        raise ConfigError(
            f"{path}: features cannot be written ({error.strerror}); free some space or choose another --features-dir"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _column_to_json(column: np.ndarray) -> dict[str, Any]:
    """A column as JSON has it: NaN and infinity, which it has not, as text."""
    if column.dtype.kind not in "biuf":
        return {"dtype": "str", "values": column.astype(str).tolist()}
    values = column.tolist()
    if column.dtype.kind == "f":
        values = [value if math.isfinite(value) else str(value) for value in values]
    return {"dtype": column.dtype.name, "values": values}


def _column_from_json(column: Mapping[str, Any]) -> np.ndarray:
    if column["dtype"] == "str":
        return np.array(column["values"], dtype=str)
    kind = np.dtype(column["dtype"])
    return np.array([float(value) for value in column["values"]] if kind.kind == "f" else column["values"], dtype=kind)
