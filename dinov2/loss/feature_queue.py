"""Features of past images, for losses that need more images than one forward pass has.

A pass over few images starves Sinkhorn-Knopp, which shares the prototypes out among the rows it sees, and KoLeo, which
looks for near neighbours among them. A queue lets both see the images of the passes before, without a gradient.

All ranks hold the same rows, oldest first, in the order of the sample stream: the same whatever the number of ranks.
Rows not filled yet are zero; features have length 1, so a zero row is none of them, and no count has to be kept on
the host.

Shapes: B images on this rank, W ranks, Q rows, D features.
Source: the queue of SwAV, arXiv:2006.09882, section 4.1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.distributed import all_gather_cat, get_rank, get_world_size

GLOBAL_CROPS = 2  # of an image; a queue takes a row of each
_GOLDEN = 0.6180339887498949  # its multiples modulo 1 fill 0..1 evenly

Past = tuple[Tensor, Tensor]  # scores [P, K] and which rows count, [P] bool; see `sinkhorn`


class FeatureQueue:
    """The newest rows of all ranks; those of a step count for good once the step is known to be good.

    Rows are seen from the next pass on, of the same step too where gradients are accumulated.

    Args:
        num_images: whose rows are kept, >= 1, two rows each.
    """

    def __init__(self, num_images: int) -> None:
        self.num_rows = GLOBAL_CROPS * num_images
        self._kept: Tensor | None = None  # [Q, D] float32; None: nothing was pushed yet
        self._pending: Tensor | None = None  # [Q, D] with the rows of the present step

    def rows(self, device: torch.device) -> Tensor | None:
        """Return the rows [Q, D] float32, zero where there is none yet; None before the first push."""
        if self._kept is not None and self._kept.device != device:
            self._kept = self._kept.to(device)  # comes from a checkpoint
        return self._kept if self._pending is None else self._pending

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Take in the features of a pass, in place of the oldest; all ranks together.

        Args:
            features: [2 * B, D], of length 1, crop-major; a zero row stands for a crop that has nothing to give.

        Cost: one all-gather of the features, one copy of the queue.
        """
        by_image = features.detach().float().unflatten(0, (GLOBAL_CROPS, -1)).transpose(0, 1)  # [B, 2, D]
        new = all_gather_cat(by_image.contiguous()).flatten(0, 1)  # [W * B * 2, D]
        old = self.rows(new.device)
        if old is None:
            old = new.new_zeros(self.num_rows, new.shape[1])
        both = torch.cat([old, new])
        order = is_filled(both).byte().argsort(stable=True)  # empty rows first, the others in their order
        self._pending = both[order[-self.num_rows :]]

    def keep(self) -> None:
        """Keep the rows pushed since the last call."""
        if self._pending is not None:
            self._kept, self._pending = self._pending, None

    def discard(self) -> None:
        """Forget the rows pushed since the last `keep`, when the step they belong to is cancelled."""
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        """Return the kept rows, sharing their memory; they are never changed in place."""
        return {"rows": self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over kept rows; of a longer queue the newest, of a shorter one all."""
        self._pending, rows = None, state["rows"]
        if rows is not None and len(rows) != self.num_rows:
            empty = rows.new_zeros(max(self.num_rows - len(rows), 0), rows.shape[1])
            rows = torch.cat([empty, rows[-self.num_rows :]])
        self._kept = rows


class FeatureQueues(dict[str, FeatureQueue]):
    """The queues of a run by name, saved and restored together; those that a checkpoint has not start empty."""

    starts_empty = True  # a checkpoint without it can be resumed from

    @classmethod
    def of_sizes(cls, num_images: Mapping[str, int]) -> "FeatureQueues":
        """Make a queue for each name whose number of images is not 0."""
        return cls({name: FeatureQueue(size) for name, size in num_images.items() if size})

    def keep(self) -> None:
        """Keep the rows of this step."""
        for queue in self.values():
            queue.keep()

    def discard(self) -> None:
        """Forget the rows of this step."""
        for queue in self.values():
            queue.discard()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all queues, equal on all ranks."""
        return {name: queue.state_dict() for name, queue in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the queues that this run has."""
        for name, queue in self.items():
            if name in state:
                queue.load_state_dict(state[name])


def score_with_past(queue: FeatureQueue) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Past | None]]:
    """Make the criterion of a teacher's head for Sinkhorn-Knopp with a queue.

    Returns:
        A function of unit features [N, D] and the prototypes [K, D]. It returns the features, their scores [N, K] and
        `past` of `sinkhorn`: the present scores of this rank's share of the queue, and which rows are filled; None
        where the queue is empty.
    """

    def criterion(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor, Past | None]:
        scores, past = F.linear(features, prototypes), None
        rows = queue.rows(features.device)
        if rows is not None:
            share = rows[get_rank() :: get_world_size()]
            past = F.linear(share.to(features.dtype), prototypes), is_filled(share)
        return features, scores, past

    return criterion


def is_filled(rows: Tensor) -> Tensor:
    """Say which rows [Q, D] of a queue hold features, [Q] bool."""
    return rows.abs().amax(dim=1) > 0


def one_patch_of_each_crop(features: Tensor, masks: Tensor, *, first_image: int) -> Tensor:
    """Choose one masked patch of each crop, for a queue; which one depends on the crop's place in the pass alone.

    Patches of one image are too alike to be worth several rows. Over the crops, all places of an image come up.

    Args:
        features: of the masked patches, [M, D], in the order of the flattened masks.
        masks: [2 * B, N] bool, crop-major.
        first_image: place of this rank's first image in the pass of all ranks.

    Returns:
        [2 * B, D]; a zero row for a crop without a masked patch.
    """
    counts = masks.sum(dim=1)  # [2 * B]
    num_images = len(masks) // GLOBAL_CROPS
    images = torch.arange(first_image, first_image + num_images, device=masks.device)
    crops = torch.cat([GLOBAL_CROPS * images + crop + 1 for crop in range(GLOBAL_CROPS)])
    share = crops.double() * _GOLDEN % 1  # 0..1, evenly spread over any run of crops
    chosen = counts.cumsum(0) - counts + (share * counts).long()
    nothing = features.new_zeros(1, features.shape[1])
    return torch.cat([features, nothing])[torch.where(counts > 0, chosen, len(features))]
