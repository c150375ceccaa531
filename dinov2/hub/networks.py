"""Find the networks in what a file holds: a state dict, bare or under a key, and what else stands beside it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinov2.errors import CheckpointError
from dinov2.hub.stored_tensor import State, StoredTensor

# Keys under which programs keep a state dict. Under other keys a dict of tensors counts only if none of these is there.
_WRAPPERS = (
    "teacher",
    "student",
    "model",
    "state_dict",
    "model_state_dict",
    "model_ema",
    "state_dict_ema",
    "ema",
    "module",
    "network",
    "net",
    "backbone",
    "encoder",
    "target_encoder",
)
_NETWORKS = ("teacher", "student", "model_ema", "gram_teacher")  # parts of a whole training model, as name prefixes
_OWN_RANK_FILE = {"layout", "world_size", "checkpointables"}
_OPTIMIZER_KEYS = ("optimizer", "optimizers", "optimizer_state_dict", "optimizer_states", "optim")


def find_networks(content: Any, *, path: Path) -> tuple[dict[str, State], tuple[str, ...]]:
    """Sort the top level of a file of `torch.save`.

    Args:
        content: as `torch.load` returned it; left unchanged.
        path: for error sentences.

    Returns:
        States by the key under which they stand ("" if they are the file), and the keys of everything else.

    Raises:
        CheckpointError: there is no network in it.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of named tensors")
    if not content:
        raise CheckpointError(f"{path}: holds no tensors")
    if content.keys() >= _OWN_RANK_FILE:
        raise CheckpointError(
            f"{path}: is one rank's part of a training checkpoint; "
            "give it under the name that it was saved with, beside its manifest and the other parts"
        )
    if any(isinstance(value, Tensor) for value in content.values()):
        bare = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        extra_keys = tuple(str(key) for key, value in content.items() if not isinstance(value, Tensor))
        states, others = split_by_network(_to_state(bare, key="", path=path))
        return states, (*others, *extra_keys)
    found = {key: content[key] for key in _WRAPPERS if _has_tensors(content.get(key))}
    found = found or {str(key): value for key, value in content.items() if _is_state(value)}
    if not found:
        raise _no_network(content, path)
    extra_keys = tuple(str(key) for key in content if key not in found)
    states: dict[str, State] = {}
    for key, value in found.items():
        parts, others = split_by_network(_to_state(value, key=key, path=path), key=key)
        states |= parts
        extra_keys = (*others, *extra_keys)
    return states, extra_keys


def split_by_network(state: State, *, key: str = "") -> tuple[dict[str, State], tuple[str, ...]]:
    """Split the state of a whole training model (`teacher.backbone.cls_token`) into its networks.

    Returns:
        States by network, or the whole state under `key` if it is that of one network; and the first parts of names
        (`dino_loss`) that belong to no network.
    """
    networks = [network for network in _NETWORKS if any(name.startswith(f"{network}.") for name in state)]
    if not {"teacher", "student"} & set(networks):
        return {key: state}, ()
    states = {
        network: {name.removeprefix(f"{network}."): t for name, t in state.items() if name.startswith(f"{network}.")}
        for network in networks
    }
    return states, _unique(first for first in (name.partition(".")[0] for name in state) if first not in networks)


def is_optimizer_key(key: str) -> bool:
    """Say whether programs keep the state of an optimiser under a key."""
    return key in _OPTIMIZER_KEYS


def _to_state(tensors: Mapping[str, Any], *, key: str, path: Path) -> State:
    where = f" under '{key}'" if key else ""
    for name, value in tensors.items():
        if type(value) not in (Tensor, nn.Parameter):
            raise _not_a_tensor(path, name, value, where=where)
    return {str(name): StoredTensor.of(tensor.detach()) for name, tensor in tensors.items()}


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _no_network(content: Mapping[str, Any], path: Path) -> CheckpointError:
    optimizer = next((key for key in _OPTIMIZER_KEYS if key in content), None)
    if optimizer or {"state", "param_groups"} <= content.keys():
        where = f" (under '{optimizer}')" if optimizer else ""
        return CheckpointError(
            f"{path}: holds the state of an optimiser{where} but no network; give the file that holds the weights"
        )
    key = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping) and content[key]), None)
    inside = content if key is None else content[key]
    name, value = next(iter(inside.items()))
    return _not_a_tensor(path, name, value, where="" if key is None else f" under '{key}'")


def _not_a_tensor(path: Path, name: str, value: Any, *, where: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: is not a known file of weights; '{name}'{where} is a {type(value).__name__}, not a tensor "
        "(known: a state dict, bare or under 'teacher', 'student', 'model' or 'state_dict')"
    )


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
