"""Multi-head self-attention over packed tokens: each image attends to its own tokens alone.

Shapes: T tokens of all crop sizes, B images of one size with N tokens each, H heads, d features of a head, D = H * d.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.layers.initialisation import init_linear
from dinov2.layers.packing import Layout, split


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    Args:
        dim: features D of a token.
        num_heads: heads H; must divide D.
        qkv_bias: bias of the input matrix.
        proj_bias: bias of the output matrix.
        attention_backend: "auto", "sdpa" or "xformers"; see `attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"embed_dim={dim} is not a multiple of num_heads={num_heads}")
        check_backend(attention_backend)
        self.num_heads = num_heads
        self.attention_backend = attention_backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters."""
        init_linear(self.qkv, generator)
        init_linear(self.proj, generator)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Return [T, D] for packed tokens [T, D]."""
        out = attention(self.qkv(x), layout, num_heads=self.num_heads, backend=self.attention_backend)
        return self.proj(out)


def attention(qkv: Tensor, layout: Layout, *, num_heads: int, backend: str = "auto") -> Tensor:
    """Attend within each image.

    Args:
        qkv: queries, keys and values of packed tokens, [T, 3 * D]; a row holds q, k, v, each head by head.
        layout: images and tokens of each crop size.
        num_heads: heads H.
        backend: "sdpa" runs PyTorch's kernel once for each crop size; "xformers" runs one block-diagonal kernel on
            CUDA; "auto" is "sdpa".

    Returns:
        Attended values [T, D].
    """
    return _BACKENDS[backend](qkv, layout, num_heads)


def check_backend(backend: str) -> None:
    """Raise ConfigError if the backend is unknown or its package is absent."""
    if backend not in _BACKENDS:
        raise ConfigError(f"attention_backend={backend}: must be one of {', '.join(_BACKENDS)}")
    if backend == "xformers":
        _import_xformers()


def _sdpa(qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
    parts = []
    for rows, (num_images, num_tokens) in zip(split(qkv, layout), layout, strict=True):
        q, k, v = rows.view(num_images, num_tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d]
        out = F.scaled_dot_product_attention(q, k, v)
        parts.append(out.transpose(1, 2).reshape(num_images * num_tokens, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _xformers(qkv: Tensor, layout: Layout, num_heads: int) -> Tensor:
    q, k, v = qkv.view(1, qkv.shape[0], 3, num_heads, -1).unbind(2)  # [1, T, H, d]
    out = _import_xformers().memory_efficient_attention(q, k, v, attn_bias=_block_diagonal(layout))
    return out.reshape(qkv.shape[0], -1)


@lru_cache(maxsize=8)
def _block_diagonal(layout: Layout) -> Any:
    """Build the mask of a layout once; every block and step reuses it."""
    mask = _import_xformers().fmha.attn_bias.BlockDiagonalMask
    return mask.from_seqlens([num_tokens for num_images, num_tokens in layout for _ in range(num_images)])


def _import_xformers() -> Any:
    try:
        import xformers.ops
    except ImportError as error:
        raise ConfigError(
            "attention_backend=xformers needs the package xformers; "
            "run pip install 'dinov2-adapt[xformers]' or use attention_backend=sdpa"
        ) from error
    return xformers.ops


_BACKENDS: dict[str, Callable[[Tensor, Layout, int], Tensor]] = {"auto": _sdpa, "sdpa": _sdpa, "xformers": _xformers}
