"""State of a model and its optimisers by parameter name, and how any number of ranks gets it back from a checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.checkpoint_format import StoredPieces
from dinov2.errors import OtherParametersError
from dinov2.fsdp.layout import Layout, layout_of, local_part
from dinov2.fsdp.wrap import reshard


@torch.no_grad()
def load_model_state(model: nn.Module, state: Mapping[str, StoredPieces], *, optional: tuple[str, ...] = ()) -> None:
    """Fill this rank's parts in place; names, shapes and types must be those that were saved.

    Args:
        model: sharded or not; changed in place.
        state: what was saved.
        optional: beginnings of names that one side may have and the other not; the model's stay as they are then.

    Raises:
        OtherParametersError: they are not; the model is left unchanged.
        DamagedCheckpointError: what was read is not what was written; the model is filled in part.
    """
    own = _model_tensors(model)
    missing, unexpected = (
        sorted(name for name in names if not name.startswith(optional))
        for names in (own.keys() - state.keys(), state.keys() - own.keys())
    )
    own = {name: tensor for name, tensor in own.items() if name in state or not name.startswith(optional)}
    if missing or unexpected:
        raise OtherParametersError(
            f"the checkpoint does not fit the model: {len(missing)} missing (first: {missing[0] if missing else 'none'}"
            f"), {len(unexpected)} unexpected (first: {unexpected[0] if unexpected else 'none'})"
        )
    for name, tensor in own.items():
        saved = f"{state[name].global_shape} {state[name].dtype}"
        needed = f"{tuple(tensor.shape)} {tensor.dtype}"
        if saved != needed:
            raise OtherParametersError(
                f"the checkpoint does not fit the model: {name} is {saved}, the model needs {needed}"
            )
    for name, tensor in own.items():
        _fill(local_part(tensor), state[name], layout=layout_of(tensor))


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore what an optimiser knows of each parameter from a checkpoint, in which tensors are `StoredPieces`.

    The settings of groups are restored, too, where the parameters are grouped as they were; else they stay this run's.

    Raises:
        OtherParametersError: the optimiser has others.
        DamagedCheckpointError: what was read is not what was written.
    """
    running = _named_groups(model, optimizer)
    order = [name for group in running for name in group["params"]]
    _check_parameters({name for group in saved["param_groups"] for name in group["params"]}, set(order))
    params = dict(model.named_parameters())
    index = {name: position for position, name in enumerate(order)}
    state = {
        index[name]: {key: _read(value, params[name]) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    groups = saved["param_groups"]
    if [group["params"] for group in groups] == [group["params"] for group in running]:
        running = [now | before for now, before in zip(running, groups, strict=True)]
    groups = [group | {"params": [index[name] for name in group["params"]]} for group in running]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    reshard(model)
    return model.state_dict()


def _named_groups(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return an optimiser's groups with parameter names."""
    reshard(model)
    names = {id(param): name for name, param in model.named_parameters()}
    return [group | {"params": [names[id(param)] for param in group["params"]]} for group in optimizer.param_groups]


def _fill(target: Tensor, source: StoredPieces, *, layout: Layout) -> None:
    """Copy this rank's rows of a stored tensor, verified, into their place."""
    first_row = layout.offset[0] if layout.offset else 0
    num_rows = target.shape[0] if target.ndim else 1
    for row, part in source.parts(first_row, num_rows):
        (target.narrow(0, row, part.shape[0]) if target.ndim else target).copy_(part)


def _check_parameters(saved: set[str], running: set[str]) -> None:
    for names, who in ((saved - running, "the checkpoint's"), (running - saved, "this run's")):
        if names:
            raise OtherParametersError(
                f"the checkpoint's optimiser does not train the same parameters: {min(names)} is {who} alone"
            )


def _read(value: Any, param: Tensor) -> Any:
    """Read what the optimiser keeps for a parameter: split like it where it has its shape, else whole."""
    if not isinstance(value, StoredPieces):
        return value
    if not isinstance(param, DTensor) or value.global_shape != tuple(param.shape):
        return value.read_all().clone()
    local = torch.empty(param.to_local().shape, dtype=value.dtype, device=param.device)
    _fill(local, value, layout=layout_of(param))
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )
