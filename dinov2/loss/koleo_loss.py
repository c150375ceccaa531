"""KoLeo regulariser: keep class tokens of a batch apart on the unit sphere.

Shapes: B images on this rank, D features, W ranks.
Source: Sablayrolles et al. 2018, arXiv:1806.03198; weight 0.1 in DINOv2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.distributed import all_gather_cat_autograd, get_rank


class KoLeoLoss(nn.Module):
    """Mean negative log distance of each row to its nearest other row.

    Args:
        distributed: look for neighbours, and send gradients to them, in the batches of all ranks.
    """

    def __init__(self, *, distributed: bool = False) -> None:
        super().__init__()
        self.distributed = distributed

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the loss of rows [B, D], 0-dim float32; 0 where there is no other row.

        Two equal rows give a large, finite loss: the distance has a floor of about `eps`.
        """
        with torch.autocast(student_output.device.type, enabled=False):
            rows = F.normalize(student_output.float(), eps=eps, p=2, dim=-1)
            everyone = all_gather_cat_autograd(rows) if self.distributed else rows  # [W * B, D]
            if len(everyone) < 2:
                return (rows * 0).sum()
            own = torch.arange(len(rows), device=rows.device) + (get_rank() * len(rows) if self.distributed else 0)
            with torch.no_grad():
                similarity = rows @ everyone.T  # [B, W * B]
                similarity.scatter_(1, own.unsqueeze(1), -2.0)
                nearest = similarity.argmax(dim=1)
            distance = F.pairwise_distance(rows, everyone[nearest], p=2, eps=eps)
            return -torch.log(distance + eps).mean()
