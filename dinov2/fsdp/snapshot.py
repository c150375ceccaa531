"""A copy of a rank's state in host memory that is used again for every save, so that training can go on at once."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoint_format import to_plain

_CHUNK_BYTES = 128 << 20  # a power of two: pinned memory is handed out in such sizes
_ALIGNMENT_BYTES = 64
_LEAVES = frozenset((int, float, str, bool, type(None)))


class HostBuffers:
    """Host memory for the tensors of a nested dict, kept from one snapshot to the next; pinned for those of a GPU."""

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._buffers: dict[str, Tensor] = {}

    def snapshot(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Copy nested data; the tensors of the copy are valid until the next snapshot.

        Args:
            data: tensors on any device, plain values, dicts and lists; left unchanged.

        Raises:
            TypeError: a value that a rank file cannot hold.
        """
        sources: dict[str, Tensor] = {}
        shape_of_data = _without_tensors(data, "", sources)
        self._fit(sources)
        for path, source in sources.items():
            self._buffers[path].copy_(source, non_blocking=True)
        for device in {source.device for source in sources.values() if source.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return _with_tensors(shape_of_data, self._buffers)

    def _fit(self, sources: Mapping[str, Tensor]) -> None:
        """Keep the buffers that fit, drop those that are not needed, and allocate what is missing."""
        fitting = {
            path: buffer
            for path, buffer in self._buffers.items()
            if path in sources and (buffer.shape, buffer.dtype) == (sources[path].shape, sources[path].dtype)
        }
        self._buffers = fitting
        missing = {path: source for path, source in sources.items() if path not in fitting}
        chunk, used = None, 0
        for path, source in missing.items():
            if not source.numel():
                self._buffers[path] = torch.empty(source.shape, dtype=source.dtype)
                continue
            if chunk is None or used + source.nbytes > chunk.nbytes or chunk.is_pinned() != source.is_cuda:
                size = max(_CHUNK_BYTES, source.nbytes)
                chunk, used = torch.empty(size, dtype=torch.uint8, pin_memory=source.is_cuda), 0
            # A storage of its own for each tensor: PyTorch saves whole storages.
            storage = chunk.untyped_storage()[used : used + source.nbytes]
            self._buffers[path] = torch.empty(0, dtype=source.dtype).set_(storage, 0, source.shape)
            used += -(-source.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class _Place(str):
    """Stands for the tensor of this path."""


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Copy nested data with a `_Place` for every tensor, and collect the tensors by path."""
    if type(value) in _LEAVES:  # nearly all values: training waits for this
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return _Place(path)
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_without_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    return to_plain(value, path)


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if type(value) is _Place:
        return tensors[value]
    if type(value) is dict:
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_with_tensors(item, tensors) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value
