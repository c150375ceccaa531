"""Open the rank files of a training run as whole networks, without starting that many processes.

Each rank holds some rows of a tensor, or all ranks hold the same. Rows are put together, and compared with their
checksums, when a tensor is read: one tensor is in memory at a time.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2 import checkpoint_format as files
from dinov2.errors import CheckpointError
from dinov2.hub.networks import split_by_network
from dinov2.hub.open_file import read_torch, torch_file
from dinov2.hub.stored_tensor import StoredTensor
from dinov2.hub.weights_file import WeightsFile

_MODEL = "model"


@dataclass(frozen=True)
class _Part:
    """Rows of a tensor in one rank's file."""

    rank: int
    first_row: int
    rows: Tensor


def open_checkpoint(path: Path) -> WeightsFile:
    """Open a checkpoint of a training run; sizes are checked now, contents when they are read.

    Args:
        path: a rank file, the pattern `model_0003749.rank_{rank}.pth`, the manifest, or `folder/model_0003749`.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged. A rank file of the official DINOv2 code is read if it
            is whole (one process), else refused.
    """
    folder, name = files.split_path(path)
    try:
        manifest = files.open_checkpoint(folder, name)
        contents = [files.open_rank_file(folder, manifest, rank) for rank in range(manifest.world_size)]
    except files.DamagedCheckpointError as error:
        foreign = _open_foreign(path, folder, name)
        if foreign is not None:
            return foreign
        raise CheckpointError(f"{folder}/{error}{_others(folder, name)}") from error
    state = {tensor: _assemble(tensor, folder, manifest, contents) for tensor in contents[0]["layout"]}
    states, other_parts = split_by_network(state)
    num_ranks = f"{manifest.world_size} rank" + ("s" if manifest.world_size > 1 else "")
    extra_keys = (*other_parts, *contents[0]["checkpointables"], *contents[0]["extra"])
    return WeightsFile(str(path), f"training checkpoint ({num_ranks})", states, extra_keys=extra_keys)


def require_own_checkpoint(path: Path) -> None:
    """Refuse what is no checkpoint of a run here where the whole state of one is to be restored.

    Args:
        path: as for `open_checkpoint`; that there is a checkpoint, and a sound one, is not checked.

    Raises:
        CheckpointError: the files are those of the official code, or weights alone, or a folder of checkpoints.
    """
    folder, name = files.split_path(path)
    if path.is_dir() and (checkpoints := files.find_checkpoints(path)):
        raise CheckpointError(
            f"{path}: is the folder of a training run; give one of its checkpoints, the newest is "
            f"{path / checkpoints[-1]}"
        )
    if files.is_checkpoint_path(path):
        what = "was saved by the official DINOv2 code, of which the weights are read but not the state of training"
        refused = _open_foreign(path, folder, name) is not None
    else:
        what = "is no checkpoint of a training run, at most its weights"
        refused = path.exists() and not files.has_manifest(folder, name)
    if refused:
        raise CheckpointError(f"{path}: {what}; start a new run from them with student.pretrained_weights={path}")


def _open_foreign(path: Path, folder: Path, name: str) -> WeightsFile | None:
    """Open a rank file that has no manifest because the official code wrote it; None if there is no such file."""
    candidates = [path, folder / files.rank_file_name(name, 0)]
    file = next((file for file in candidates if file.name.endswith(".pth") and file.is_file()), None)
    if file is None or files.has_manifest(folder, name):
        return None
    content = read_torch(file)
    is_ours = isinstance(content, Mapping) and "layout" in content
    return None if is_ours else torch_file(file, content)


def _assemble(name: str, folder: Path, manifest: files.Manifest, contents: list[dict[str, Any]]) -> StoredTensor:
    """Describe a whole tensor; of rows that several ranks hold, those of the first are taken."""
    shape = torch.Size(contents[0]["layout"][name]["global_shape"])
    parts: dict[int, _Part] = {}
    for rank, content in enumerate(contents):
        layout, rows = content["layout"].get(name), content[_MODEL].get(name)
        if layout is None or rows is None:
            raise CheckpointError(
                f"{folder}/{files.rank_file_name(manifest.name, rank)}: has no {name}, which is in the layout of rank 0"
            )
        if rank == 0 or (shape and rows.shape[0] > 0):
            first_row = layout["offset"][0] if shape else 0
            parts.setdefault(first_row, _Part(rank, first_row, rows))
    ordered = [parts[first_row] for first_row in sorted(parts)]
    if not _make_whole(ordered, shape):
        raise CheckpointError(f"{folder}/{manifest.name}: the parts of {name} do not make the whole {list(shape)}")
    read = functools.partial(_read, name, folder, manifest, ordered)
    return StoredTensor(shape, contents[0][_MODEL][name].dtype, read)


def _make_whole(parts: list[_Part], shape: torch.Size) -> bool:
    """Say whether parts follow each other without gap or overlap and end where the whole tensor ends."""
    if not shape:
        return [part.rows.shape for part in parts] == [shape]
    ends = [part.first_row + part.rows.shape[0] for part in parts]
    return [0, *ends] == [*(part.first_row for part in parts), shape[0]] and all(
        part.rows.shape[1:] == shape[1:] for part in parts
    )


def _read(name: str, folder: Path, manifest: files.Manifest, parts: list[_Part]) -> Tensor:
    for part in parts:
        try:
            files.check_tensor(manifest, part.rank, f"{_MODEL}/{name}", part.rows)
        except files.DamagedCheckpointError as error:
            raise CheckpointError(f"{folder}/{error}{_others(folder, manifest.name)}") from error
    return parts[0].rows if len(parts) == 1 else torch.cat([part.rows for part in parts])


def _others(folder: Path, name: str) -> str:
    others = [other for other in files.find_checkpoints(folder) if other != name]
    return f"; the folder also has {others[-1]}" if others else ""
