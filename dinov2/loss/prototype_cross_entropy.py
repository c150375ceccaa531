"""Cross-entropy between prototype scores and assignments, without the matrix of scores.

With tens of thousands of prototypes, the scores of one step, their softmax and its gradient are the largest tensors of
training, several times over. Here a block of rows is scored, compared and differentiated while it is in cache; only
the gradients of features and prototypes are kept.

Shapes: S crops, B images, D features, K prototypes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Assignments of images start..stop: [S or 1, stop - start, K] float32. The sum of a row is `mass`.
TargetRows = Callable[[int, int], Tensor]
# Takes a head's unit features [N, D] and prototypes [K, D]; returns the loss first.
Criterion = Callable[[Tensor, Tensor], tuple[Tensor, ...]]

_BLOCK_BYTES = {"cpu": 16 * 2**20}  # scores of one block; on a CPU they should stay in its cache
_BLOCK_BYTES_ELSEWHERE = 512 * 2**20


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    *,
    targets: TargetRows,
    mass: float,
    weights: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Sum weights[b] * -sum_k t_k * log softmax(features @ prototypes.T / temperature)_k over S crops and B images.

        for a block of images:
            p = softmax(features @ prototypes.T / temperature)
            loss += weights * -(t * log p).sum()
            d_scores = weights * (mass * p - t) / temperature
            d_features, d_prototypes += d_scores @ prototypes, d_scores.T @ features

    Gradients are computed with the loss and scaled in the backward pass, so the loss must be differentiated at most
    once and not twice over.

    Args:
        features: student features, [S, B, D], any float dtype; under autocast the products use its dtype.
        prototypes: [K, D].
        targets: gives the assignments of a range of images; each row sums to `mass`.
        mass: sum of a row of targets; 2 where the assignments of two teacher crops are added.
        weights: weight of each image, [B] float32.
        temperature: > 0, no unit.

    Returns:
        The weighted sum (0-dim float32), and the unweighted cross-entropies [S, B] float32 without gradient.
    """
    dtype = features.dtype
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
    return _PrototypeCrossEntropy.apply(features, prototypes, targets, mass, weights, temperature, dtype)


class _PrototypeCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx: torch.autograd.function.FunctionCtx,
        features: Tensor,
        prototypes: Tensor,
        targets: TargetRows,
        mass: float,
        weights: Tensor,
        temperature: float,
        dtype: torch.dtype,
    ):
        num_crops, num_images, _ = features.shape
        blocks = _blocks(num_crops, num_images, num_prototypes=len(prototypes), device=features.device)
        scaled, weight = (features / temperature).to(dtype), prototypes.to(dtype)
        losses = features.new_zeros(num_crops, num_images, dtype=torch.float32)
        wants_grad = any(ctx.needs_input_grad)
        d_features = torch.zeros_like(features, dtype=torch.float32) if wants_grad else None
        make = torch.empty_like if blocks else torch.zeros_like  # the first block overwrites it
        d_prototypes = make(prototypes, dtype=torch.float32) if wants_grad else None
        room = features.new_empty(2, num_crops * _longest(blocks), len(prototypes), dtype=torch.float32)

        with torch.autocast(features.device.type, enabled=False):
            for start, stop in blocks:
                block = scaled[:, start:stop].flatten(0, 1)  # [S * n, D]
                target = targets(start, stop)  # [S or 1, n, K]
                scores, product = (part[: len(block)].unflatten(0, (num_crops, -1)) for part in room)  # [S, n, K]
                _product(block, weight.T, out=scores.flatten(0, 1))
                scores.sub_(scores.amax(dim=-1, keepdim=True))
                expected = torch.mul(target, scores, out=product).sum(dim=-1)  # [S, n]
                total = scores.exp_().sum(dim=-1)
                losses[:, start:stop] = total.log().mul_(mass).sub_(expected)
                if not wants_grad:
                    continue
                d_scores = scores.mul_(mass / total.unsqueeze(-1)).sub_(target)  # without the image's weight
                d_scores = d_scores.flatten(0, 1).to(dtype)
                row_weight = weights[start:stop].repeat(num_crops).unsqueeze(1)  # [S * n, 1]
                d_block = (d_scores @ weight).float().mul_(row_weight / temperature)
                d_features[:, start:stop] = d_block.unflatten(0, (num_crops, stop - start))
                _add_product(d_prototypes, d_scores.T, block * row_weight.to(dtype), keep=start > 0)

        ctx.save_for_backward(d_features, d_prototypes)
        ctx.dtypes = features.dtype, prototypes.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, d_loss: Tensor, _: Tensor) -> tuple:  # type: ignore[override]
        d_features, d_prototypes = ctx.saved_tensors
        features_dtype, prototypes_dtype = ctx.dtypes
        d_features = d_features.mul_(d_loss).to(features_dtype)
        d_prototypes = d_prototypes.mul_(d_loss).to(prototypes_dtype)
        return d_features, d_prototypes, None, None, None, None, None


def _blocks(num_crops: int, num_images: int, *, num_prototypes: int, device: torch.device) -> list[tuple[int, int]]:
    """Cut the images into equal ranges whose scores fit `_BLOCK_BYTES`."""
    budget = _BLOCK_BYTES.get(device.type, _BLOCK_BYTES_ELSEWHERE)
    fit = max(1, budget // (4 * num_crops * num_prototypes))
    num_blocks = -(-num_images // fit)
    edges = [num_images * i // num_blocks for i in range(num_blocks + 1)] if num_blocks else []
    return list(zip(edges, edges[1:], strict=False))


def _longest(blocks: list[tuple[int, int]]) -> int:
    return max((stop - start for start, stop in blocks), default=0)


def _product(left: Tensor, right: Tensor, *, out: Tensor) -> None:
    """Write left @ right into a float32 tensor."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, keep: bool) -> None:
    """Add left @ right to a float32 total, in place; unless `keep`, what was there is overwritten."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=1 if keep else 0)
    elif keep:
        total.add_(left @ right)
    else:
        total.copy_(left @ right)
