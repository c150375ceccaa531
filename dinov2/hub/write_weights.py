"""Write tensors into a file or a model folder, so that it appears whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dinov2.errors import CheckpointError
from dinov2.hub.stored_tensor import State
from dinov2.hub.stream_tensors import stream_safetensors, stream_torch

FILE_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
MODEL_FILES = {"config.json", "model.safetensors"}


def write_file(path: Path, states: Mapping[str, State], *, metadata: Mapping[str, str]) -> None:
    """Write tensors as `torch.save` does, or as safetensors if the path ends so; replaces a file that is there.

    Args:
        path: its folder is made if it is not there.
        states: networks by name, or one state under "", which is written bare; a safetensors file, which has no
            levels, has the network before the names of tensors. Read one tensor after another.
        metadata: strings for the header of safetensors; left out elsewhere.

    Raises:
        CheckpointError: a tensor cannot be read, or the file cannot be written.
    """

    def write(temporary: Path) -> None:
        if path.suffix == ".safetensors":
            stream_safetensors(temporary, flat, metadata=metadata)
        else:
            stream_torch(temporary, states.get("", states))
        _flush(temporary)

    flat = {f"{key}.{name}" if key else name: t for key, state in states.items() for name, t in state.items()}
    _write_aside(path, write, flat)


def write_folder(path: Path, state: State, *, config: Mapping[str, Any]) -> None:
    """Write a folder of `model.safetensors` and `config.json`; replaces such a folder.

    Raises:
        CheckpointError: a tensor cannot be read, or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        file = temporary / "model.safetensors"
        stream_safetensors(file, state, metadata={"format": "pt"})
        _flush(file)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    _write_aside(path, write, state)


def _write_aside(path: Path, write: Callable[[Path], None], state: State) -> None:
    """Write under a temporary name, then rename; what was there before stays until then."""
    place = path.absolute()  # "." has no name
    temporary, old = (place.with_name(place.name + suffix) for suffix in (".tmp", ".old"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        require_space(place.parent, sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.values()))
        _remove(temporary)
        write(temporary)
        if place.is_dir():
            _remove(old)
            place.rename(old)
        temporary.replace(place)
        _remove(old)
    except (OSError, RuntimeError, ValueError) as error:  # PyTorch's writer hides the system's error
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: cannot be written ({reason}); free some space or choose another place"
        ) from error
    finally:
        _remove(temporary)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise OSError where the disk of a folder has less room than that."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{num_bytes / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free on its disk",
            str(folder),
        )


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Remove what this module has written; nothing else."""
    if path.is_dir() and {file.name for file in path.iterdir()} <= MODEL_FILES:
        shutil.rmtree(path)
    elif path.is_file():
        path.unlink()
