"""Keep intermediate results out of memory between forward and backward: compute them again when they are needed.

Source: Chen et al. 2016, arXiv:1604.06174; which results are kept by `selective`: DINOv3's selective checkpointing.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

Recomputation = Literal["none", "selective", "full"]

_within = ContextVar("_within", default=False)  # a function whose results are computed again as a whole
# Products and attention, whose results `selective` keeps, by their names in all their forms.
_KEPT = ("mm", "addmm", "bmm", "_scaled_mm", "linear", "_efficient_attention_forward")
_KEPT_START = "_scaled_dot_product_"


def checkpointed(function: Callable[..., Tensor], *args: Any, recomputation: Recomputation) -> Tensor:
    """Call a function, and keep less for its backward pass than autograd would; values and gradients are the same.

    Args:
        function: of the arguments; what it draws at random is drawn alike the second time.
        args: kept until the backward pass.
        recomputation: none: nothing is different; selective: the results of matrix products and attention are kept,
            and all between them is computed again; full: only the arguments are kept.
    """
    if recomputation == "none" or not torch.is_grad_enabled():
        return function(*args)
    if torch.compiler.is_compiling():  # a compiler follows none but its own contexts, made where they are passed on
        if recomputation == "full":
            return checkpoint(function, *args, use_reentrant=False)
        selective = partial(create_selective_checkpoint_contexts, _keep_products)
        return checkpoint(function, *args, use_reentrant=False, context_fn=selective)
    contexts = noop_context_fn
    if recomputation == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
    return checkpoint(function, *args, use_reentrant=False, context_fn=partial(_noting, contexts))


def recomputed(result: Tensor, again: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """While entered, operations that save `result` for their backward pass save how to make it again instead.

        wide = fc1(x)
        active = gelu(wide)
        with recomputed(active, lambda: gelu(wide)):
            return fc2(active)

    Everything else that is saved meanwhile is kept as it is. Within `checkpointed` and compiled functions, which have
    their own ways, it does nothing.

    Args:
        result: tensor that the next operation takes.
        again: makes the same values from tensors that are kept anyway; called once in the backward pass, without
            gradients, and outside autocast.
    """
    if torch.compiler.is_compiling() or _within.get():
        return nullcontext()

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.is_set_to(result) else saved

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return again()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decide what becomes of an operation's results."""
    name = operation.overloadpacket.__name__
    is_kept = name in _KEPT or name.startswith(_KEPT_START)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _noting(make: Callable[[], tuple[Any, Any]]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Make the contexts of the first and of the second time, in which `recomputed` does nothing."""
    first, second = make()
    return _noted(first), _noted(second)


@contextmanager
def _noted(context: AbstractContextManager[Any]) -> Iterator[None]:
    token = _within.set(True)
    try:
        with context:
            yield
    finally:
        _within.reset(token)
