"""What one rank saves of a model and its optimiser, and how it gets it back.

Parameters and optimiser state go by name. A rank saves its own rows of sharded tensors; `layout` says which they are.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.errors import CheckpointError
from dinov2.fsdp.layout import layout_of, local_part
from dinov2.fsdp.wrap import reshard


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's parts of all parameters and persistent buffers, sharing their memory."""
    reshard(model)
    return {name: local_part(tensor) for name, tensor in model.state_dict().items()}


def model_layout(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe, for each entry of `model_state`, the whole tensor and the place of this rank's part in it."""
    reshard(model)
    return {name: asdict(layout_of(tensor)) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def load_model_state(model: nn.Module, state: Mapping[str, Tensor], *, layout: Mapping[str, Any]) -> None:
    """Fill this rank's parts in place; names, shapes, types and places must be those that were saved.

    Raises:
        CheckpointError: they are not; the model is left unchanged.
    """
    own, own_layout = model_state(model), model_layout(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoint does not fit the model: {len(missing)} missing (first: {missing[0] if missing else 'none'}"
            f"), {len(unexpected)} unexpected (first: {unexpected[0] if unexpected else 'none'})"
        )
    for name, tensor in own.items():
        saved = f"{layout[name]['global_shape']} {state[name].dtype} from {layout[name]['offset']}"
        needed = f"{own_layout[name]['global_shape']} {tensor.dtype} from {own_layout[name]['offset']}"
        if saved != needed or state[name].shape != tensor.shape:
            raise CheckpointError(f"the checkpoint does not fit the model: {name} is {saved}, the model needs {needed}")
    for name, tensor in own.items():
        tensor.copy_(state[name])


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimiser's state, local parts only, and its groups, with parameter names for indices."""
    reshard(model)
    names = {id(param): name for name, param in model.named_parameters()}
    groups = [group | {"params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    state = {
        names[id(param)]: {
            key: local_part(value) if isinstance(value, Tensor) else value for key, value in values.items()
        }
        for param, values in optimizer.state.items()
    }
    return {"state": state, "param_groups": groups}


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore what `optimizer_state` returned.

    Raises:
        CheckpointError: the optimiser has other groups, or other parameters in one.
    """
    running = optimizer_state(model, optimizer)
    _check_groups([g["params"] for g in saved["param_groups"]], [g["params"] for g in running["param_groups"]])
    params = {name: param for name, param in model.named_parameters()}
    order = [name for group in running["param_groups"] for name in group["params"]]
    index = {name: position for position, name in enumerate(order)}
    state = {
        index[name]: {key: _shaped_like(value, params[name]) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    groups = [group | {"params": [index[name] for name in group["params"]]} for group in saved["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_groups(saved: list[list[str]], running: list[list[str]]) -> None:
    if len(saved) != len(running):
        raise CheckpointError(f"the checkpoint's optimiser has {len(saved)} parameter groups, this one {len(running)}")
    for number, (before, now) in enumerate(zip(saved, running, strict=True)):
        if before != now:
            first = next(iter(sorted(set(before) ^ set(now))), "the order")
            raise CheckpointError(f"parameter group {number} of the optimiser is not the saved one: {first} differs")


def _shaped_like(value: Any, param: Tensor) -> Any:
    """Turn a saved local part into what the optimiser keeps for this parameter."""
    if not isinstance(param, DTensor) or not isinstance(value, Tensor) or value.shape != param.to_local().shape:
        return value
    return DTensor.from_local(
        value.to(param.device),
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
