"""Compare every byte of checkpoints with their checksums, and say which tensors are damaged."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from dinov2 import checkpoint_format as files
from dinov2.checkpoint_format.rank_file import leaves
from dinov2.errors import CheckpointError
from dinov2.hub.report import list_names
from dinov2.logging.progress import track
from dinov2.run.checkpoint_files import find_checkpoint, format_bytes, format_plural


def checkpoints_of(path: str) -> list[tuple[Path, str]]:
    """List the folder and name of the checkpoints that a path means; of a folder, all that have a manifest.

    Raises:
        CheckpointError: there are none.
    """
    folder, name = find_checkpoint(path)
    if not Path(path).expanduser().is_dir():
        return [(folder, name)]
    return [(folder, name) for name in files.find_checkpoints(folder)]


def verify(folder: Path, name: str) -> tuple[str, list[str]]:
    """Verify one checkpoint.

    Returns:
        What it consists of, for people, and a sentence for each thing that is wrong, with the file and the tensors.
    """
    try:
        manifest = files.open_checkpoint(folder, name)
    except CheckpointError as error:
        return name, [str(error)]
    problems = [
        problem for rank in range(manifest.world_size) for problem in _problems(folder, manifest, rank, name=name)
    ]
    if not problems:
        try:
            files.StoredCheckpoint.open(folder, name)
        except CheckpointError as error:
            problems.append(str(error))
    return f"{name} ({format_plural(len(manifest.files), 'file')}, {format_bytes(manifest.size_bytes)})", problems


def _problems(folder: Path, manifest: files.Manifest, rank: int, *, name: str) -> Iterator[str]:
    """Yield what is wrong with one rank file."""
    description = files.rank_file_name(name, rank)
    try:
        file = files.MappedFile(folder, manifest, rank)
    except CheckpointError as error:
        yield str(error)
        return
    if manifest.format_version == 1:  # has a checksum for each tensor
        try:
            file.verify_all()
        except CheckpointError as error:
            yield str(error)
        return
    num_blocks = len(manifest.files[description].crc32)
    for number in track(range(num_blocks), description=description):
        start = number * manifest.block_bytes
        try:
            file.verify(start, start + 1)
        except CheckpointError as error:
            yield f"{error}{_tensors_at(file.path, start, start + manifest.block_bytes)}"


def _tensors_at(path: Path, start: int, end: int) -> str:
    """Name the tensors that have bytes there, if the file can still tell; for sentences, it is damaged after all."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = [info for info in archive.infolist() if "/data/" in info.filename]
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # a damaged file can raise anything
        return ""
    names = [name for name, value in leaves(data) if isinstance(value, torch.Tensor)]
    there = [
        name
        for name, record in zip(names, records, strict=False)
        if record.file_size and record.header_offset < end and start < record.header_offset + record.file_size
    ]
    return f" (there: {list_names(there)})" if there else ""
