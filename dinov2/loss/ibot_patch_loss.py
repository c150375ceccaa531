"""iBOT loss: the student's masked patches predict the prototypes that the teacher assigns to the unmasked ones.

Shapes: M masked patches on this rank, I images (both global crops), N patches, D features, K prototypes.
Source: Zhou et al. 2022, arXiv:2111.07832; the sums and scales of the parents' `iBOTPatchLoss.forward_masked`.
"""

import torch.nn.functional as F
from torch import Tensor

from dinov2.loss.assignments import Assignments
from dinov2.loss.centering import CenteredLoss
from dinov2.loss.prototype_cross_entropy import Criterion, prototype_cross_entropy


class iBOTPatchLoss(CenteredLoss):  # noqa: N801 (the parents' name)
    """Cross-entropy between student and teacher over prototypes, for masked patches."""

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Mean over images of each one's mean cross-entropy over its masked patches (dense form).

        Args:
            student_patch_tokens_masked: student scores, [M, K].
            teacher_patch_tokens_masked: assignments, [M, K].
            student_masks_flat: [I, N] bool; images without a masked patch count as 0.
            masks_weight: 1 / (masked patches of the patch's image), [M]; worked out from the masks if left out.
        """
        log_p = F.log_softmax(student_patch_tokens_masked.float() / self.student_temp, dim=-1)
        losses = -(teacher_patch_tokens_masked * log_p).sum(dim=-1)  # [M]
        if masks_weight is None:
            per_image = student_masks_flat.sum(dim=-1).clamp_min(1)
            masks_weight = (1 / per_image)[student_masks_flat.nonzero()[:, 0]]
        return (losses * masks_weight).sum() / len(student_masks_flat)

    def criterion(self, teacher: Assignments, *, masks_weight: Tensor, num_images: int) -> Criterion:
        """Make the criterion of one step, to be called through the student's head.

        Args:
            teacher: assignments of the masked patches, M rows; M may be 0.
            masks_weight: 1 / (masked patches of the patch's image), [M] float32.
            num_images: I, images of both global crops.

        Returns:
            A function of the student's unit features [M, D] and the prototypes [K, D]; it returns (loss,), 0-dim, the
            same number as `forward_masked`.
        """

        def criterion(features: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
            loss, _ = prototype_cross_entropy(
                features.unsqueeze(0),
                prototypes,
                targets=lambda start, stop: teacher.rows(start, stop).unsqueeze(0),
                mass=1.0,
                weights=masks_weight / num_images,
                temperature=self.student_temp,
            )
            return (loss,)

        return criterion
