"""Digests of what features depend on: of weights, dataset, preprocessing and number format, each on its own.

The weights are those in the network, after loading: whatever file, folder or name they came from, by whatever key. The
dataset counts by its string, its labels, groups and columns, and by path, size and time of change of each file. Images
that are no files count by their number and by the pixels of a few of them.
"""

import json
import os
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import nn

from dinov2.data.index import counted
from dinov2.errors import Dinov2Error

_NUM_PROBES = 16  # images whose pixels are looked at, where there are no files


def digest_of_settings(settings: Any) -> str:
    """Hash what JSON can hold, other values by their text."""
    return sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_network(model: nn.Module) -> str:
    """Hash names, types, shapes and values of all that a network saves."""
    state = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest_of_dataset(dataset: Any, *, name: str) -> str:
    """Hash what tells whether a dataset is still the same; no image that is a file is read.

    Args:
        dataset: items (image, target).
        name: its string, which holds its options.

    Cost: one look at each file.
    """
    state = sha256(f"{name} {len(dataset)} ".encode("utf-8", "surrogateescape"))
    for label, array in (
        ("targets", _call(dataset, "get_targets")),
        ("groups", _call(dataset, "groups")),
        ("class names", list(getattr(dataset, "class_names", None) or [])),
        *sorted(columns_of(dataset).items()),
    ):
        state.update(f"{label} ".encode())
        if array is not None:
            _add_array(state, np.asarray(array))
    for part in getattr(dataset, "parts", [dataset]):
        state.update(f"at most {getattr(part, 'max_image_pixels', None)} pixels ".encode())  # larger ones are skipped
        _add_images(state, part)
    return state.hexdigest()


def columns_of(dataset: Any) -> dict[str, np.ndarray]:
    """Look all columns of a dataset up, [n] each; a class of the user's own may have none, or paths alone."""
    if hasattr(dataset, "metadata"):
        metadata = dataset.metadata()
        return {name: np.asarray(metadata[name]) for name in metadata}
    if hasattr(dataset, "path"):
        return {"path": np.array([str(dataset.path(index)) for index in range(len(dataset))])}
    return {}


def _call(dataset: Any, method: str) -> Any:
    return getattr(dataset, method)() if hasattr(dataset, method) else None


def _add_array(state: Any, array: np.ndarray) -> None:
    if array.dtype.kind in "biuf":
        state.update(f"{array.dtype} {list(array.shape)} ".encode())
        state.update(np.ascontiguousarray(array).data)
        return
    for text in array.astype(str).tolist():
        state.update(text.encode("utf-8", "surrogateescape") + b"\0")


def _add_images(state: Any, dataset: Any) -> None:
    """Add size and time of change of the files; the pixels of some images, if not all are in files."""
    seen: set[str] = set()
    are_files = True
    for file in counted(_files(dataset), description="looking at the files of the features"):
        if file not in seen:
            seen.add(file)
            found = _stat(file)
            are_files = are_files and found is not None
            state.update(f"{file} {found} ".encode("utf-8", "surrogateescape"))
    if not are_files or not seen:
        count = len(dataset)
        for index in sorted({number * count // _NUM_PROBES for number in range(_NUM_PROBES)} if count else ()):
            _add_pixels(state, dataset, index)


def _files(dataset: Any) -> Iterable[str]:
    """Name the files of all images; an image may have several (`image_files`), and a file several images (`file`)."""
    for index in range(len(dataset)):
        if hasattr(dataset, "image_files"):
            yield from dataset.image_files(index)
        elif hasattr(dataset, "file"):
            yield dataset.file(index)
        elif hasattr(dataset, "path"):
            yield str(dataset.path(index))


def _stat(path: str) -> tuple[int, int] | None:
    """Size in bytes and time of change, ns; of the archive for a member of one, None if there is no such file."""
    while path:
        try:
            found = os.stat(path)
            return (found.st_size, found.st_mtime_ns) if not os.path.isdir(path) else None
        except NotADirectoryError:
            path = os.path.dirname(path)
        except FileNotFoundError:
            parent = os.path.dirname(path)
            if parent == path:
                return None
            path = parent
        except OSError:
            return None
    return None


def _add_pixels(state: Any, dataset: Any, index: int) -> None:
    try:
        image = dataset[index][0]
    except Dinov2Error as error:
        state.update(str(error).encode())
        return
    _add_array(state, np.asarray(image.float() if isinstance(image, torch.Tensor) else image))
