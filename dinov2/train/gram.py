"""Gram anchoring in a step: which patches are compared, on which grid, and when the Gram teacher is renewed.

Shapes: B images on this rank, N patches of a global crop, D features. The two global crops are crop-major.
Source: Siméoni et al. 2025, arXiv:2508.10104, section 4; DINOv3's `SSLMetaArch` and `do_train`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.loss import GramLoss
from dinov2.train.token_samples import patch_ranks, smallest, take

_NUM_GLOBAL_CROPS = 2


@dataclass(frozen=True, kw_only=True)
class GramRenewals:
    """Before which steps the Gram teacher becomes the teacher of that time.

    They follow from the number of the step alone, so that a run that was resumed has them at the same steps.
    """

    load_step: int = -1  # once before this step; -1: not
    period_steps: int | None = None  # then also before each multiple of so many steps, but step 0; None: not
    first_step: int = 0  # none of the latter before this step
    max_count: int | None = None  # at most so many of the latter; None: to the end of the run

    def is_due(self, step: int) -> bool:
        """Say whether there is one before a step."""
        return step == self.load_step or self._is_periodic(step)

    def _is_periodic(self, step: int) -> bool:
        first = max(self.first_step, 1)
        if self.period_steps is None or step < first or step % self.period_steps:
            return False
        num_earlier = (step - 1) // self.period_steps - (first - 1) // self.period_steps
        return self.max_count is None or num_earlier < self.max_count


class GramAnchor(nn.Module):
    """Gram loss of a step.

    Args:
        loss: compares patches.
        tokens_used: all, masked or unmasked patches; the latter two only where crops are not compared by themselves.
        max_tokens: compare at most so many patches, of each crop, or of all where crops are not compared by themselves.
        resize_method: of the Gram teacher's map of patches where its grid is another: nearest, bilinear, bicubic, area.
        resize_antialias: smooth before making smaller; bilinear and bicubic only.
        compute_stats: also record the losses among masked and among unmasked patches of all crops.
    """

    def __init__(
        self,
        loss: GramLoss,
        *,
        tokens_used: str = "all",
        max_tokens: int | None = None,
        resize_method: str = "bicubic",
        resize_antialias: bool = False,
        compute_stats: bool = False,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.tokens_used = tokens_used
        self.max_tokens = max_tokens
        self.resize_method = resize_method
        self.resize_antialias = resize_antialias
        self.compute_stats = compute_stats

    def forward(
        self, student: Tensor, teacher: Tensor, images: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare the patches of the student with those of the Gram teacher.

        Args:
            student: [2 * B, N, D].
            teacher: of the same crops, on any square grid; without gradient.
            images: finished batch; `seeds` [B] is needed with `max_tokens`.

        Returns:
            The loss, 0-dim, and what is to be recorded, without gradient.
        """
        teacher = self._on_grid(teacher, num_patches=student.shape[1])
        ranks = None
        if self.max_tokens is not None:
            ranks = patch_ranks(images["seeds"], num_crops=_NUM_GLOBAL_CROPS, num_patches=student.shape[1])
            ranks = ranks.to(student.device, non_blocking=True)
        if not self.loss.img_level:
            loss = self._among(self.tokens_used, student, teacher, images=images, ranks=ranks)
        elif ranks is None:
            loss = self.loss(student, teacher)
        else:
            places = smallest(ranks, self.max_tokens)
            loss = self.loss(take(student, places), take(teacher, places))
        metrics = {"gram_loss": loss.detach()}
        if self.compute_stats:
            with torch.no_grad():
                for kind in ("masked", "unmasked"):
                    among = self._among(kind, student, teacher, images=images, ranks=ranks)
                    metrics[f"stats_only/{kind}_gram_loss"] = among
        return loss, metrics

    def _among(
        self, kind: str, student: Tensor, teacher: Tensor, *, images: Mapping[str, Tensor], ranks: Tensor | None
    ) -> Tensor:
        """Compare patches of one kind, whatever crop they are of."""
        patches = student.flatten(0, 1), teacher.flatten(0, 1)
        places = _places(kind, images)
        if ranks is not None:
            chosen = ranks.flatten() if places is None else ranks.flatten().index_select(0, places)
            sample = smallest(chosen, self.max_tokens)
            places = sample if places is None else places.index_select(0, sample)
        if places is not None:
            patches = tuple(rows.index_select(0, places) for rows in patches)
        return self.loss(*patches, img_level=False)

    def _on_grid(self, patches: Tensor, *, num_patches: int) -> Tensor:
        """Resize square maps of patches, [2 * B, ., D], to another number of patches."""
        if patches.shape[1] == num_patches:
            return patches
        side, target = math.isqrt(patches.shape[1]), math.isqrt(num_patches)
        maps = patches.float().mT.unflatten(-1, (side, side))  # [2 * B, D, side, side]
        options = {}
        if self.resize_method in ("bilinear", "bicubic"):
            options = {"align_corners": False, "antialias": self.resize_antialias}
        return F.interpolate(maps, size=(target, target), mode=self.resize_method, **options).flatten(2).mT


def _places(kind: str, images: Mapping[str, Tensor]) -> Tensor | None:
    """Find the patches of a kind among those of all crops, [2 * B * N]; None: all. Does not wait for the device."""
    if kind == "all":
        return None
    masked = images["mask_indices_list"]
    if kind == "masked":
        return masked
    masks = images["collated_masks"].flatten()
    return masks.to(torch.uint8).argsort(stable=True)[: len(masks) - len(masked)]
