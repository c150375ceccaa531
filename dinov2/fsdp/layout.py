"""Which part of a parameter this rank holds, and which ranks hold the same.

All parameters are split along their first axis, if at all, into parts of ceil(length / ranks) rows; the last ranks
hold fewer rows or none.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor

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


def local_part(tensor: Tensor) -> Tensor:
    """Return the rows this rank holds; shares memory with a sharded parameter, a plain tensor is returned as it is."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def layout_of(tensor: Tensor) -> Layout:
    """Describe the part of a parameter or buffer that this rank holds; plain tensors are the same on all ranks."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Layout(global_shape=shape, offset=(0,) * len(shape), holders=tuple(range(get_world_size())))
    mesh = tensor.device_mesh
    start, length, same = 0, shape[0], []
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard(0):
            rows = -(-length // mesh.size(axis))
            first = min(rows * mesh.get_local_rank(axis), length)
            start, length = start + first, min(rows, length - first)
            same.append(mesh.get_local_rank(axis))
        else:
            same.append(slice(None))
    holders = mesh.mesh[tuple(same)].flatten().tolist()
    return Layout(global_shape=shape, offset=(start, *(0,) * (len(shape) - 1)), holders=tuple(sorted(holders)))
