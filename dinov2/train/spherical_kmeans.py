"""Spherical k-means: unit vectors that stand for clusters of unit vectors.

Shapes: N points, K centres, D features.
Source: Dhillon and Modha 2001, "Concept decompositions for large sparse text data using clustering".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES_AT_ONCE = 1 << 24  # 64 MiB in float32


def spherical_kmeans(
    points: Tensor, num_centres: int, *, generator: torch.Generator, device: torch.device, num_rounds: int = 10
) -> Tensor:
    """Find centres that are each the direction of the mean of the points nearest to it.

    Begins with points drawn without repetition; a centre that loses all its points stays where it is.

    Args:
        points: [N, D] float32 of length 1, on the CPU.
        num_centres: K, 1..N.
        generator: on the CPU; decides where the search begins.
        device: where distances are computed; sums are taken on the CPU, in an order of their own, so that a device
            gives the same centres each time.
        num_rounds: of assigning points and moving centres.

    Returns:
        [K, D] float32 of length 1, on the CPU.

    Cost: num_rounds * N * K * D multiplications.
    """
    centres = points[torch.randperm(len(points), generator=generator)[:num_centres]]
    for _ in range(num_rounds):
        nearest = nearest_centres(points, centres, device=device)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        moved = torch.bincount(nearest, minlength=num_centres) > 0
        centres = torch.where(moved.unsqueeze(1), F.normalize(sums, dim=1), centres)
    return centres


def nearest_centres(points: Tensor, centres: Tensor, *, device: torch.device) -> Tensor:
    """Return the number of the centre with the largest cosine for each point [N, D], [N] int64, on the CPU."""
    there = centres.to(device)
    parts = points.split(max(1, _SCORES_AT_ONCE // len(centres)))
    return torch.cat([(part.to(device) @ there.T).argmax(dim=1).cpu() for part in parts])
