"""Gram loss: the similarities between a student's patches are to be those between a Gram teacher's patches.

Features may move freely as long as their angles to each other stay; what is lost in long training, or in training on
few images, is the similarity of neighbouring patches of one thing.

Shapes: B crops on this rank, N patches, D features.
Source: Siméoni et al. 2025, arXiv:2508.10104, section 4; same values as DINOv3's `GramLoss`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GramLoss(nn.Module):
    """Mean squared difference between two matrices of similarities.

    Args:
        apply_norm: similarities are cosines; False: dot products.
        img_level: patches are compared within a crop; False: with those of all crops.
        remove_neg: negative similarities count as 0, the student's and the teacher's.
        remove_only_teacher_neg: the teacher's count as 0, so that the student's are drawn towards 0 there.

    Raises:
        ValueError: both kinds of removal are asked for.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError("remove_neg and remove_only_teacher_neg exclude each other")
        self.apply_norm = apply_norm
        self.img_level = img_level
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool | None = None) -> Tensor:
        """Compare the student's patches with the teacher's.

        Args:
            output_feats: of the student, [B, N, D]; if not compared within crops, [N, D] as well.
            target_feats: of the Gram teacher, in the same shape; without gradient.
            img_level: overrules the constructor's.

        Returns:
            0-dim float32, computed in float32; 0 where there are no patches.

        Raises:
            ValueError: the shapes differ, or are not those of crops that are compared within themselves.
        """
        within_crops = self.img_level if img_level is None else img_level
        if output_feats.shape != target_feats.shape or (within_crops and output_feats.ndim != 3):
            raise ValueError(f"cannot compare patches {list(output_feats.shape)} with {list(target_feats.shape)}")
        with torch.autocast(output_feats.device.type, enabled=False):
            student = self._similarities(output_feats.float(), within_crops=within_crops)
            teacher = self._similarities(target_feats.float(), within_crops=within_crops)
            if not student.numel():
                return student.sum()
            if self.remove_neg:
                student = student.clamp(min=0)
            if self.remove_neg or self.remove_only_teacher_neg:
                teacher = teacher.clamp(min=0)
            return F.mse_loss(student, teacher)

    def _similarities(self, features: Tensor, *, within_crops: bool) -> Tensor:
        """Return [B, N, N], or [B * N, B * N]."""
        rows = features if within_crops else features.flatten(0, -2)
        rows = F.normalize(rows, dim=-1) if self.apply_norm else rows
        return rows @ rows.mT
