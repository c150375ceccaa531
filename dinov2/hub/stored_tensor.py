"""A tensor of a file, known by shape and type before it is read: loading is planned first, then done one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """Shape and type of a tensor, and how to get its values.

    `read()` returns a CPU tensor of that shape and type. It may be a view of a file on disk (pages of the file, no
    memory of its own) and is not to be changed in place. Each call reads again, nothing is kept.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "StoredTensor":
        """Wrap a tensor that is in memory, or a view of a file."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    def map(
        self, shape: Sequence[int], function: Callable[[Tensor], Tensor], *, dtype: torch.dtype | None = None
    ) -> "StoredTensor":
        """Describe the tensor that `function` makes of this one; the function runs when that one is read.

        Args:
            shape: of the result.
            function: takes this tensor, leaves it unchanged.
            dtype: of the result; None: the type of this one.
        """
        mapped_shape, mapped_dtype = torch.Size(shape), dtype or self.dtype

        def read() -> Tensor:
            tensor = function(self.read())
            assert (tensor.shape, tensor.dtype) == (mapped_shape, mapped_dtype), (
                f"planned {tuple(mapped_shape)} {mapped_dtype}, made {tuple(tensor.shape)} {tensor.dtype}"
            )
            return tensor

        return StoredTensor(mapped_shape, mapped_dtype, read)

    def numel(self) -> int:
        """Count the elements."""
        return self.shape.numel()


State = dict[str, StoredTensor]
"""A state dict that has not been read: names to stored tensors."""
