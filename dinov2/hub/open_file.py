"""Open one file of weights, `.pth` or `.safetensors`; each way in which a download goes wrong has a clear sentence.

What a file is follows from its content, not from its name. Nothing but tensors is ever unpickled (`weights_only=True`),
and tensors are views of the file (safetensors, and what `torch.save` writes since 2020): they take pages of the file,
which the system drops and reads again as it likes, and no memory of the program.
"""

import functools
import os
import pickle
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dinov2.errors import CheckpointError
from dinov2.hub.networks import find_networks, split_by_network
from dinov2.hub.pickle_names import foreign_names, pickle_names
from dinov2.hub.stored_tensor import State, StoredTensor
from dinov2.hub.stream_tensors import SAFETENSORS_DTYPES
from dinov2.hub.weights_file import WeightsFile

_ZIP_START = b"PK\x03\x04"
_OLD_TORCH_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # its magic number, pickled
_PICKLE_START = b"\x80"
_LFS_START = b"version https://git-lfs"
_HTML_STARTS = (b"<!doctype", b"<html", b"<?xml")
_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
_NUM_START_BYTES = 512
_TAR_MARK = slice(257, 262)  # where a tar archive says "ustar"
_MAX_NAMES = 3


def open_file(path: Path) -> WeightsFile:
    """Open a `.pth`, `.pt`, `.bin` or `.safetensors` file; no tensor is read.

    Raises:
        CheckpointError: the file is missing, empty, truncated, not a file of weights, or holds more than tensors.
    """
    start = _read_start(path)
    if _is_safetensors(path, start):
        states, extra_keys = split_by_network(_open_safetensors(path))
        return WeightsFile(str(path), "safetensors file", states, extra_keys=extra_keys)
    return torch_file(path, _load_torch(path, start))


def torch_file(path: Path, content: Any) -> WeightsFile:
    """Describe what `read_torch` returned."""
    states, extra_keys = find_networks(content, path=path)
    return WeightsFile(str(path), "PyTorch file", states, extra_keys=extra_keys)


def read_torch(path: Path) -> Any:
    """Read a file of `torch.save`, of tensors and plain values only; its tensors are views of the file.

    Raises:
        CheckpointError: as for `open_file`.
    """
    return _load_torch(path, _read_start(path))


def is_plain_name(name: str) -> bool:
    """Say whether a name that stands in a file can be that of a file in the same folder, on any system."""
    return name not in ("", ".", "..") and {PurePosixPath(name).name, PureWindowsPath(name).name} == {name}


def _read_start(path: Path) -> bytes:
    """Return the first bytes of a file that may hold weights."""
    try:
        with path.open("rb") as file:
            start = file.read(_NUM_START_BYTES)
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
    return start


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Say whether to read a file as safetensors: 8 bytes of length, then JSON; or so it is called, for its sentence."""
    if start[8:9] == b"{":
        return True
    if path.suffix == ".safetensors" and start.startswith((_ZIP_START, _PICKLE_START)):
        raise CheckpointError(f"{path}: is not a safetensors file but one of torch.save; rename it to {path.stem}.pth")
    return path.suffix == ".safetensors"


def _open_safetensors(path: Path) -> State:
    try:
        file = safe_open(path, framework="pt", device="cpu")
        state = {name: _stored(path, file, name) for name in file.keys()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors, it is truncated or damaged ({error}); download or save it again"
        ) from error
    if not state:
        raise CheckpointError(f"{path}: is a safetensors file without any tensor; download or save it again")
    return state


def _stored(path: Path, file: Any, name: str) -> StoredTensor:
    header = file.get_slice(name)
    dtype = SAFETENSORS_DTYPES.get(header.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name} has the type {header.get_dtype()}, which is not read; "
            f"known: {', '.join(SAFETENSORS_DTYPES)}"
        )
    return StoredTensor(torch.Size(header.get_shape()), dtype, functools.partial(file.get_tensor, name))


def _load_torch(path: Path, start: bytes) -> Any:
    if not start.startswith((_ZIP_START, _OLD_TORCH_START)):
        raise _not_by_torch(path, start)
    can_map = start.startswith(_ZIP_START) and _is_stored_plainly(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except pickle.UnpicklingError as error:
        raise _not_only_tensors(path) from error
    except (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise _unreadable(path) from error


def _is_stored_plainly(path: Path) -> bool:
    """Check that a zip file is one of torch.save, and say whether its bytes are there as they are, not compressed."""
    if not zipfile.is_zipfile(path):  # the directory of a zip file stands at its end
        raise CheckpointError(
            f"{path}: ends early ({_size_mib(path)} are there), it is truncated; download or save it again"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _unreadable(path) from error
    files = {member.filename.rpartition("/")[2] for member in members}
    if {"data.pkl", "constants.pkl"} <= files:
        raise CheckpointError(
            f"{path}: is a TorchScript program, which is not run here; "
            "if you trust it, save its weights with: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)"
        )
    if "data.pkl" not in files:
        first = f" (first: {members[0].filename})" if members else ""
        raise CheckpointError(
            f"{path}: is a zip archive of other files{first}, not weights; unpack it and give the file of weights in it"
        )
    return all(member.compress_type == zipfile.ZIP_STORED for member in members)


def _not_by_torch(path: Path, start: bytes) -> CheckpointError:
    """Say what a file is that neither `torch.save` nor safetensors wrote."""
    archive = next((kind for mark, kind in _ARCHIVES.items() if start.startswith(mark)), None)
    archive = "tar" if start[_TAR_MARK] == b"ustar" else archive
    if archive:
        return CheckpointError(f"{path}: is a {archive} archive; unpack it and give the file of weights in it")
    if start.startswith(_PICKLE_START):
        return CheckpointError(
            f"{path}: is a bare Python pickle{_named(path)}, which is refused because reading it can run code; "
            "give a file that torch.save or safetensors wrote"
        )
    return _unreadable(path)


def _not_only_tensors(path: Path) -> CheckpointError:
    if any(name.endswith(".ShardedTensor") for name in pickle_names(path)):
        return CheckpointError(
            f"{path}: is one rank's part of a checkpoint of the official DINOv2 code (FSDP), which cannot be read "
            f"by itself; give the teacher that the same run has saved, {_parents_teacher(path)}"
        )
    return CheckpointError(
        f"{path}: holds Python objects besides tensors{_named(path)}, which are refused because reading them can run "
        "code; give a teacher_checkpoint.pth, or re-save the state dict alone"
    )


def _parents_teacher(path: Path) -> str:
    """Name the teacher file that belongs to a rank file of the official code: of its iteration, or else the newest."""
    number = path.name.partition(".")[0].removeprefix("model_")
    iteration = int(number) if number.isdigit() else "N"
    own = path.parent / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"
    saved = sorted(path.parent.glob("eval/training_*/teacher_checkpoint.pth"), key=os.path.getmtime)
    return str(own if own in saved or not saved else saved[-1])


def _named(path: Path) -> str:
    names = foreign_names(path)
    more = ", ..." if len(names) > _MAX_NAMES else ""
    return f" ({', '.join(names[:_MAX_NAMES])}{more})" if names else ""


def _unreadable(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: is not a file of weights that PyTorch can read, or is truncated ({_size_mib(path)}); "
        "download or save it again"
    )


def _size_mib(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"
