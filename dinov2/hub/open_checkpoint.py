"""Open the rank files of a training run as whole networks, without starting that many processes.

The rows of a tensor are put together, and compared with their checksums, when it is read: one tensor is in memory at
a time. A student's low-rank updates are merged into its weights then.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dinov2 import checkpoint_format as files
from dinov2.errors import CheckpointError
from dinov2.hub.low_rank import merge_low_rank_updates
from dinov2.hub.networks import split_by_network
from dinov2.hub.open_file import read_torch, torch_file
from dinov2.hub.stored_tensor import StoredTensor
from dinov2.hub.weights_file import WeightsFile


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
        stored = files.StoredCheckpoint.open(folder, name)
    except files.DamagedCheckpointError as error:
        foreign = _open_foreign(path, folder, name)
        if foreign is not None:
            return foreign
        raise explain_damage(folder, name, error) from error
    state = {key: stored_tensor(stored, pieces) for key, pieces in stored.model.items()}
    state = merge_low_rank_updates(state, config=stored.config, where=str(path))
    states, other_parts = split_by_network(state)
    world_size = stored.manifest.world_size
    num_ranks = f"{world_size} rank" + ("s" if world_size > 1 else "")
    extra_keys = (*other_parts, *stored.checkpointable_names, *stored.extra)
    return WeightsFile(str(path), f"training checkpoint ({num_ranks})", states, extra_keys=extra_keys)


def stored_tensor(
    stored: files.StoredCheckpoint, pieces: files.StoredPieces, *, first_row: int = 0, num_rows: int | None = None
) -> StoredTensor:
    """Describe rows of a tensor of a checkpoint, all by default; reading them raises CheckpointError on damage."""
    num_rows = pieces.num_rows if num_rows is None else num_rows
    shape = (num_rows, *pieces.global_shape[1:]) if pieces.global_shape else ()

    def read() -> Tensor:
        try:
            return pieces.read(first_row, num_rows)
        except files.DamagedCheckpointError as error:
            raise explain_damage(stored.folder, stored.name, error) from error

    return StoredTensor(torch.Size(shape), pieces.dtype, read)


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


def explain_damage(folder: Path, name: str, error: files.DamagedCheckpointError) -> CheckpointError:
    """Say what is wrong with a checkpoint and which other one there is."""
    others = [other for other in files.find_checkpoints(folder) if other != name]
    return CheckpointError(f"{folder}/{error}" + (f"; the folder also has {others[-1]}" if others else ""))
