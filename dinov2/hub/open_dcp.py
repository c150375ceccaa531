"""Open a checkpoint folder of torch.distributed.checkpoint (DCP), in which the official DINOv3 code saves its runs.

    ckpt/11249/.metadata        names, shapes, and the place of every part of a tensor: see `dcp_metadata`
    ckpt/11249/__0_0.distcp     parts of tensors one after another, each a file of `torch.save` in itself

Parts are put together when a tensor is read: one tensor is in memory at a time. File names, places and sizes are
verified before anything is read; nothing in the folder is ever executed.
"""

import functools
import io
import math
import os
import pickle
import zipfile
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dinov2.errors import CheckpointError
from dinov2.hub.dcp_metadata import Part, Parts, read_metadata
from dinov2.hub.networks import is_optimizer_key, split_by_network
from dinov2.hub.open_file import is_plain_name
from dinov2.hub.report import list_names
from dinov2.hub.stored_tensor import State, StoredTensor
from dinov2.hub.weights_file import WeightsFile

_METADATA = ".metadata"
_SUFFIX = ".distcp"
_MODEL = "model"  # key under which DINOv3 saves its networks


def is_dcp_folder(folder: Path) -> bool:
    """Say whether a folder is a checkpoint of torch.distributed.checkpoint."""
    return any(folder.glob(f"*{_SUFFIX}"))


def find_dcp_folders(folder: Path) -> list[Path]:
    """List the checkpoints in a folder of checkpoints as DINOv3 keeps it, one named after each iteration, oldest first.

    The folder of the run, which has them in `ckpt`, gives them too.
    """
    numbered = [path for path in (*folder.glob("*"), *folder.glob("ckpt/*")) if path.name.isdecimal()]
    return sorted(filter(is_dcp_folder, numbered), key=lambda path: int(path.name))


def open_dcp(folder: Path) -> WeightsFile:
    """Open the networks of such a checkpoint; no tensor is read.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or tries to read or run what is no part of it.
    """
    path = folder / _METADATA
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has {_SUFFIX} files but no {_METADATA}, which is written last: the checkpoint is not complete; "
            "take an older one, or copy the folder again with its hidden files"
        )
    tensors, others = read_metadata(path)
    others += [name for name in tensors if is_optimizer_key(name.partition(".")[0])]
    weights = {name: tensor for name, tensor in tensors.items() if name not in set(others)}
    sizes = _sizes(folder, {part.file for tensor in weights.values() for part in tensor.parts}, path=path)
    state = {name: _stored(folder, name, tensor, sizes=sizes) for name, tensor in weights.items()}
    states, extra_keys = _networks(state)
    if not state:
        raise CheckpointError(f"{folder}: holds no tensors of a network, but {list_names(_keys(others))}")
    count = f"{len(sizes)} file" + ("s" if len(sizes) > 1 else "")
    return WeightsFile(str(folder), f"DCP folder ({count})", states, extra_keys=(*extra_keys, *_keys(others)))


def _networks(state: State) -> tuple[dict[str, State], tuple[str, ...]]:
    inside = {
        name.removeprefix(f"{_MODEL}."): stored for name, stored in state.items() if name.startswith(f"{_MODEL}.")
    }
    if not inside:
        return split_by_network(state)
    states, others = split_by_network(inside, key=_MODEL)
    return states, (*others, *_keys(name for name in state if not name.startswith(f"{_MODEL}.")))


def _keys(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))


def _sizes(folder: Path, files: set[str], *, path: Path) -> dict[str, int]:
    """Return the sizes of the files that hold tensors, which must be there and stand in the folder itself."""
    for file in sorted(files):
        if not is_plain_name(file):
            raise CheckpointError(f"{path}: names the file '{file}', which is not in its own folder; it is not opened")
    missing = sorted(file for file in files if not (folder / file).is_file())
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of its {len(files)} {_SUFFIX} files are missing ({list_names(missing)}); "
            "copy them too"
        )
    return {file: (folder / file).stat().st_size for file in files}


def _stored(folder: Path, name: str, tensor: Parts, *, sizes: dict[str, int]) -> StoredTensor:
    parts = [part for part in tensor.parts if math.prod(part.shape)]
    for part in parts:
        if not part.is_plain:
            raise CheckpointError(
                f"{folder}: {name} is stored compressed, which is not read; save it without extensions"
            )
        if part.offset + part.length > sizes[part.file]:
            raise CheckpointError(f"{folder / part.file}: ends within {name}, it is truncated; copy it again")
        if math.prod(part.shape) * tensor.dtype.itemsize > part.length:
            raise _damaged(folder, part, name)
    if not _make_whole(parts, tensor.shape):
        raise CheckpointError(f"{folder}: the parts of {name} do not make the whole {list(tensor.shape)}")
    read = functools.partial(_read, folder, name, tensor, parts)
    return StoredTensor(torch.Size(tensor.shape), tensor.dtype, read)


def _make_whole(parts: Sequence[Part], shape: tuple[int, ...]) -> bool:
    """Say whether parts fill a tensor without gap or overlap."""
    if any(len(part.first) != len(shape) or len(part.shape) != len(shape) for part in parts):
        return False
    if sum(math.prod(part.shape) for part in parts) != math.prod(shape):
        return False
    cuts = [  # where parts begin or end, on each axis
        sorted({0, size, *(part.first[axis] for part in parts), *(p.first[axis] + p.shape[axis] for p in parts)})
        for axis, size in enumerate(shape)
    ]
    if any(axis_cuts[-1] > size for axis_cuts, size in zip(cuts, shape, strict=True)):
        return False
    counts = torch.zeros([len(axis_cuts) - 1 for axis_cuts in cuts], dtype=torch.int32)
    for part in parts:
        box = zip(cuts, part.first, part.shape, strict=True)
        counts[
            tuple(slice(bisect_left(axis, start), bisect_left(axis, start + size)) for axis, start, size in box)
        ] += 1
    return bool((counts == 1).all())


def _read(folder: Path, name: str, tensor: Parts, parts: Sequence[Part]) -> Tensor:
    if [part.shape for part in parts] == [tensor.shape]:
        return _read_part(folder, name, parts[0], dtype=tensor.dtype)
    whole = torch.empty(tensor.shape, dtype=tensor.dtype)
    for part in parts:
        box = tuple(slice(start, start + size) for start, size in zip(part.first, part.shape, strict=True))
        whole[box] = _read_part(folder, name, part, dtype=tensor.dtype)
    return whole


def _read_part(folder: Path, name: str, part: Part, *, dtype: torch.dtype) -> Tensor:
    try:
        with (folder / part.file).open("rb") as file:
            section = _Section(file, part.offset, part.length)
            with zipfile.ZipFile(section) as archive:
                is_plain = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
            section.seek(0)
            tensor = torch.load(section, map_location="cpu", weights_only=True) if is_plain else None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise _damaged(folder, part, name) from error
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise _damaged(folder, part, name) from error
    if type(tensor) is not Tensor or (tensor.shape, tensor.dtype) != (part.shape, dtype):
        raise _damaged(folder, part, name)
    return tensor


def _damaged(folder: Path, part: Part, name: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / part.file}: what it holds of {name} cannot be read, it is damaged; copy it again"
    )


class _Section(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError("position before the start")
        self.position = start + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self.length - self.position))
        self.file.seek(self.offset + self.position)
        num_read = self.file.readinto(memoryview(buffer)[:count])
        self.position += num_read
        return num_read
