"""Anchor of features: a student's tokens are to point where those of a frozen network point.

Shapes: B crops on this rank, T tokens of a crop, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureAnchorLoss(nn.Module):
    """Mean of 1 - cosine between tokens of two networks: 0 same direction, 1 orthogonal, 2 opposite."""

    def forward(self, student: Tensor, frozen: Tensor, counted: Tensor | None = None) -> Tensor:
        """Compare each token with the same one of the other network.

        Args:
            student: [..., D].
            frozen: in the same shape; without gradient.
            counted: [B, T] bool, which of the tokens [B, T, D] count; None: all. The mean is over those of a crop, then
                over crops, so that no crop weighs more because more of its tokens count; one without any gives 0.

        Returns:
            0-dim float32, computed in float32.
        """
        with torch.autocast(student.device.type, enabled=False):
            distance = 1 - F.cosine_similarity(student.float(), frozen.float(), dim=-1)
            if counted is None:
                return distance.mean()
            of_crop = (distance * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)  # [B]
            return of_crop.mean()
