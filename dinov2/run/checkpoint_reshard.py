"""Write a checkpoint anew for another number of ranks, one tensor after another: no GPU, no processes.

A run continues from the new one exactly as from the old one, whatever its number of processes: rows are put together
when they are read in any case. It is for moving a checkpoint, in few files or in small ones.
"""

import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dinov2 import checkpoint_format as files
from dinov2.checkpoint_format.names import temporary
from dinov2.errors import CheckpointError, ConfigError
from dinov2.fsdp.rng import RngState
from dinov2.hub.open_checkpoint import stored_tensor
from dinov2.hub.stored_tensor import StoredTensor
from dinov2.hub.stream_tensors import stream_torch
from dinov2.hub.write_weights import require_space
from dinov2.logging.progress import track
from dinov2.run.checkpoint_consolidate import counted_by
from dinov2.run.checkpoint_files import format_bytes, format_plural, open_stored

_RNG_KEYS = {"python", "numpy", "torch", "cuda"}
_CUDA_STATE_BYTES = 16  # seed and offset, 64 bits each


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor that one rank gets."""

    pieces: files.StoredPieces
    first_row: int
    num_rows: int

    def stored(self, checkpoint: files.StoredCheckpoint) -> StoredTensor:
        """Describe these rows."""
        return stored_tensor(checkpoint, self.pieces, first_row=self.first_row, num_rows=self.num_rows)

    def layout(self) -> dict[str, list[int]]:
        """Say which rows of which tensor they are, as a rank file does."""
        shape = self.pieces.global_shape
        return {"global_shape": list(shape), "offset": [self.first_row, *(0 for _ in shape[1:])] if shape else []}


def reshard(path: str, output_dir: str, *, num_ranks: int, strategy: str | None, overwrite: bool) -> str:
    """Write a checkpoint for another number of ranks.

    Args:
        path: checkpoint of a run, or its folder (the newest).
        output_dir: folder, made if it is not there; not the checkpoint's own.
        num_ranks: >= 1.
        strategy: sharding strategy that the new one states; None: the old one's. NO_SHARD spreads whole tensors over
            the ranks, all others split them.
        overwrite: replace a checkpoint of this name in the folder.

    Returns:
        What was written, a sentence.

    Raises:
        CheckpointError: the checkpoint is damaged, or the new one cannot be written; nothing is left of it then.
        ConfigError: an argument is wrong, or the output exists.
    """
    stored = open_stored(path)
    folder = Path(output_dir).expanduser()
    if folder.resolve() == stored.folder.resolve():
        raise ConfigError(f"--output-dir {output_dir}: is the folder of the checkpoint itself; choose another")
    if files.has_manifest(folder, stored.name) and not overwrite:
        raise ConfigError(f"--output-dir {output_dir}: holds a {stored.name}; choose another, or pass --overwrite")
    strategy = strategy or stored.manifest.sharding_strategy
    try:
        manifest = _write(stored, folder, num_ranks=num_ranks, strategy=strategy)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder}/{stored.name}: cannot be written ({reason}); free some space or choose another folder"
        ) from error
    size = format_bytes(manifest.size_bytes)
    return f"{folder / stored.name}: {strategy}, {format_plural(num_ranks, 'rank file')}, {size}"


def _write(stored: files.StoredCheckpoint, folder: Path, *, num_ranks: int, strategy: str) -> files.Manifest:
    """Write all rank files under temporary names, then rename them, then write the manifest."""
    name = stored.name
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, stored.manifest.size_bytes)
    shares = _share_out(_tensors(stored), num_ranks=num_ranks, is_split=strategy != "NO_SHARD")
    records = {}
    is_replaced = False
    try:
        with closing(track([rows for share in shares for rows in share.values()], description=name)) as steps:
            for rank, share in enumerate(shares):
                rows = {path: counted_by(steps, part.stored(stored)) for path, part in share.items()}
                values = _values(stored, share, rows, rank=rank)
                about = {"rank": rank, "world_size": num_ranks, "sharding_strategy": strategy}
                path = temporary(folder / files.rank_file_name(name, rank))
                stream_torch(path, about | values)
                records[files.rank_file_name(name, rank)] = _sum_up(path)
        files.remove_checkpoint(folder, name)
        is_replaced = True
        for rank in range(num_ranks):
            files.publish_rank_file(folder, name=name, rank=rank)
        manifest = replace(
            stored.manifest,
            files=records,
            world_size=num_ranks,
            sharding_strategy=strategy,
            block_bytes=files.BLOCK_BYTES,
            format_version=files.FORMAT_VERSION,
        )
        files.write_manifest(folder, manifest)
    except BaseException:
        for rank in range(num_ranks):
            files.discard_rank_file(folder, name=name, rank=rank, published=is_replaced)
        raise
    return manifest


def _tensors(stored: files.StoredCheckpoint) -> dict[str, files.StoredPieces]:
    """Return the tensors of model and optimisers by their paths in a rank file."""
    tensors = {f"model/{name}": pieces for name, pieces in stored.model.items()}
    for key in stored.checkpointable_names:
        for param, items in stored.optimizer_state(key).get("state", {}).items():
            for item, value in items.items():
                if isinstance(value, files.StoredPieces):
                    tensors[_state_path(key, param, item)] = value
    return tensors


def _state_path(key: str, param: str, item: str) -> str:
    return f"checkpointables/{key}/state/{param}/{item}"


def _share_out(tensors: Mapping[str, files.StoredPieces], *, num_ranks: int, is_split: bool) -> list[dict[str, _Rows]]:
    """Give each rank its rows: split tensors as FSDP does, whole ones the largest first to the rank with least."""
    shares: list[dict[str, _Rows]] = [{} for _ in range(num_ranks)]
    num_bytes = [0] * num_ranks
    whole = {}
    for path, pieces in tensors.items():
        size = pieces.dtype.itemsize * torch.Size(pieces.global_shape).numel()
        if not (is_split and size and pieces.global_shape and pieces.dtype.is_floating_point):
            whole[path] = size
            continue
        rows = -(-pieces.num_rows // num_ranks)
        for rank, first_row in enumerate(range(0, pieces.num_rows, rows)):
            shares[rank][path] = _Rows(pieces, first_row, min(rows, pieces.num_rows - first_row))
    for path, size in sorted(whole.items(), key=lambda item: (-item[1], item[0])):
        rank = num_bytes.index(min(num_bytes))
        num_bytes[rank] += size
        shares[rank][path] = _Rows(tensors[path], 0, tensors[path].num_rows)
    return shares


def _values(
    stored: files.StoredCheckpoint, share: Mapping[str, _Rows], rows: Mapping[str, StoredTensor], *, rank: int
) -> dict[str, Any]:
    """Return what a rank's file holds, with tensors that are read when they are written."""
    per_rank = _rank_values(stored, rank)
    return {
        "format_version": files.FORMAT_VERSION,
        "versions": stored.manifest.versions,
        "config": stored.config,
        "time": stored.manifest.time,
        "model": {name: rows[f"model/{name}"] for name in stored.model if f"model/{name}" in rows},
        "layout": {path: part.layout() for path, part in share.items()},
        "checkpointables": {
            key: per_rank[key] if key in per_rank else _optimizer(stored, key, rows)
            for key in stored.checkpointable_names
        },
        "extra": stored.extra,
    }


def _optimizer(stored: files.StoredCheckpoint, key: str, rows: Mapping[str, StoredTensor]) -> dict[str, Any]:
    saved = stored.optimizer_state(key)
    state = {
        param: {
            item: rows[_state_path(key, param, item)] if isinstance(value, files.StoredPieces) else value
            for item, value in items.items()
            if not isinstance(value, files.StoredPieces) or _state_path(key, param, item) in rows
        }
        for param, items in saved["state"].items()
    }
    return {"state": state, "param_groups": saved["param_groups"]}


def _rank_values(stored: files.StoredCheckpoint, rank: int) -> dict[str, Any]:
    """Return what a rank has of its own; one that the saved run did not have gets what it would get at a resume."""
    if rank < stored.manifest.world_size:
        return stored.rank_values(rank)
    return {
        key: _fresh_random_numbers(value, rank) if isinstance(value, dict) and value.keys() == _RNG_KEYS else value
        for key, value in stored.rank_values(0).items()
    }


def _fresh_random_numbers(state: dict[str, Any], rank: int) -> dict[str, Any]:
    rng = RngState()
    own = rng.state_dict()
    try:
        rng.load_state_of_another(state, rank=rank)
        fresh, seed = rng.state_dict(), torch.initial_seed()
    finally:
        rng.load_state_dict(own)
    if state["cuda"] is None or state["cuda"].numel() != _CUDA_STATE_BYTES:
        return fresh | {"cuda": None}
    return fresh | {"cuda": torch.frombuffer(bytearray(struct.pack("<QQ", seed, 0)), dtype=torch.uint8)}


def _sum_up(path: Path) -> files.FileRecord:
    """Wait until a file is on the disk and take its checksums."""
    checksums = []
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(files.BLOCK_BYTES):
            checksums.append(zlib.crc32(block))
        return files.FileRecord(size_bytes=file.tell(), crc32=tuple(checksums))
