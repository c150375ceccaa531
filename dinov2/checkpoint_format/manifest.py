"""The manifest: what a complete checkpoint consists of, with checksums of every byte.

Written last, by rank 0; a checkpoint without one does not exist. Read as untrusted data: it can name no other files
than the checkpoint's own.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinov2.checkpoint_format.disk import flush_folder, write_text
from dinov2.checkpoint_format.names import manifest_name, rank_file_name
from dinov2.errors import CheckpointError

FORMAT_VERSION = 2
BLOCK_BYTES = 1 << 20  # bytes of a file under one checksum: what has to be read to verify a small part

_CHECKSUM = "manifest_crc32"  # last key, over the text before it


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is incomplete or its contents are not what was written; an older one may be sound."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and checksums of one rank file."""

    size_bytes: int
    crc32: tuple[int, ...] | Mapping[str, int]  # of each BLOCK_BYTES of the file; version 1: of each tensor, by path


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete checkpoint consists of."""

    name: str
    iteration: int  # counted from 0; training continues with the next one
    world_size: int
    sharding_strategy: str
    config_digest: str
    files: dict[str, FileRecord]
    time: str = ""  # of saving, ISO 8601 in UTC
    versions: dict[str, str] = field(default_factory=dict)  # of packages
    metrics: dict[str, float] = field(default_factory=dict)  # last scores of evaluations
    global_batch_size: int | None = None  # images of an optimiser step
    block_bytes: int = BLOCK_BYTES
    format_version: int = FORMAT_VERSION

    @property
    def size_bytes(self) -> int:
        """Bytes of all rank files."""
        return sum(record.size_bytes for record in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a checkpoint complete; all rank files must have their final names."""
    write_text(folder / manifest_name(manifest.name), _to_text(asdict(manifest)))


def remove_manifest(folder: Path, name: str) -> None:
    """Make a checkpoint incomplete, before its files are removed or replaced."""
    (folder / manifest_name(name)).unlink(missing_ok=True)
    flush_folder(folder)


def open_checkpoint(folder: Path, name: str) -> Manifest:
    """Read a checkpoint's manifest and check that its files are there with the right sizes.

    Raises:
        DamagedCheckpointError: the manifest is missing or unreadable, a file is missing or has another size.
        CheckpointError: the checkpoint has another format version.
    """
    manifest = _read_manifest(folder, name)
    sizes = {file: _size_bytes(folder / file) for file in manifest.files}
    missing = [file for file, size in sizes.items() if size is None]
    if missing:
        num_found = len(sizes) - len(missing)
        raise DamagedCheckpointError(f"{name}: {num_found} of {len(sizes)} rank files found, {missing[0]} is missing")
    for file, record in manifest.files.items():
        if sizes[file] != record.size_bytes:
            raise DamagedCheckpointError(f"{file} has {sizes[file]} bytes but {record.size_bytes} were written")
    return manifest


def _read_manifest(folder: Path, name: str) -> Manifest:
    path = folder / manifest_name(name)
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text)
        version = fields.get("format_version")
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{name}: there is no {path.name} in {folder}, so it is not complete") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error}") from error
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(
            f"{name} has format version {version} but this program reads 1 to {FORMAT_VERSION}; use a newer one"
        )
    if version != 1:
        fields.pop(_CHECKSUM, None)
        if text != _to_text(fields):
            raise DamagedCheckpointError(f"{path.name} does not match its checksum")
    try:
        manifest = _from_fields(fields)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedCheckpointError(f"{path.name} cannot be read: {error}") from error
    if manifest.name != name:
        raise DamagedCheckpointError(f"{path.name} is the manifest of {manifest.name}")
    return manifest


def _to_text(fields: Mapping[str, Any]) -> str:
    """Write fields as JSON, with a checksum in the last key."""
    checksum = zlib.crc32(json.dumps(fields).encode())
    return json.dumps({**fields, _CHECKSUM: checksum})


def _from_fields(fields: dict[str, Any]) -> Manifest:
    """Build a manifest from what JSON held; where it holds none, that is one of the errors of a wrong key or type."""
    files = {file: _record(values, fields) for file, values in fields["files"].items()}
    manifest = Manifest(**{**fields, "files": files})
    for key, kind in (("name", str), ("iteration", int), ("world_size", int), ("sharding_strategy", str)):
        if type(getattr(manifest, key)) is not kind:
            raise ValueError(f"{key} is not a value of type {kind.__name__}")
    expected = manifest.world_size if manifest.world_size == len(files) else 0
    if not files or set(files) != {rank_file_name(manifest.name, rank) for rank in range(expected)}:
        raise ValueError(f"the files it lists are not those of {manifest.world_size} ranks")
    return manifest


def _record(values: Mapping[str, Any], fields: Mapping[str, Any]) -> FileRecord:
    size, checksums = values["size_bytes"], values["crc32"]
    if type(size) is not int or size < 0:
        raise ValueError("a size is not a number of bytes")
    if fields["format_version"] == 1:
        return FileRecord(size_bytes=size, crc32=dict(checksums))
    block = fields["block_bytes"]
    if type(block) is not int or block < 1 or len(checksums) != -(-size // block):
        raise ValueError("the checksums do not cover the files")
    return FileRecord(size_bytes=size, crc32=tuple(checksums))


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
