"""Put the networks of a checkpoint together into one file, one tensor after another: no GPU, no processes."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dinov2.checkpoint_format import find_checkpoints
from dinov2.errors import CheckpointError, ConfigError
from dinov2.hub.open_weights import open_weights
from dinov2.hub.report import format_count
from dinov2.hub.stored_tensor import State, StoredTensor
from dinov2.hub.weights_file import WeightsFile
from dinov2.hub.write_weights import FILE_SUFFIXES, write_file
from dinov2.logging.progress import track
from dinov2.run.checkpoint_files import find_checkpoint, format_bytes, format_plural

NETWORKS = ("teacher", "student", "all")
_BACKBONE = "backbone."


def consolidate(path: str, output: str, *, network: str, backbone_only: bool, overwrite: bool) -> str:
    """Write the networks of a checkpoint as training writes `teacher_checkpoint.pth`, or as safetensors.

    Args:
        path: checkpoint of a run, its folder (the newest), or other weights that hold networks under these names.
        output: file, .pth or .safetensors.
        network: one of `NETWORKS`.
        backbone_only: without heads, and with the names of the released backbones, bare.
        overwrite: replace a file that is there.

    Returns:
        What was written, a sentence.

    Raises:
        CheckpointError: the checkpoint is damaged or has no such network, or the file cannot be written.
        ConfigError: the output exists, or its ending is unknown.
    """
    target = Path(output).expanduser()
    if target.suffix not in FILE_SUFFIXES:
        raise ConfigError(f"--output {output}: must end in one of {', '.join(FILE_SUFFIXES)}")
    if target.is_dir() or (target.exists() and not overwrite):
        kind = "is a folder; choose a file" if target.is_dir() else "exists; choose another, or pass --overwrite"
        raise ConfigError(f"--output {output}: {kind}")
    place = Path(path).expanduser()
    is_run = place.is_dir() and bool(find_checkpoints(place))
    weights = open_weights("/".join(map(str, find_checkpoint(path))) if is_run else path)
    states = _choose(weights, network)
    if backbone_only:
        states = {key: _backbone(state, path=weights.path, network=key) for key, state in states.items()}
    counted = [tensor for state in states.values() for tensor in state.values()]
    num_bytes = sum(tensor.numel() * tensor.dtype.itemsize for tensor in counted)
    is_bare = len(states) == 1 and (backbone_only or target.suffix == ".safetensors")
    with closing(track(counted, description=target.name)) as steps:
        shown = {key: {name: counted_by(steps, t) for name, t in state.items()} for key, state in states.items()}
        content = {"": shown[next(iter(shown))]} if is_bare else shown
        write_file(target, content, metadata={"format": "pt", "source": Path(weights.path).name})
    names = " and ".join(states) + (" backbone" if backbone_only else "")
    size = f"{format_plural(len(counted), 'tensor')}, {format_count(sum(t.numel() for t in counted))} values"
    return f"{target}: {names} of {weights.path}, {size}, {format_bytes(num_bytes)}"


def _choose(weights: WeightsFile, network: str) -> dict[str, State]:
    if network == "all":
        return weights.states
    if network not in weights.states:
        present = ", ".join(filter(None, weights.states)) or "one network without a name"
        raise CheckpointError(f"{weights.path}: has no {network}; it holds {present}")
    return {network: weights.states[network]}


def _backbone(state: State, *, path: str, network: str) -> State:
    backbone = {name.removeprefix(_BACKBONE): t for name, t in state.items() if name.startswith(_BACKBONE)}
    if not backbone:
        raise CheckpointError(f"{path}: the {network} has no tensors under '{_BACKBONE}'; leave out --backbone-only")
    return backbone


def counted_by(steps: Iterator[object], tensor: StoredTensor) -> StoredTensor:
    """Describe a tensor that moves a progress bar one step on when it is read."""

    def read() -> Tensor:
        next(steps, None)
        return tensor.read()

    return replace(tensor, read=read)
