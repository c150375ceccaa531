"""Compilation of blocks: torch.compile makes kernels for what a block computes, where it can on this machine.

Only the arithmetic of a block is compiled. Its call, with the hooks that gather sharded weights, its modules and the
names of its parameters stay as they are, and so do the random numbers that are drawn.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.layers.block import Block
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov2.train")

_Compute = Callable[..., Tensor]
_MOST_GRAPHS = 256  # one for each rate of stochastic depth and each set of crops; PyTorch's own limit of all sums
_LONGEST_REASON = 300  # characters


def run_compiled(backbones: Iterable[DinoVisionTransformer], *, mode: str, try_out: Callable[[_Compute], None]) -> bool:
    """Let the blocks of backbones run compiled, if that works on all ranks, which call this together.

    Args:
        backbones: changed in place, sharded or not.
        mode: of torch.compile.
        try_out: computes with what it is given, as training will, on something else than the backbones. Whatever it
            raises is the reason, in one warning, why the blocks stay uncompiled.

    Returns:
        Whether they run compiled.
    """
    reason = None
    compute = None
    with _keeping_random_numbers():
        try:
            compute = _compiled(mode)
            try_out(compute)
        except Exception as error:  # compilers raise what they like; the run is as good without them
            reason = _in_one_line(error)
    reasons = all_gather_objects(reason)
    failed = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if failed:
        if is_main_process():
            logger.warning(
                "train.compile=true: torch.compile does not work on rank %s, so that no block is compiled: %s; the run "
                "goes on without; set train.compile=false, or install what is missing",
                ", ".join(map(str, failed)),
                reasons[failed[0]],
            )
        return False
    for backbone in backbones:
        backbone.compute_blocks_by(compute)
    torch._dynamo.config.suppress_errors = True  # from here on, what cannot be compiled runs as it is
    return True


def try_block(
    backbone: DinoVisionTransformer, compute: _Compute, crops: Sequence[Tensor], *, dtype: torch.dtype
) -> None:
    """Pass crops through one block of a backbone and, in training mode, back.

    Three times: CUDA graphs are recorded in the second pass and replayed in the third.

    Args:
        backbone: on the meta device; all but its last block are taken out, and it gets memory and values.
        compute: takes the place of `Block.compute`.
        crops: of each size [B, C, height, width], on the device to be used.
        dtype: of autocast; float32: none.
    """
    device = crops[0].device
    del backbone.blocks[:-1]
    backbone.depth = 1
    backbone.to_empty(device=device)
    backbone.init_weights()
    backbone.compute_blocks_by(compute)
    for _ in range(3):
        with (
            torch.set_grad_enabled(backbone.training),
            torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            total = sum(tokens["x_prenorm"].float().sum() for tokens in backbone(list(crops), is_training=True))
        if total.requires_grad:
            total.backward()
        total.item()  # waits for the device
        backbone.zero_grad(set_to_none=True)


def _compiled(mode: str) -> _Compute:
    """Prepare `Block.compute` to be compiled for each shape when it first comes.

    A graph for shapes that vary would be used for those of training too once an evaluation has made it, and a resumed
    run would round otherwise than one that was not interrupted.
    """
    from torch import _dynamo, _inductor  # they take seconds, and most runs do without

    _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, _MOST_GRAPHS)
    options = _inductor.list_mode_options(mode) | {"fallback_random": True}  # draw what an uncompiled run draws
    compiled = torch.compile(Block.compute, dynamic=False, options=options)
    if not options.get("triton.cudagraphs"):
        return compiled
    return lambda *args: compiled(*args).clone()  # the next block's graph may take the memory that this one's returns


def _keeping_random_numbers() -> AbstractContextManager[None]:
    """Leave the generators as they are found."""
    is_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if is_cuda else [])


def _in_one_line(error: Exception) -> str:
    """Name an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_LONGEST_REASON]
