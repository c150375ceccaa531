"""Write tensors into a file or a model folder, so that it appears whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinov2.errors import CheckpointError
from dinov2.hub.stored_tensor import State

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
MODEL_FILES = {"config.json", "model.safetensors"}


def write_file(path: Path, state: State, *, metadata: Mapping[str, str]) -> None:
    """Write tensors with `torch.save`, or as safetensors if the path ends so; replaces a file that is there.

    Args:
        path: its folder is made if it is not there.
        state: read one after another; all that are no views of a file are in memory at the same time.
        metadata: strings for the header of safetensors; left out elsewhere.

    Raises:
        CheckpointError: a tensor cannot be read, or the file cannot be written.
    """

    def write(temporary: Path) -> None:
        _write_tensors(temporary, state, is_safetensors=path.suffix == ".safetensors", metadata=metadata)

    _write_aside(path, write, state)


def write_folder(path: Path, state: State, *, config: Mapping[str, Any]) -> None:
    """Write a folder of `model.safetensors` and `config.json`; replaces such a folder.

    Raises:
        CheckpointError: a tensor cannot be read, or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        file = temporary / "model.safetensors"
        _write_tensors(file, state, is_safetensors=True, metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    _write_aside(path, write, state)


def _write_aside(path: Path, write: Callable[[Path], None], state: State) -> None:
    """Write under a temporary name, then rename; what was there before stays until then."""
    place = path.absolute()  # "." has no name
    temporary, old = (place.with_name(place.name + suffix) for suffix in (".tmp", ".old"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _require_space(place, state)
        _remove(temporary)
        write(temporary)
        if place.is_dir():
            _remove(old)
            place.rename(old)
        temporary.replace(place)
        _remove(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # writers of tensors hide the system's error
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); free some space or choose another place"
        ) from error
    finally:
        _remove(temporary)


def _require_space(path: Path, state: State) -> None:
    needed = sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.values())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free on its disk", str(path)
        )


def _write_tensors(path: Path, state: State, *, is_safetensors: bool, metadata: Mapping[str, str]) -> None:
    tensors = {name: _whole(stored.read()) for name, stored in state.items()}
    if is_safetensors:
        save_file(tensors, path, metadata=dict(metadata))
    else:
        with path.open("wb") as file:  # with a name alone, PyTorch would not pass on the system's error
            torch.save(tensors, file)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is all of its storage: a view would be saved with what surrounds it."""
    is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if is_whole and tensor.is_contiguous() else tensor.contiguous().clone()


def _remove(path: Path) -> None:
    """Remove what this module has written; nothing else."""
    if path.is_dir() and {file.name for file in path.iterdir()} <= MODEL_FILES:
        shutil.rmtree(path)
    elif path.is_file():
        path.unlink()
