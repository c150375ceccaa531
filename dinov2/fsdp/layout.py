"""Which part of a parameter this rank holds, and which ranks hold the same.

All parameters are split along their first axis, if at all, into parts of ceil(length / ranks) rows; the last ranks
hold fewer rows or none.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from dinov2.distributed import get_world_size


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Place of a local tensor within the whole one."""

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]  # of the local part's first element
    holders: tuple[int, ...]  # ranks that hold this same part, this one among them, in ascending order

    @property
    def num_replicas(self) -> int:
        """Number of ranks that hold this same part."""
        return len(self.holders)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """Return the rows this rank holds; shares memory with a sharded parameter, a plain tensor is returned as it is."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def layout_of(tensor: Tensor) -> Layout:
    """Describe the part of a parameter or buffer that this rank holds; plain tensors are the same on all ranks."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Layout(global_shape=shape, offset=(0,) * len(shape), holders=_all_ranks(get_world_size()))
    splits, holders = _splits(tensor.device_mesh, tensor.placements)
    start, length = 0, shape[0]
    for size, coordinate in splits:
        rows = -(-length // size)
        first = min(rows * coordinate, length)
        start, length = start + first, min(rows, length - first)
    return Layout(global_shape=shape, offset=(start, *(0,) * (len(shape) - 1)), holders=holders)


@cache
def _all_ranks(world_size: int) -> tuple[int, ...]:
    return tuple(range(world_size))


@cache
def _splits(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> tuple[list[tuple[int, int]], tuple[int, ...]]:
    """Return, for each axis of the mesh that splits rows, its size and this rank's place on it; and the holders."""
    splits, same = [], []
    for axis, placement in enumerate(placements):
        if placement.is_shard(0):
            splits.append((mesh.size(axis), mesh.get_local_rank(axis)))
            same.append(mesh.get_local_rank(axis))
        else:
            same.append(slice(None))
    return splits, tuple(sorted(mesh.mesh[tuple(same)].flatten().tolist()))
