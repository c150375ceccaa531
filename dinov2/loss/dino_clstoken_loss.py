"""DINO loss: the student's class tokens predict the prototypes that the teacher assigns to other crops of the image.

Shapes: B images on this rank, G = 2 global crops, L local crops, D features, K prototypes.
Source: Caron et al. 2021, arXiv:2104.14294; the sums and scales of the parents' `SSLMetaArch`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.loss.assignments import Assignments
from dinov2.loss.centering import CenteredLoss
from dinov2.loss.prototype_cross_entropy import Criterion, prototype_cross_entropy


class DINOLoss(CenteredLoss):
    """Cross-entropy between student and teacher over prototypes, for class tokens."""

    def forward(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor]
    ) -> Tensor:
        """Sum over all pairs of a student and a teacher tensor, [B, K] each, of the mean cross-entropy (dense form)."""
        total = student_output_list[0].new_zeros((), dtype=torch.float32)
        for scores in student_output_list:
            log_p = F.log_softmax(scores.float() / self.student_temp, dim=-1)
            for target in teacher_out_softmaxed_centered_list:
                total = total - (target * log_p).sum(dim=-1).mean()
        return total

    def criterion(self, teacher: Assignments, *, num_local_crops: int) -> Criterion:
        """Make the criterion of one step, to be called through the student's head.

        Args:
            teacher: assignments of both global crops, crop-major, 2 * B rows.
            num_local_crops: L, >= 0.

        Returns:
            A function of the student's unit features [(2 + L) * B, D], crop-major with the global crops first, and
            the prototypes [K, D]. It returns (loss, local loss, global loss), 0-dim: the loss with gradient is
            local + global, each crop's mean cross-entropy over the number of (student, teacher) crop pairs.
        """
        num_images = len(teacher) // 2
        num_terms = 2 + max(2 * num_local_crops, 1)

        def crossed(start: int, stop: int) -> Tensor:
            """Give each global crop the assignments of the other."""
            second = teacher.rows(num_images + start, num_images + stop)
            return torch.stack([second, teacher.rows(start, stop)])

        def summed(start: int, stop: int) -> Tensor:
            """Give local crops the assignments of both."""
            return (teacher.rows(start, stop) + teacher.rows(num_images + start, num_images + stop)).unsqueeze(0)

        def criterion(features: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
            features = features.unflatten(0, (2 + num_local_crops, num_images))
            weights = features.new_full((num_images,), 1 / (num_images * num_terms), dtype=torch.float32)
            shared = {"weights": weights, "temperature": self.student_temp}
            loss, _ = prototype_cross_entropy(features[:2], prototypes, targets=crossed, mass=1.0, **shared)
            global_loss, local_loss = loss.detach(), torch.zeros_like(loss)
            if num_local_crops:
                local, _ = prototype_cross_entropy(features[2:], prototypes, targets=summed, mass=2.0, **shared)
                loss, local_loss = loss + local, local.detach()
            return loss, local_loss, global_loss

        return criterion
