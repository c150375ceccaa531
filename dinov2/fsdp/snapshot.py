"""A copy of a rank's state in host memory that is used again for every save, so that training can go on at once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoint_format import to_plain

_CHUNK_BYTES = 128 << 20  # a power of two: pinned memory is handed out in such sizes
_ALIGNMENT_BYTES = 64
_LEAVES = frozenset((int, float, str, bool, type(None)))

Keys = tuple[str | int, ...]  # that lead to a tensor in nested data


class HostBuffers:
    """Host memory for tensors, kept from one snapshot to the next; pinned for those of a GPU."""

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._buffers: dict[Keys, Tensor] = {}

    @torch.no_grad()
    def snapshot(self, data: Mapping[str, Any], tensors: Mapping[Keys, Tensor]) -> dict[str, Any]:
        """Copy nested data; the tensors of the copy are valid until the next snapshot.

        Args:
            data: tensors on any device, plain values, dicts and lists; left unchanged.
            tensors: further ones, on any device, by the keys of dicts in `data` that lead to their place in the copy.
                They need not be looked for, which takes long where there are many.

        Raises:
            TypeError: a value that a rank file cannot hold.
        """
        sources: dict[Keys, Tensor] = {}
        shape_of_data = _without_tensors(data, (), sources)
        sources |= tensors
        if not self._fit(sources):
            self._allocate(sources)
        if sources:
            torch._foreach_copy_([self._buffers[keys] for keys in sources], list(sources.values()), non_blocking=True)
        for device in {source.device for source in sources.values() if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        copy = _with_tensors(shape_of_data, self._buffers)
        for keys in tensors:
            holder = copy
            for key in keys[:-1]:
                holder = holder[key]
            holder[keys[-1]] = self._buffers[keys]
        return copy

    def _fit(self, sources: Mapping[Keys, Tensor]) -> bool:
        """Say whether the buffers are those that these tensors need."""
        return sources.keys() == self._buffers.keys() and all(
            _fits(self._buffers[keys], source) for keys, source in sources.items()
        )

    def _allocate(self, sources: Mapping[Keys, Tensor]) -> None:
        """Keep the buffers that fit, drop those that are not needed, and allocate what is missing."""
        self._buffers = {
            keys: buffer for keys, buffer in self._buffers.items() if keys in sources and _fits(buffer, sources[keys])
        }
        chunk, used = None, 0
        for keys, source in sources.items():
            if keys in self._buffers:
                continue
            if not source.numel():
                self._buffers[keys] = torch.empty(source.shape, dtype=source.dtype)
                continue
            if chunk is None or used + source.nbytes > chunk.nbytes or chunk.is_pinned() != source.is_cuda:
                size = max(_CHUNK_BYTES, source.nbytes)
                chunk, used = torch.empty(size, dtype=torch.uint8, pin_memory=source.is_cuda), 0
            # A storage of its own for each tensor: PyTorch saves whole storages.
            storage = chunk.untyped_storage()[used : used + source.nbytes]
            self._buffers[keys] = torch.empty(0, dtype=source.dtype).set_(storage, 0, source.shape)
            used += -(-source.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _fits(buffer: Tensor, source: Tensor) -> bool:
    return buffer.shape == source.shape and buffer.dtype == source.dtype


class _Place(tuple):
    """Stands for the tensor that these keys lead to."""


def _without_tensors(value: Any, keys: Keys, tensors: dict[Keys, Tensor]) -> Any:
    """Copy nested data with a `_Place` for every tensor, and collect the tensors by the keys that lead to them."""
    if type(value) in _LEAVES:  # nearly all values: training waits for this
        return value
    if isinstance(value, Tensor):
        tensors[keys] = value
        return _Place(keys)
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, (*keys, key), tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_without_tensors(item, (*keys, index), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return to_plain(value, "/".join(map(str, keys)))


def _with_tensors(value: Any, tensors: Mapping[Keys, Tensor]) -> Any:
    if type(value) is _Place:
        return tensors[tuple(value)]
    if type(value) is dict:
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_with_tensors(item, tensors) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
