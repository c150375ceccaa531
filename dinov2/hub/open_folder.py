"""Open a folder that a library saved a model in, or the index of a model that is spread over several files."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dinov2.checkpoint_format import find_checkpoints
from dinov2.errors import CheckpointError
from dinov2.hub.networks import split_by_network
from dinov2.hub.open_dcp import find_dcp_folders, is_dcp_folder, open_dcp
from dinov2.hub.open_file import is_plain_name, open_file
from dinov2.hub.stored_tensor import State
from dinov2.hub.weights_file import WeightsFile

INDEX_SUFFIX = ".index.json"
_CONFIG = "config.json"
_WEIGHTS = (  # in this order
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_MAX_NAMES = 3


def open_folder(folder: Path) -> WeightsFile:
    """Open a model folder: `config.json` and one of `model.safetensors`, `pytorch_model.bin`, whole or with an index;
    or a checkpoint folder of torch.distributed.checkpoint.

    Raises:
        CheckpointError: the folder holds no such file, or it cannot be read.
    """
    name = _weights_in(folder)
    if name is None and is_dcp_folder(folder):
        return open_dcp(folder)
    if name is None:
        raise _no_weights(folder)
    weights = open_index(folder / name) if name.endswith(INDEX_SUFFIX) else open_file(folder / name)
    config = _read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else None
    kind = "model folder" if config is None else "Hugging Face folder" if "model_type" in config else "timm folder"
    return replace(weights, path=str(folder), kind=kind, config=config)


def holds_model(folder: Path) -> bool:
    """Say whether `open_folder` would find weights in a folder."""
    return _weights_in(folder) is not None


def open_index(path: Path) -> WeightsFile:
    """Open a model by the index of its files, `model.safetensors.index.json` or `pytorch_model.bin.index.json`.

    Raises:
        CheckpointError: the index is no such index, a file of it is missing, or lacks a tensor that it should hold.
    """
    places = _read_json(path).get("weight_map")
    if not isinstance(places, Mapping) or not places or not all(isinstance(part, str) for part in places.values()):
        raise CheckpointError(f"{path}: is not an index of weights; it needs a 'weight_map' of tensor names to files")
    parts = sorted(set(places.values()))
    for part in parts:
        if not is_plain_name(part):
            raise CheckpointError(f"{path}: names the file '{part}', which is not in its own folder; it is not opened")
    missing = [part for part in parts if not (path.parent / part).is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of the {len(parts)} files that it lists are not in its folder "
            f"(missing: {_listed(missing)}); download them too"
        )
    opened = {part: _whole_state(path.parent / part) for part in parts}
    for part, state in opened.items():
        absent = sorted(name for name, place in places.items() if place == part and name not in state)
        if absent:
            raise CheckpointError(
                f"{path.parent / part}: lacks {len(absent)} tensors that {path.name} expects in it "
                f"(first: {absent[0]}); the two are not of one model, download both again"
            )
    states, extra_keys = split_by_network({name: opened[part][name] for name, part in places.items()})
    kind = "safetensors file" if path.name.endswith(f".safetensors{INDEX_SUFFIX}") else "PyTorch file"
    return WeightsFile(str(path), f"{kind} in {_parts(len(parts))}", states, extra_keys=extra_keys)


def _weights_in(folder: Path) -> str | None:
    return next((name for name in _WEIGHTS if (folder / name).is_file()), None)


def _whole_state(path: Path) -> State:
    states = open_file(path).states
    if list(states) != [""]:
        raise CheckpointError(f"{path}: is not a part of a model: it holds {_listed(states)} instead of tensors")
    return states[""]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file of weights") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); download or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object; download or save it again")
    return content


def _no_weights(folder: Path) -> CheckpointError:
    if checkpoints := find_checkpoints(folder):
        return CheckpointError(
            f"{folder}: is the folder of a training run; give one of its checkpoints, "
            f"the newest is {folder / checkpoints[-1]}"
        )
    if dcp_folders := find_dcp_folders(folder):
        return CheckpointError(
            f"{folder}: is a folder of checkpoints of the official DINOv3 code; give one, the newest is "
            f"{dcp_folders[-1]}"
        )
    if files := sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(_SUFFIXES)):
        return CheckpointError(f"{folder}: is a folder; give the file of weights in it: {_listed(files)}")
    return CheckpointError(
        f"{folder}: is a folder without weights; a model folder holds {_CONFIG} and model.safetensors "
        "(or pytorch_model.bin)"
    )


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")


def _parts(count: int) -> str:
    return f"{count} part" if count == 1 else f"{count} parts"
