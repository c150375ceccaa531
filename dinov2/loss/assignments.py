"""Turn the teacher's prototype scores into assignments: softmax-centring or Sinkhorn-Knopp.

Shapes: N rows on this rank (crops or masked patches), K prototypes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_max, all_reduce_sum

_TINY = 1e-37  # keeps a reciprocal finite in float32


@dataclass(frozen=True)
class Assignments:
    """Probabilities of N rows over K prototypes, kept as one matrix and, for Sinkhorn-Knopp, two scaling vectors.

    The probabilities of row n are matrix[n] * row_scale[n] * column_scale; each row sums to 1.
    """

    matrix: Tensor  # [N, K] float32, >= 0
    row_scale: Tensor | None = None  # [N, 1]
    column_scale: Tensor | None = None  # [K]

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the probabilities of rows start..stop, [stop - start, K] float32; never to be written to."""
        block = self.matrix[start:stop]
        if self.row_scale is None:
            return block
        return (block * self.column_scale).mul_(self.row_scale[start:stop])

    def dense(self) -> Tensor:
        """Return all probabilities, [N, K] float32."""
        return self.rows(0, len(self))


def sinkhorn(
    scores: Tensor,
    *,
    temperature: float | Tensor,
    num_steps: int = 3,
    past: tuple[Tensor, Tensor] | None = None,
) -> Assignments:
    """Make assignments that use the prototypes about equally over the batches of all ranks.

    Works on one exponentiated matrix and two scaling vectors instead of rewriting the matrix: half the memory traffic.
    Rows are exponentiated relative to their own maximum, so no row vanishes and nothing overflows.

    Args:
        scores: teacher head output, [N, K], any float dtype; float32 scores are overwritten.
        temperature: > 0, no unit; the parents warm it up from 0.04 to 0.07.
        num_steps: rounds of column and row scaling, >= 1.
        past: scores [P, K] of images of earlier passes, which use prototypes too (float32 is overwritten), and which
            of these rows count, [P] bool. Each rank gives other rows, some or none; all ranks or none give them.

    Returns:
        Assignments of the N rows alone; each sums to 1. A rank may hold no rows.

    Raises:
        ValueError: scores is not 2-D.

    Source: SwAV, arXiv:2006.09882; same values as the parents' `sinkhorn_knopp_teacher`.
    Cost: 1 all-reduce of a scalar and num_steps of K floats.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}: must be [N, K]")
    blocks = [_Block(scores, temperature=temperature)]
    if past is not None:
        blocks.append(_Block(past[0], temperature=temperature, counts=past[1]))
    now, num_prototypes = blocks[0], scores.shape[1]
    top = all_reduce_max(torch.stack([block.top() for block in blocks]).max())
    for block in blocks:
        block.start_from(top)
    column_scale = now.matrix.new_ones(num_prototypes)
    with torch.autocast(scores.device.type, enabled=False):  # or the products would be rounded to half precision
        for _ in range(num_steps):
            usage = all_reduce_sum(sum(block.usage() for block in blocks))  # [K] total weight of each prototype
            share = usage / usage.sum().clamp_min(_TINY)  # without this, both scales would drift apart, step by step
            column_scale = share.mul_(num_prototypes).clamp_min_(_TINY).reciprocal_()
            for block in blocks:
                block.scale_rows(column_scale)
    return Assignments(now.matrix, row_scale=now.row_scale, column_scale=column_scale)


class _Block:
    """Some rows of the matrix that Sinkhorn-Knopp scales: exp(scores / temperature) relative to each row's maximum."""

    def __init__(self, scores: Tensor, *, temperature: float | Tensor, counts: Tensor | None = None) -> None:
        self.matrix = scores.float().div_(temperature)  # [N, K]
        self.row_max = self.matrix.amax(dim=1, keepdim=True)  # [N, 1]
        self.matrix.sub_(self.row_max).exp_()
        self.ignored = None if counts is None else ~counts.unsqueeze(1)  # [N, 1] bool
        self.row_scale = self._without_ignored(self.row_max, -torch.inf)

    def top(self) -> Tensor:
        """Return the largest score, 0-dim."""
        return self.row_scale.max() if len(self.matrix) else self.matrix.new_full((), -torch.inf)

    def start_from(self, top: Tensor) -> None:
        """Weigh the rows as the unscaled matrix does, relative to the largest score of all."""
        self.row_scale = self._without_ignored((self.row_max - top).exp_(), 0.0)

    def usage(self) -> Tensor:
        """Return the total weight of each prototype, [K]."""
        return self.row_scale.squeeze(1) @ self.matrix

    def scale_rows(self, column_scale: Tensor) -> None:
        """Let each row that counts sum to 1."""
        scale = (self.matrix @ column_scale).clamp_min_(_TINY).reciprocal_().unsqueeze(1)
        self.row_scale = self._without_ignored(scale, 0.0)

    def _without_ignored(self, rows: Tensor, value: float) -> Tensor:
        return rows if self.ignored is None else rows.masked_fill(self.ignored, value)


def softmax_center(scores: Tensor, *, center: Tensor, temperature: float | Tensor) -> Assignments:
    """Sharpen scores around a running centre.

    Args:
        scores: teacher head output, [N, K], any float dtype; float32 scores are overwritten.
        center: running mean of earlier scores, [1, K] float32; left unchanged.
        temperature: > 0, no unit.

    Source: Caron et al. 2021, arXiv:2104.14294, section 3.1.
    """
    return Assignments(torch.softmax(scores.float().sub_(center).div_(temperature), dim=-1))
