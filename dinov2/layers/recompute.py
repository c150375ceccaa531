"""Keep a cheap intermediate result out of memory between forward and backward: compute it again when it is needed."""

from collections.abc import Callable

import torch
from torch import Tensor


class recomputed(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801 (used like a function, as its base is)
    """While entered, operations that save `result` for their backward pass save how to make it again instead.

        wide = fc1(x)
        active = gelu(wide)
        with recomputed(active, lambda: gelu(wide)):
            return fc2(active)

    Everything else that is saved meanwhile is kept as it is.

    Args:
        result: tensor that the next operation takes.
        again: makes the same values from tensors that are kept anyway; called once in the backward pass, without
            gradients, and outside autocast.
    """

    def __init__(self, result: Tensor, again: Callable[[], Tensor]) -> None:
        address, shape = result.data_ptr(), result.shape

        def pack(saved: Tensor) -> Tensor | None:
            is_result = saved.data_ptr() == address and saved.shape == shape
            return None if is_result else saved

        def unpack(kept: Tensor | None) -> Tensor:
            if kept is not None:
                return kept
            with torch.no_grad():
                return again()

        super().__init__(pack, unpack)
