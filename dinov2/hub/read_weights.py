"""Read a file of weights from disk: tensors only, and one clear sentence for each way in which a download goes wrong.

Nothing but tensors is ever unpickled (`weights_only=True`, or safetensors).
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from dinov2.errors import CheckpointError

_RANK_FILE = re.compile(r"\.rank_\d+\.pth$")
_ZIP_START = b"PK\x03\x04"
_LFS_START = b"version https://git-lfs"
_HTML_STARTS = (b"<!doctype", b"<html", b"<?xml")


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a `.pth` or `.safetensors` file on the CPU, as it stands on disk.

    Args:
        path: file of weights. Rank files of a training run are refused, because each holds only a part.

    Returns:
        The dict of the file: names to tensors, or one level of dicts around that (`{"teacher": ...}`).

    Raises:
        CheckpointError: the file is missing, empty, truncated, not a file of weights, or holds more than tensors.
    """
    path = Path(path)
    _check_readable(path)
    is_safetensors = path.suffix == ".safetensors"
    content = _read_safetensors(path) if is_safetensors else _read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of named tensors")
    if not content:
        raise CheckpointError(f"{path}: holds no tensors")
    return dict(content)


def _check_readable(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; give the .pth or .safetensors file in it")
    if _RANK_FILE.search(path.name):
        raise CheckpointError(
            f"{path}: is one rank's part of a training checkpoint; "
            "give a teacher_checkpoint.pth from the eval folder of the run"
        )
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file of weights") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise CheckpointError(f"{path}: is empty (0 bytes); download or save it again")
    if start.startswith(_LFS_START):
        raise CheckpointError(f"{path}: is a git-LFS pointer, not the weights; fetch them with: git lfs pull")
    if start.lstrip().lower().startswith(_HTML_STARTS):
        raise CheckpointError(
            f"{path}: is a web page, not weights; the download was answered by a page (log-in or wrong address)"
        )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors, it is truncated or damaged ({error}); download or save it again"
        ) from error


def _read_torch(path: Path) -> Any:
    size_mib = path.stat().st_size / 2**20
    is_zip = zipfile.is_zipfile(path)  # the zip directory stands at the end of the file
    if not is_zip:
        with path.open("rb") as file:
            if file.read(4) == _ZIP_START:
                raise CheckpointError(
                    f"{path}: ends early ({size_mib:.1f} MiB are there), it is truncated; download or save it again"
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds Python objects besides tensors, which are refused because reading them can run code; "
            "give a teacher_checkpoint.pth, or re-save the state dict alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is not a file of weights that PyTorch can read, or is truncated ({size_mib:.1f} MiB); "
            "download or save it again"
        ) from error
