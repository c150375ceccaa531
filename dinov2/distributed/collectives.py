"""Named collectives. Each returns its input (or a list of it) when there is one process.

W is the number of ranks. Tensors on a GPU travel over NCCL, tensors and objects on the CPU over gloo.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dinov2.distributed.environment import get_rank, get_world_size, is_main_process
from dinov2.errors import Dinov2Error, TrainingError


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor of equal shape over ranks; the input is left unchanged, no gradient flows."""
    return _all_reduce(tensor, operation=dist.ReduceOp.SUM)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Average a floating-point tensor over ranks; the input is left unchanged, no gradient flows."""
    return tensor if get_world_size() == 1 else all_reduce_sum(tensor).div_(get_world_size())


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Take the element-wise maximum over ranks; the input is left unchanged, no gradient flows."""
    return _all_reduce(tensor, operation=dist.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, *, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if get_world_size() == 1:
        return tensor
    reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced, op=operation)
    return reduced


def all_gather_cat(tensor: Tensor) -> Tensor:
    """Concatenate tensors of equal shape in rank order along the first axis: [B, ...] to [W * B, ...]."""
    if tensor.ndim == 0:
        raise ValueError("all_gather_cat needs a tensor with at least one axis; unsqueeze it first")
    world_size = get_world_size()
    if world_size == 1:
        return tensor
    gathered = tensor.new_empty((world_size * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.detach().contiguous())
    return gathered


def all_gather_cat_autograd(tensor: Tensor) -> Tensor:
    """Concatenate as `all_gather_cat`; backward gives each rank the sum over ranks of its part's gradient."""
    return tensor if get_world_size() == 1 else _AllGatherCat.apply(tensor)


class _AllGatherCat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        return all_gather_cat(tensor)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient).chunk(get_world_size())[get_rank()]


def all_gather_varlen(tensor: Tensor) -> Tensor:
    """Concatenate in rank order along the first axis, whose length may differ between ranks and be 0.

    The other axes must be equal. Waits for the device, because the lengths are needed on the host.
    """
    world_size = get_world_size()
    if world_size == 1:
        return tensor
    lengths = all_gather_cat(torch.tensor([tensor.shape[0]])).tolist()  # [W]
    padded = tensor.new_zeros((max(lengths), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor.detach()
    parts = all_gather_cat(padded).unflatten(0, (world_size, max(lengths))) if max(lengths) else [padded] * world_size
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def broadcast_object(obj: Any, src: int = 0) -> Any:
    """Send a picklable object from rank `src` to all; what the others pass in is ignored."""
    if get_world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src, device=torch.device("cpu"))
    return box[0]


def broadcast_tensor(tensor: Tensor, src: int = 0) -> Tensor:
    """Overwrite `tensor`, in place, with rank `src`'s tensor of the same shape and type; returns it."""
    if get_world_size() > 1:
        dist.broadcast(tensor, src=src)
    return tensor


def gather_objects(obj: Any) -> list[Any] | None:
    """Collect one picklable object of each rank, in rank order, on rank 0; the others get None."""
    if get_world_size() == 1:
        return [obj]
    box = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(obj, box, dst=0)
    return box


def all_gather_objects(obj: Any) -> list[Any]:
    """Collect one picklable object of each rank, in rank order, on every rank."""
    box: list[Any] = [obj] * get_world_size()
    if get_world_size() > 1:
        dist.all_gather_object(box, obj)
    return box


def barrier() -> None:
    """Wait until all ranks have come here (the hosts, not work queued on their GPUs)."""
    if get_world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def on_every_rank(fn: Callable[[], Any]) -> Any:
    """Run `fn()` on every rank; if it fails on any, raise the first failing rank's error on all together.

    Raises:
        Dinov2Error: as raised by `fn`; errors of other kinds are raised on their own rank alone.
    """
    result: Any = None
    error: Dinov2Error | None = None
    try:
        result = fn()
    except Dinov2Error as caught:
        error = caught
    for found in all_gather_objects(error):
        if found is not None:
            raise found
    return result


def on_main_first(fn: Callable[..., Any], *args: Any) -> Any:
    """Run `fn(*args)` on rank 0 alone and give all ranks its result, or raise its error on all ranks together.

    Raises:
        Dinov2Error: as raised by `fn`, on every rank.
        TrainingError: on the other ranks, when `fn` failed on rank 0 with an error of another kind.
    """
    if get_world_size() == 1:
        return fn(*args)
    result: Any = None
    error: Exception | None = None
    if is_main_process():
        try:
            result = fn(*args)
        except Exception as caught:  # the other ranks wait for the broadcast, whatever went wrong
            error = caught
    shared = error if error is None or isinstance(error, Dinov2Error) else _describe(error)
    result, shared = broadcast_object((result, shared))
    if error is not None:
        raise error
    if shared is not None:
        raise shared
    return result


def _describe(error: Exception) -> TrainingError:
    return TrainingError(f"rank 0 failed: {type(error).__name__}: {error}")
