"""The files of a rank-sharded checkpoint: what they are called, what they hold, how they are written and verified.

    model_0003749.rank_0.pth ...      one file per rank, a dict of tensors, numbers, strings, lists and dicts
    model_0003749.manifest.json       written last: sizes and CRC32 checksums; a checkpoint without it does not exist
    *.tmp                             being written

A checksum is kept for every tensor, and one for all other values of a file, so that a part can be verified alone.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.errors import CheckpointError

FORMAT_VERSION = 1
OTHER_VALUES = "(other values)"  # name under which all that is not a tensor is checksummed

_MANIFEST_SUFFIX = ".manifest.json"
_NAME = re.compile(r"model_\d{7,}")
_NUMBERED = re.compile(r"model_(\d{7,})\.manifest\.json")
_LEFTOVER = re.compile(r"(.+\.rank_\d+\.pth|.+\.manifest\.json|last_checkpoint\.rank_\d+)\.tmp")
_RANK_FILE = re.compile(r"(?P<name>.+)\.rank_(\d+|\{rank\})\.pth")
_PLAIN_TYPES = (type(None), bool, int, float, str, bytes)


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete or its contents are not what was written; an older one may be sound."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and checksums of one rank file."""

    size_bytes: int
    crc32: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete checkpoint consists of."""

    name: str
    iteration: int  # counted from 0; training continues with the next one
    world_size: int
    sharding_strategy: str
    config_digest: str
    files: dict[str, FileRecord]
    format_version: int = FORMAT_VERSION


def checkpoint_name(iteration: int) -> str:
    """Name the checkpoint after an iteration, e.g. `model_0003749`."""
    return f"model_{iteration:07d}"


def iteration_of(name: str) -> int:
    """Read the iteration from a checkpoint's name."""
    return int(name.removeprefix("model_"))


def rank_file_name(name: str, rank: int) -> str:
    """Name one rank's file of a checkpoint."""
    return f"{name}.rank_{rank}.pth"


def split_path(path: str | Path) -> tuple[Path, str]:
    """Split the path of a checkpoint into its folder and name.

    Args:
        path: a rank file, the pattern `model_0003749.rank_{rank}.pth`, the manifest, or `folder/model_0003749`.
    """
    path = Path(path)
    if match := _RANK_FILE.fullmatch(path.name):
        return path.parent, match["name"]
    return path.parent, path.name.removesuffix(_MANIFEST_SUFFIX)


def is_checkpoint_path(path: str | Path) -> bool:
    """Say whether a path names a rank-sharded checkpoint, in one of the ways `split_path` knows, by its form alone."""
    name = Path(path).name
    return bool(_RANK_FILE.fullmatch(name) or name.endswith(_MANIFEST_SUFFIX) or _NAME.fullmatch(name))


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


def write_rank_file(folder: Path, *, name: str, rank: int, data: Mapping[str, Any]) -> FileRecord:
    """Write one rank's data under its temporary name and wait until it is on the disk.

    Args:
        folder: must exist.
        name: of the checkpoint.
        rank: whose file it is.
        data: as `to_plain` returns it.

    Returns:
        Its size, and its checksums computed from memory.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    path = _temporary(folder / rank_file_name(name, rank))
    try:
        with open(path, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
            size_bytes = file.tell()
    except (OSError, RuntimeError) as error:  # PyTorch's writer hides the system's error in a RuntimeError
        with contextlib.suppress(OSError):
            path.unlink()
        cause = error if isinstance(error, OSError) else error.__context__
        raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from None
    return FileRecord(size_bytes=size_bytes, crc32=_checksums(data))


def publish_rank_file(folder: Path, *, name: str, rank: int) -> None:
    """Give a written rank file its final name."""
    path = folder / rank_file_name(name, rank)
    os.replace(_temporary(path), path)


def discard_rank_file(folder: Path, *, name: str, rank: int) -> None:
    """Remove a rank file of a checkpoint that is not going to be complete, temporary or published."""
    path = folder / rank_file_name(name, rank)
    for written in (path, _temporary(path)):
        with contextlib.suppress(OSError):  # the write has already failed, which is what the user must hear
            written.unlink()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a checkpoint complete; all rank files must have their final names."""
    write_text(folder / f"{manifest.name}{_MANIFEST_SUFFIX}", json.dumps(asdict(manifest)))


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it appears whole or not at all."""
    temporary = _temporary(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def find_checkpoints(folder: Path) -> list[str]:
    """List the names of the checkpoints of a run that have a manifest, oldest iteration first."""
    if not folder.is_dir():
        return []
    matches = [_NUMBERED.fullmatch(entry.name) for entry in folder.iterdir()]
    return [checkpoint_name(iteration) for iteration in sorted(int(match[1]) for match in matches if match)]


def open_checkpoint(folder: Path, name: str) -> Manifest:
    """Read a checkpoint's manifest and check that its files are there with the right sizes.

    Raises:
        DamagedCheckpointError: the manifest is missing or unreadable, a file is missing or has another size.
        CheckpointError: the checkpoint has another format version.
    """
    manifest = _read_manifest(folder, name)
    sizes = {file: _size_bytes(folder / file) for file in manifest.files}
    num_found = sum(size is not None for size in sizes.values())
    if num_found < len(sizes):
        raise DamagedCheckpointError(f"{name}: {num_found} of {len(sizes)} rank files found")
    for file, record in manifest.files.items():
        if sizes[file] != record.size_bytes:
            raise DamagedCheckpointError(f"{file} has {sizes[file]} bytes but {record.size_bytes} were written")
    return manifest


def has_manifest(folder: Path, name: str) -> bool:
    """Say whether a checkpoint has a manifest, sound or not."""
    return (folder / f"{name}{_MANIFEST_SUFFIX}").is_file()


def read_rank_file(folder: Path, manifest: Manifest, rank: int) -> dict[str, Any]:
    """Read and verify one rank's data.

    Raises:
        DamagedCheckpointError: the file cannot be read or a checksum differs.
    """
    file = rank_file_name(manifest.name, rank)
    data = _load(folder / file, mmap=False)
    _compare({**dict.fromkeys(manifest.files[file].crc32), **_checksums(data)}, manifest, rank)
    return data


def open_rank_file(folder: Path, manifest: Manifest, rank: int) -> dict[str, Any]:
    """Read one rank's data with tensors that are views of the file, each to be verified by `check_tensor` when used.

    Raises:
        DamagedCheckpointError: the file cannot be read, or the checksum of what is no tensor differs.
    """
    data = _load(folder / rank_file_name(manifest.name, rank), mmap=True)
    _compare({OTHER_VALUES: _checksum_of_others(data)}, manifest, rank)
    return data


def check_tensor(manifest: Manifest, rank: int, part: str, tensor: Tensor) -> None:
    """Verify one tensor of `open_rank_file`.

    Args:
        manifest: of the checkpoint.
        rank: whose file the tensor is from.
        part: path of keys to it, as in `model/teacher.backbone.cls_token`.
        tensor: as the file holds it.

    Raises:
        DamagedCheckpointError: its checksum differs.
    """
    _compare({part: _checksum(tensor)}, manifest, rank)


def remove_manifest(folder: Path, name: str) -> None:
    """Make a checkpoint incomplete, before its files are removed or replaced."""
    (folder / f"{name}{_MANIFEST_SUFFIX}").unlink(missing_ok=True)
    _flush_folder(folder)


def remove_checkpoint(folder: Path, name: str) -> None:
    """Delete a checkpoint, its manifest first."""
    remove_manifest(folder, name)
    for path in folder.glob(f"{name}.rank_*.pth"):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what writers that were killed left under temporary names."""
    for path in folder.glob("*.tmp"):
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def remove_incomplete(folder: Path, *, before_iteration: int) -> None:
    """Delete rank files of numbered checkpoints that have no manifest and are older than `before_iteration`."""
    complete = set(find_checkpoints(folder))
    for path in folder.glob("model_*.rank_*.pth"):
        name = split_path(path)[1]
        number = name.removeprefix("model_")
        if name not in complete and number.isdigit() and int(number) < before_iteration:
            path.unlink(missing_ok=True)


def _read_manifest(folder: Path, name: str) -> Manifest:
    path = folder / f"{name}{_MANIFEST_SUFFIX}"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.get("format_version")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{name}: there is no {path.name} in {folder}, so it is not complete") from None
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error}") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{name} has format version {version} but this program reads {FORMAT_VERSION}")
    try:
        files = {file: FileRecord(**record) for file, record in fields.pop("files").items()}
        return Manifest(**fields, files=files)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error}") from error


def _load(path: Path, *, mmap: bool) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedCheckpointError(f"{path.name} cannot be read: {reason}") from error


def _compare(found: Mapping[str, int | None], manifest: Manifest, rank: int) -> None:
    """Compare checksums of parts of a rank file, None where a part is missing, with those of the manifest."""
    file = rank_file_name(manifest.name, rank)
    expected = manifest.files[file].crc32
    for part, checksum in sorted(found.items()):
        if checksum is None or checksum != expected.get(part):
            raise DamagedCheckpointError(f"{file}: {part} does not match its checksum")


def _checksums(data: Mapping[str, Any]) -> dict[str, int]:
    tensors = {path: _checksum(value) for path, value in _leaves(data, "") if isinstance(value, Tensor)}
    return {**tensors, OTHER_VALUES: _checksum_of_others(data)}


def _checksum(tensor: Tensor) -> int:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    kind = f"{tensor.dtype}{list(tensor.shape)}".encode()
    return zlib.crc32(raw.numpy(), zlib.crc32(kind))


def _checksum_of_others(data: Mapping[str, Any]) -> int:
    """Compute the checksum of all that is not a tensor."""
    checksum = 0
    for path, value in _leaves(data, ""):
        if not isinstance(value, Tensor):
            checksum = zlib.crc32(f"{path}={value!r}\n".encode(), checksum)
    return checksum


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values of nested data with their paths; an empty container is a value."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}/{index}")
    else:
        yield path, value


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _flush_folder(folder: Path) -> None:
    """Wait until renames in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
