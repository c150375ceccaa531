"""Read the `.metadata` of a checkpoint folder of torch.distributed.checkpoint: a pickle that others have written.

A pickle names classes and functions that its reader is to import and call. Here every name that such a file needs
gives a stand-in, which holds values and does nothing, and every other name is refused: no code of the file runs.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinov2.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_MAX_AXES = 16


@dataclass(frozen=True, kw_only=True)
class Part:
    """A box of a tensor, and where its `torch.save` stands."""

    first: tuple[int, ...]  # index of its first element, one number an axis
    shape: tuple[int, ...]
    file: str  # in the same folder, not verified
    offset: int  # bytes
    length: int  # bytes
    is_plain: bool  # not compressed or the like


@dataclass(frozen=True)
class Parts:
    """A tensor and its parts; whether they make it whole is not verified."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]


def read_metadata(path: Path) -> tuple[dict[str, Parts], list[str]]:
    """Read which tensors a checkpoint holds.

    Args:
        path: the `.metadata` file.

    Returns:
        Tensors by name, and the names of all else.

    Raises:
        CheckpointError: the file is damaged, or refers to something that a checkpoint of tensors does not need.
    """
    content = path.read_bytes()
    try:
        metadata = _Unpickler(io.BytesIO(content), path).load()
        entries = _expect(metadata, _Metadata)
        places = _places(entries["storage_data"])
        tensors = {
            name: _parts(_expect(entry, _Tensor), [places[name, _first(chunk)] for chunk in entry.state["chunks"]])
            for name, entry in _mapping(entries["state_dict_metadata"]).items()
            if not isinstance(entry, _Bytes)
        }
        others = [name for name, entry in entries["state_dict_metadata"].items() if isinstance(entry, _Bytes)]
    except (pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no sound list of tensors; copy the checkpoint's folder again") from error
    return tensors, others


class _Record:
    """Stands for an object of torch's: keeps the state that it was saved with."""

    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.state = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Metadata(_Record):
    """Of a whole checkpoint."""


class _Tensor(_Record):
    """TensorStorageMetadata."""


class _Bytes(_Record):
    """BytesStorageMetadata: of a value that is no tensor."""


class _Chunk(_Record):
    """Of one part: where it is in its tensor."""


class _Index(_Record):
    """MetadataIndex: which part of which tensor."""


class _Place(_Record):
    """_StorageInfo: where a part is on disk."""


class _Properties(_Record):
    """Of a tensor, its dtype first."""


class _Size(_Record):
    """torch.Size, and whether it is one is checked when it is used."""


_STAND_INS: Mapping[tuple[str, str], type] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Bytes,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _Record,
    (_METADATA, "StorageMeta"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Record,
    **{
        (module, name): _Record  # folder that the checkpoint was saved to
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath")
    },
}


class _Unpickler(pickle._Unpickler):
    """Builds stand-ins alone. The one in Python, because that in C takes memory for any number that a file names."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise CheckpointError(
            f"{self.path}: refers to {module}.{name}, which no checkpoint of tensors needs; it is refused because "
            "reading it can run code"
        )


def _expect(value: Any, kind: type[_Record]) -> Mapping[str, Any]:
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} expected")
    return _mapping(value.state)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError("names expected")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    """Read a torch.Size."""
    if not isinstance(value, _Size):
        raise TypeError("size expected")
    (numbers,) = value.state
    if not isinstance(numbers, tuple | list) or len(numbers) > _MAX_AXES:
        raise ValueError("size expected")
    return tuple(_number(number) for number in numbers)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("number expected")
    return value


def _first(chunk: Any) -> tuple[int, ...]:
    return _numbers(_expect(chunk, _Chunk)["offsets"])


def _places(storage: Any) -> dict[tuple[str, tuple[int, ...]], Mapping[str, Any]]:
    """Return where parts stand on disk, by the name of the tensor and the part's first index in it."""
    places = {}
    for index, place in storage.items():
        key = _expect(index, _Index)
        if key.get("offset") is not None:
            places[key["fqn"], _numbers(key["offset"])] = _expect(place, _Place)
    return places


def _parts(entry: Mapping[str, Any], places: Sequence[Mapping[str, Any]]) -> Parts:
    if not isinstance(entry["properties"], _Properties) or not isinstance(entry["properties"].state[0], torch.dtype):
        raise TypeError("dtype expected")
    parts = []
    for chunk, place in zip(entry["chunks"], places, strict=True):
        if not isinstance(place["relative_path"], str):
            raise TypeError("file name expected")
        parts.append(
            Part(
                first=_first(chunk),
                shape=_numbers(chunk.state["sizes"]),
                file=place["relative_path"],
                offset=_number(place["offset"]),
                length=_number(place["length"]),
                is_plain=not place.get("transform_descriptors"),
            )
        )
    return Parts(_numbers(entry["size"]), entry["properties"].state[0], tuple(parts))
