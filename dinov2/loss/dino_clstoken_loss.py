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
from dinov2.loss.prototype_cross_entropy import Criterion, TargetRows, prototype_cross_entropy


class DINOLoss(CenteredLoss):
    """Cross-entropy between student and teacher over prototypes, for class tokens."""

    def forward(
        self,
        student_output_list: Sequence[Tensor] | Tensor,
        teacher_out_softmaxed_centered_list: Sequence[Tensor] | Tensor,
        *,
        ignore_diagonal: bool = False,
    ) -> Tensor:
        """Sum over pairs of a student and a teacher tensor, [B, K] each, of the mean cross-entropy (dense form).

        Args:
            student_output_list: scores, as a list or stacked [S, B, K].
            teacher_out_softmaxed_centered_list: assignments, as a list or stacked [T, B, K].
            ignore_diagonal: leave out the pairs of a crop with itself, those of equal position.

        Returns:
            0-dim float32, as DINOv2's loss; divided by the number of pairs it is DINOv3's.
        """
        total = student_output_list[0].new_zeros((), dtype=torch.float32)
        for s, scores in enumerate(student_output_list):
            log_p = F.log_softmax(scores.float() / self.student_temp, dim=-1)
            for t, target in enumerate(teacher_out_softmaxed_centered_list):
                if not (ignore_diagonal and s == t):
                    total = total - (target * log_p).sum(dim=-1).mean()
        return total

    def criterion(
        self,
        teacher: Assignments,
        *,
        num_local_crops: int,
        ignore_diagonal: bool = True,
        local_weight: float = 1.0,
    ) -> Criterion:
        """Make the criterion of one step, to be called through the student's head.

        Args:
            teacher: assignments of both global crops, crop-major, 2 * B rows.
            num_local_crops: L, >= 0.
            ignore_diagonal: True: a global crop predicts the assignments of the other one; False: of both.
            local_weight: factor on the part of the local crops, >= 0.

        Returns:
            A function of the student's unit features [(2 + L) * B, D], crop-major with the global crops first, and
            the prototypes [K, D]. It returns (loss, local, global), 0-dim. `local` and `global`, without gradient, are
            mean cross-entropies over images and over 2 * L pairs of a local crop with a global one, and over the 2
            (4 with the diagonal) pairs of global crops. The loss weighs them by their numbers of pairs:

                loss = (local_weight * 2 * L * local + G * global) / (2 * L + G),    G = 2 or 4

            As in DINOv2, L = 0 counts as one pair that costs nothing.
        """
        num_images = len(teacher) // 2
        num_global_pairs = 2 if ignore_diagonal else 4
        num_pairs = num_global_pairs + max(2 * num_local_crops, 1)

        def crossed(start: int, stop: int) -> Tensor:
            """Give each global crop the assignments of the other."""
            second = teacher.rows(num_images + start, num_images + stop)
            return torch.stack([second, teacher.rows(start, stop)])

        def summed(start: int, stop: int) -> Tensor:
            """Give crops the assignments of both global ones."""
            return (teacher.rows(start, stop) + teacher.rows(num_images + start, num_images + stop)).unsqueeze(0)

        def compare(
            features: Tensor, prototypes: Tensor, *, targets: TargetRows, mass: float, weight: float
        ) -> tuple[Tensor, Tensor]:
            weights = features.new_full((num_images,), weight / (num_images * num_pairs), dtype=torch.float32)
            loss, each = prototype_cross_entropy(
                features, prototypes, targets=targets, mass=mass, weights=weights, temperature=self.student_temp
            )
            return loss, each.mean() / mass

        def criterion(features: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
            features = features.unflatten(0, (2 + num_local_crops, num_images))
            targets, mass = (crossed, 1.0) if ignore_diagonal else (summed, 2.0)
            loss, global_loss = compare(features[:2], prototypes, targets=targets, mass=mass, weight=1.0)
            local_loss = torch.zeros_like(global_loss)
            if num_local_crops:
                local, local_loss = compare(features[2:], prototypes, targets=summed, mass=2.0, weight=local_weight)
                loss = loss + local
            return loss, local_loss, global_loss

        return criterion
