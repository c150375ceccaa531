"""What the DINO and iBOT losses share: teacher assignments and the running centre of the teacher's scores.

Shapes: N rows on this rank, K prototypes.
"""

import torch
from torch import Tensor, nn

from dinov2.distributed import all_reduce_sum
from dinov2.loss.assignments import Assignments, sinkhorn, softmax_center


class CenteredLoss(nn.Module):
    """Keep a centre of teacher scores whose update waits until the optimiser step is known to be good.

    Args:
        out_dim: number of prototypes K.
        student_temp: temperature of the student, > 0, no unit.
        center_momentum: share of the old centre kept at an update, in [0, 1].
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self._pending: Tensor | None = None  # [1, K + 1]: sum of scores and, last, number of rows

    def init_weights(self) -> None:
        """Set the centre to zero."""
        self.center.zero_()

    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float | Tensor) -> Assignments:
        """Assign by softmax around the centre; float32 scores [N, K] are overwritten."""
        return softmax_center(teacher_output, center=self.center, temperature=teacher_temp)

    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float | Tensor,
        n_iterations: int = 3,
        *,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Assignments:
        """Assign by Sinkhorn-Knopp over all ranks, beside `past` scores, see there; scores [N, K] are overwritten."""
        return sinkhorn(teacher_output, temperature=teacher_temp, num_steps=n_iterations, past=past)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Note teacher scores [N, K] for the next `apply_center_update`; several calls add up. N may be 0."""
        rows = teacher_output.float()
        seen = torch.cat([rows.sum(dim=0, keepdim=True), rows.new_full((1, 1), len(rows))], dim=1)
        self._pending = seen if self._pending is None else self._pending + seen

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Move the centre towards the mean of the noted scores of all ranks. Cost: one all-reduce of K + 1 floats."""
        if self._pending is None:
            return
        total = all_reduce_sum(self._pending)
        self._pending = None
        count = total[:, -1:]
        mean = torch.where(count > 0, total[:, :-1] / count.clamp_min(1), self.center)
        self.center.lerp_(mean, 1 - self.center_momentum)

    def discard_center_update(self) -> None:
        """Forget the noted scores, when the step they belong to is cancelled."""
        self._pending = None
