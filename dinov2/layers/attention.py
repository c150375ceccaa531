"""Multi-head self-attention over packed tokens: each image attends to its own tokens alone.

Shapes: T tokens of all crop sizes, B images of one size with N tokens each, H heads, d features of a head, D = H * d.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import ConfigError
from dinov2.layers.initialisation import init_linear
from dinov2.layers.packing import Layout, split, unpack
from dinov2.layers.rope import Rotation, rotate

Rotations = Sequence[Rotation]  # one for each crop size


class LinearKMaskedBias(nn.Linear):
    """Linear map to queries, keys and values whose keys have no bias (softmax would not see it).

    The bias keeps its full length, and a buffer of ones and zeros takes the place of the keys out, as in the released
    weights of DINOv3.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("bias_mask", torch.empty_like(self.bias, requires_grad=False))
        self.init_mask()

    def init_mask(self) -> None:
        """Set the mask: 1 for queries and values, 0 for keys."""
        nn.init.ones_(self.bias_mask)
        nn.init.zeros_(self.bias_mask.chunk(3)[1])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask.to(self.bias.dtype))


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    Args:
        dim: features D of a token.
        num_heads: heads H; must divide D.
        qkv_bias: bias of the input matrix.
        proj_bias: bias of the output matrix.
        attention_backend: "auto", "sdpa" or "xformers"; see `attention`.
        mask_k_bias: leave the keys without bias; without effect where `qkv_bias` is false.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_backend: str = "auto",
        mask_k_bias: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"embed_dim={dim} is not a multiple of num_heads={num_heads}")
        check_backend(attention_backend)
        self.num_heads = num_heads
        self.attention_backend = attention_backend
        masked = mask_k_bias and qkv_bias
        self.qkv = LinearKMaskedBias(dim, 3 * dim) if masked else nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all parameters and buffers."""
        init_linear(self.qkv, generator)
        if isinstance(self.qkv, LinearKMaskedBias):
            self.qkv.init_mask()
        init_linear(self.proj, generator)

    def forward(self, x: Tensor, layout: Layout, rotations: Rotations | None = None) -> Tensor:
        """Return [T, D] for packed tokens [T, D]; `rotations` turn queries and keys, one for each crop size."""
        out = attention(
            self.qkv(x), layout, num_heads=self.num_heads, backend=self.attention_backend, rotations=rotations
        )
        return self.proj(out)

    def first_token_weights(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Return the weights with which the first token of an image takes up the tokens, for pictures.

        The kernels of `attention` never form them; here they are computed plainly, in float32.

        Args:
            x: tokens [B, N, D] of images of one size, normalised as for `forward`.
            rotation: turns queries and keys; None for learned positions.

        Returns:
            Softmax of the scaled products of the first query with all keys, [B, H, N]; rows sum to 1.
        """
        queries_keys = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))[:, :, :2]  # [B, N, 2, H, d]
        if rotation is not None:
            queries_keys = rotate(queries_keys, rotation)
        queries, keys = queries_keys.float().unbind(2)
        scores = torch.einsum("bhd,bnhd->bhn", queries[:, 0], keys)
        return (scores / queries.shape[-1] ** 0.5).softmax(dim=-1)


def attention(
    qkv: Tensor, layout: Layout, *, num_heads: int, backend: str = "auto", rotations: Rotations | None = None
) -> Tensor:
    """Attend within each image.

    Args:
        qkv: queries, keys and values of packed tokens, [T, 3 * D]; a row holds q, k, v, each head by head.
        layout: images and tokens of each crop size.
        num_heads: heads H.
        backend: "sdpa" runs PyTorch's kernel once for each crop size; "xformers" runs one block-diagonal kernel on
            CUDA; "auto" is "sdpa".
        rotations: angles by which queries and keys are turned, one for each crop size; None for learned positions.

    Returns:
        Attended values [T, D].
    """
    return _BACKENDS[backend](qkv, layout, num_heads, rotations)


def check_backend(backend: str) -> None:
    """Raise ConfigError if the backend is unknown or its package is absent."""
    if backend not in _BACKENDS:
        raise ConfigError(f"attention_backend={backend}: must be one of {', '.join(_BACKENDS)}")
    if backend == "xformers":
        _import_xformers()


def _sdpa(qkv: Tensor, layout: Layout, num_heads: int, rotations: Rotations | None) -> Tensor:
    parts = []
    for i, (rows, (num_images, num_tokens)) in enumerate(zip(split(qkv, layout), layout, strict=True)):
        rows = rows.view(num_images, num_tokens, 3, num_heads, -1)  # [B, N, 3, H, d]
        if rotations is None:
            q, k, v = rows.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, d]
        else:
            q, k = rotate(rows[:, :, :2], rotations[i]).permute(2, 0, 3, 1, 4).unbind(0)
            v = rows[:, :, 2].transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        parts.append(out.transpose(1, 2).reshape(num_images * num_tokens, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _xformers(qkv: Tensor, layout: Layout, num_heads: int, rotations: Rotations | None) -> Tensor:
    qkv = qkv.view(qkv.shape[0], 3, num_heads, -1)  # [T, 3, H, d]
    q, k, v = qkv.unbind(1)
    if rotations is not None:
        q, k = rotate_packed(qkv[:, :2], layout, rotations).unbind(1)
    out = _import_xformers().memory_efficient_attention(q[None], k[None], v[None], attn_bias=_block_diagonal(layout))
    return out.reshape(qkv.shape[0], -1)


def rotate_packed(x: Tensor, layout: Layout, rotations: Rotations) -> Tensor:
    """Turn packed queries or keys [T, ..., d], each crop size by its own rotation."""
    parts = [rotate(part, rotation) for part, rotation in zip(unpack(x, layout), rotations, strict=True)]
    return torch.cat([part.flatten(0, 1) for part in parts])


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


_Backend = Callable[[Tensor, Layout, int, Rotations | None], Tensor]
_BACKENDS: dict[str, _Backend] = {"auto": _sdpa, "sdpa": _sdpa, "xformers": _xformers}
