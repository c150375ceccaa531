"""Sharding of a module over the ranks with FSDP2, and reading and writing sharded parameters.

After `shard`, parameters are DTensors split along their first axis. A forward pass gathers them; with strategies that
keep the gathered copy (NO_SHARD, SHARD_GRAD_OP) a forward without gradients leaves plain copies registered, and what
is written to those is lost. `local_tensors` of a module and all other functions here reshard first.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dinov2.distributed import (
    all_gather_objects,
    broadcast_object,
    broadcast_tensor,
    get_device,
    get_local_world_size,
    get_world_size,
    is_main_process,
    on_main_first,
)
from dinov2.errors import CheckpointError, ConfigError
from dinov2.fsdp.layout import layout_of, local_part

STRATEGIES = ("NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD")


def shard(
    module: nn.Module,
    *,
    strategy: str,
    param_dtype: torch.dtype = torch.float32,
    reduce_dtype: torch.dtype = torch.float32,
    hybrid_shard_size: int | None = None,
    forward_methods: Sequence[str] = (),
) -> nn.Module:
    """Shard a module over all ranks, in place, and move it to this process's device.

    With one process the module is returned untouched. Initial values, if there are any yet, must be equal on all ranks.
    Gradients become means over ranks. Parameters that are not floating point, and those without axes, stay whole on
    every rank.

    Args:
        module: a module whose `forward` is called (not a ModuleDict); parameters on the CPU, initialised, or on the
            meta device, to be given memory by `to_empty` and values by `load_full_state_dict` afterwards. If it has
            a method `shard_units() -> list[nn.Module]`, each unit is gathered on its own.
        strategy: NO_SHARD keeps everything everywhere; SHARD_GRAD_OP splits parameters, gradients and optimiser state
            and keeps the gathered parameters from forward to backward; FULL_SHARD gathers again for backward;
            HYBRID_SHARD is FULL_SHARD within groups of ranks and replicates between the groups.
        param_dtype: type of the gathered parameters and of floating-point inputs of `forward`; the sharded ones keep
            their own.
        reduce_dtype: type in which gradients are averaged.
        hybrid_shard_size: ranks of a group under HYBRID_SHARD; None takes the ranks of a node.
        forward_methods: further methods that use parameters and are called from outside `forward`.

    Returns:
        The same module.

    Raises:
        ConfigError: the group size does not divide the number of ranks.
        ValueError: unknown strategy, or a trainable parameter without axes.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy}: must be one of {', '.join(STRATEGIES)}")
    if get_world_size() == 1:
        return module
    device = get_device()
    whole = _unsplittable_parameters(module)
    policy = MixedPrecisionPolicy(
        param_dtype=None if param_dtype == torch.float32 else param_dtype, reduce_dtype=reduce_dtype
    )
    options = {
        "mesh": _mesh(group.WORLD, device.type, _mesh_shape(strategy, hybrid_shard_size)),
        "reshard_after_forward": strategy in ("FULL_SHARD", "HYBRID_SHARD"),
        "mp_policy": policy,
        "ignored_params": whole,
    }
    units = module.shard_units() if hasattr(module, "shard_units") else []
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(module, **options)
    for param in whole:
        if not param.is_meta:
            param.data = param.data.to(device)
    for name in forward_methods:
        register_fsdp_forward_method(module, name)
    return module


def reshard(module: nn.Module) -> None:
    """Drop gathered copies, so that `parameters()` gives the sharded ones; call it before writing to parameters."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@torch.no_grad()
def local_tensors(params: Sequence[Tensor] | nn.Module) -> list[Tensor]:
    """Return the parts of parameters that this rank holds, sharing their memory.

    Args:
        params: parameters of resharded modules, or a module, which is resharded first.
    """
    if isinstance(params, nn.Module):
        reshard(params)
        params = list(params.parameters())
    return [local_part(param) for param in params]


def local_tensor_pairs(
    target: nn.Module, source: nn.Module, *, source_only: Set[str] = frozenset()
) -> tuple[list[Tensor], list[Tensor]]:
    """Return this rank's floating-point parameters of two equal modules, ready for `torch._foreach_lerp_`.

    Both modules are resharded first, so what is written to the target's parts is seen by its next forward pass.

    Args:
        target: module that is to be changed.
        source: module like it.
        source_only: names of parameters that the source has besides; they are left out.

    Raises:
        ValueError: the modules do not have the same parameter names.
    """
    reshard(target)
    reshard(source)
    target_params, source_params = dict(target.named_parameters()), dict(source.named_parameters())
    if different := target_params.keys() ^ (source_params.keys() - source_only):
        raise ValueError(f"modules differ in {sorted(different)[0]}")
    names = [name for name, param in target_params.items() if param.is_floating_point()]
    return local_tensors([target_params[name] for name in names]), local_tensors([source_params[n] for n in names])


@torch.no_grad()
def gathered(param: Tensor) -> Tensor:
    """Return a parameter of a resharded module whole, on all ranks; all ranks must call it. Cost: one all-gather."""
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


@torch.no_grad()
def full_state_dict(module: nn.Module) -> dict[str, Tensor] | None:
    """Gather the state dict on rank 0, on the CPU, one tensor at a time; the other ranks get None.

    All ranks must call it. The tensors are copies.
    """
    reshard(module)
    gathered: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main_process():
            gathered[name] = whole.to("cpu", copy=True)
    return gathered if is_main_process() else None


@torch.no_grad()
def copy_local_state(target: nn.Module, source: nn.Module) -> None:
    """Copy all parameters and persistent buffers of an equal module, sharded alike; each rank copies what it holds."""
    reshard(target)
    reshard(source)
    values = source.state_dict()
    for name, tensor in target.state_dict().items():
        local_part(tensor).copy_(local_part(values[name]))


@torch.no_grad()
def load_full_state_dict(
    module: nn.Module,
    state: Mapping[str, Any] | None,
    *,
    read: Callable[[Any], Tensor] = lambda tensor: tensor,
    is_partial: bool = False,
) -> None:
    """Fill a module, sharded or not, from whole tensors; all ranks must call it.

    Args:
        module: changed in place.
        state: whole tensors for every name, or what stands for them and has their `shape`; if any rank passes None,
            rank 0's are sent to all, one at a time.
        read: makes the tensor from an entry of `state`; called once for each, when its turn comes.
        is_partial: what `state` lacks stays as it is; else it must have every name.

    Raises:
        CheckpointError: names or shapes differ, or `read` failed on rank 0; on all ranks together.
    """
    reshard(module)
    own = module.state_dict()
    from_main = any(all_gather_objects(state is None))
    shapes = None if state is None else {name: tuple(tensor.shape) for name, tensor in state.items()}
    shapes = broadcast_object(shapes)
    if is_partial and shapes is not None:
        own = {name: tensor for name, tensor in own.items() if name in shapes}
    _check_same(own, shapes)
    for name, tensor in own.items():
        if from_main:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            on_main_first(lambda whole=whole, name=name: _copy(read(state[name]), whole))
            broadcast_tensor(whole)
        else:
            whole = read(state[name])
        part = local_part(tensor)
        first = layout_of(tensor).offset[0] if tensor.ndim else 0
        part.copy_(whole.narrow(0, first, part.shape[0]) if tensor.ndim else whole)


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def _check_same(own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None) -> None:
    if shapes is None:
        raise ValueError("rank 0 must pass a state dict")
    missing, unexpected = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"weights do not fit the model: {len(missing)} missing (first: {missing[0] if missing else 'none'}), "
            f"{len(unexpected)} unexpected (first: {unexpected[0] if unexpected else 'none'})"
        )
    for name, tensor in own.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"weights do not fit the model: {name} has shape {list(shapes[name])}, "
                f"the model needs {list(tensor.shape)}"
            )


def _unsplittable_parameters(module: nn.Module) -> set[nn.Parameter]:
    """Parameters that FSDP2 cannot split; they receive no gradient, so they stay equal on all ranks."""
    whole = set()
    for name, param in module.named_parameters():
        if param.is_floating_point() and param.ndim > 0:
            continue
        if param.requires_grad:
            raise ValueError(f"parameter {name} has no axes; give it shape [1] so that its gradient can be averaged")
        whole.add(param)
    return whole


def _mesh_shape(strategy: str, hybrid_shard_size: int | None) -> tuple[int, ...]:
    """(ranks,) to shard over all, or (groups, ranks of a group) to replicate between groups."""
    world_size = get_world_size()
    if strategy == "NO_SHARD":
        return (world_size, 1)
    if strategy != "HYBRID_SHARD":
        return (world_size,)
    sizes = all_gather_objects(get_local_world_size() if hybrid_shard_size is None else hybrid_shard_size)
    if len(set(sizes)) > 1 or world_size % sizes[0]:
        raise ConfigError(
            f"compute_precision.hybrid_shard_size={hybrid_shard_size}: {world_size} processes cannot be split into "
            f"groups of {' and '.join(str(size) for size in sorted(set(sizes)))}; choose a divisor of {world_size}"
        )
    return (world_size // sizes[0], sizes[0])


@cache
def _mesh(world: ProcessGroup, device_type: str, shape: tuple[int, ...]) -> DeviceMesh:
    """One mesh per process group and shape: every new mesh would make new communicators."""
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    return init_device_mesh(device_type, shape, mesh_dim_names=names)
