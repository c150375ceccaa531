"""KoLeo regulariser: keep class tokens of a batch apart on the unit sphere.

Shapes: B images on this rank, D features, W ranks, N images that are looked at for neighbours, Q rows of past images.
Source: Sablayrolles et al. 2018, arXiv:1806.03198; weight 0.1 in DINOv2. Groups and several neighbours: DINOv3's
`KoLeoLossDistributed`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.distributed import all_gather_cat_autograd, get_rank
from dinov2.loss.feature_queue import FeatureQueue, is_filled

_NO_NEIGHBOUR = -2.0  # below any cosine


class KoLeoLoss(nn.Module):
    """Mean negative log distance of each row to its nearest other rows.

    Args:
        distributed: look for neighbours, and send gradients to them, in the batches of all ranks.
        topk: number of nearest rows, >= 1; the mean is over all B * topk distances.
        group_size: look for neighbours only within groups of so many consecutive rows, counted through the ranks if
            `distributed`; must divide their number. None: all rows are one group.
        past: images of earlier passes, of all ranks in any case, which are further neighbours of every row; no
            gradient flows into them. `remember` fills it. None: there are none.
    """

    def __init__(
        self,
        *,
        distributed: bool = False,
        topk: int = 1,
        group_size: int | None = None,
        past: FeatureQueue | None = None,
    ) -> None:
        super().__init__()
        self.distributed = distributed
        self.topk = topk
        self.group_size = group_size
        self.past = past

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Return the loss of rows [B, D], 0-dim float32; 0 where there is no other row.

        Two equal rows give a large, finite loss: the distance has a floor of about `eps`.

        Raises:
            ValueError: the groups do not fit the number of rows, or have no `topk` other rows.
        """
        with torch.autocast(student_output.device.type, enabled=False):
            rows = F.normalize(student_output.float(), eps=eps, p=2, dim=-1)
            everyone = all_gather_cat_autograd(rows) if self.distributed else rows  # [N, D]
            past = self._past_rows(rows)
            if len(everyone) < 2 and past is None:
                return (rows * 0).sum()
            nearest = self._nearest(rows.detach(), everyone.detach(), past)
            others = everyone if past is None else torch.cat([everyone, past])
            neighbours = others[nearest.indices]  # [B, topk, D]
            distance = F.pairwise_distance(rows.unsqueeze(1), neighbours, p=2, eps=eps)  # [B, topk]
            log_distance = torch.log(distance + eps)
            if past is not None:  # which may be too empty for a batch of one image
                log_distance = log_distance.where(nearest.values > _NO_NEIGHBOUR, 0.0)
            return -log_distance.mean()

    def remember(self, student_output: Tensor) -> None:
        """Let both global crops of this pass, [2 * B, D] crop-major, be neighbours of later ones."""
        if self.past is not None:
            self.past.push(F.normalize(student_output.detach().float(), dim=-1))

    def _past_rows(self, rows: Tensor) -> Tensor | None:
        """Rows of earlier passes, [Q, D]; zeros where there is none yet, and None without a queue."""
        if self.past is None:
            return None
        past = self.past.rows(rows.device)
        return rows.new_zeros(self.past.num_rows, rows.shape[1]) if past is None else past

    def _nearest(self, rows: Tensor, everyone: Tensor, past: Tensor | None) -> torch.return_types.topk:
        """Cosines and positions of each row's neighbours among all rows and, behind these, past ones; [B, topk]."""
        group_size = len(everyone) if self.group_size is None else self.group_size
        if len(everyone) % group_size or (past is None and group_size <= self.topk):
            raise ValueError(
                f"{len(everyone)} rows cannot be split into groups of {group_size} with {self.topk} neighbours for each"
            )
        first = get_rank() * len(rows) if self.distributed else 0
        own = torch.arange(first, first + len(rows), device=rows.device)  # [B]
        others = torch.arange(len(everyone), device=rows.device)  # [N]
        similarity = rows @ everyone.T  # [B, N]
        apart = own.unsqueeze(1) // group_size != others // group_size
        similarity.masked_fill_(apart | (own.unsqueeze(1) == others), _NO_NEIGHBOUR)
        if past is not None:
            to_past = (rows @ past.T).masked_fill_(~is_filled(past), _NO_NEIGHBOUR)
            similarity = torch.cat([similarity, to_past], dim=1)
        return similarity.topk(min(self.topk, similarity.shape[1]), dim=1)  # a queue may be shorter
