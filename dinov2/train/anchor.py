"""What holds a student near a network that is not trained: frozen networks, the Gram loss and the feature anchor.

Shapes: B images on this rank, N patches of a global crop, D features. The two global crops are crop-major.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from dinov2.configs.adaptation_sections import START_WEIGHTS, AnchorConfig, GramConfig
from dinov2.fsdp import copy_local_state
from dinov2.loss import FeatureAnchorLoss, GramLoss
from dinov2.train.gram import GramAnchor, GramRenewals
from dinov2.train.token_samples import patch_ranks, smallest, take

logger = logging.getLogger("dinov2.train")

START, GRAM_TEACHER = "start", "gram_teacher"  # names of the frozen networks
_NUM_GLOBAL_CROPS = 2


@dataclass(frozen=True, kw_only=True)
class AnchorWeights:
    """Factors of a step; 0: the loss is not computed."""

    gram: float = 0.0
    cls: float = 0.0
    patch: float = 0.0


@dataclass(frozen=True, kw_only=True)
class AnchorTargets:
    """What the student of one step is held near; None: not asked for."""

    weights: AnchorWeights
    cls: Tensor | None = None  # by the weights of the start, [2 * B, D]
    patches: Tensor | None = None  # by the weights of the start, [2 * B, N, D]
    gram: Tensor | None = None  # patches of the Gram teacher, [2 * B, ., D]


class Anchoring(nn.Module):
    """Frozen networks and the losses over them; without any it has no parameters and adds nothing.

    `networks` holds `start`, the weights that the run starts from, if features are anchored or Gram matrices are those
    of the start throughout, and `gram_teacher` if the Gram loss needs other weights. They are part of checkpoints.

    Args:
        build_network: builds a backbone without values.
        has_start: there is a network of the start.
        max_tokens: patches of a crop whose features are anchored; None: all.
        gram: the Gram loss; None: off.
        gram_source: start, gram_teacher, or teacher for the teacher itself.
        gram_renewals: before which steps `gram_teacher` becomes the teacher of that time.
        gram_waits: `gram_teacher` is of no use before it was loaded by them, and the Gram loss begins then.
    """

    def __init__(
        self,
        build_network: Callable[[], nn.Module],
        *,
        has_start: bool = False,
        max_tokens: int | None = None,
        gram: GramAnchor | None = None,
        gram_source: str = GRAM_TEACHER,
        gram_renewals: GramRenewals | None = None,
        gram_waits: bool = False,
    ) -> None:
        super().__init__()
        names = [START] if has_start else []
        if gram is not None and gram_source in (START, GRAM_TEACHER) and gram_source not in names:
            names.append(gram_source)
        self.networks = nn.ModuleDict({name: build_network() for name in names})
        self.networks.requires_grad_(False)
        self.max_tokens = max_tokens
        self.feature_loss = FeatureAnchorLoss()
        self.gram = gram
        self.gram_source = gram_source
        self.gram_renewals = gram_renewals or GramRenewals()
        self.gram_waits = gram_waits
        self._gram_is_ready = not gram_waits
        self.train()

    @classmethod
    def from_config(cls, gram: GramConfig, anchor: AnchorConfig, *, build_network: Callable[[], nn.Module]) -> Self:
        """Build from the config sections of these names."""
        if not gram.use_loss:
            return cls(build_network, has_start=anchor.is_on, max_tokens=anchor.max_tokens)
        source = GRAM_TEACHER
        if gram.ema_teacher:
            source = "teacher"
        elif gram.ckpt == START_WEIGHTS and not gram.follows_teacher:
            source = START
        return cls(
            build_network,
            has_start=anchor.is_on,
            max_tokens=anchor.max_tokens,
            gram=GramAnchor(
                GramLoss(gram.normalized, gram.img_level, gram.remove_neg, gram.remove_only_teacher_neg),
                tokens_used=gram.tokens_used,
                max_tokens=gram.max_tokens,
                resize_method=gram.global_teacher_resize_method,
                resize_antialias=gram.global_teacher_resize_antialias,
                compute_stats=gram.compute_stats,
            ),
            gram_source=source,
            gram_renewals=GramRenewals(
                load_step=gram.it_load_ema_teacher,
                period_steps=gram.update_frequency if gram.rep_update else None,
                first_step=gram.it_first_update,
                max_count=gram.max_updates,
            ),
            gram_waits=source == GRAM_TEACHER and gram.ckpt is None,
        )

    def train(self, mode: bool = True) -> Self:
        """Leave the networks in evaluation mode, whatever mode is asked for."""
        super().train(mode)
        self.networks.eval()
        return self

    @property
    def compares_with_teacher(self) -> bool:
        """Whether the Gram loss needs the patches of the teacher itself."""
        return self.gram is not None and self.gram_source == "teacher"

    def copy_from(self, backbone: nn.Module) -> None:
        """Give all frozen networks the weights of an equal backbone, sharded alike."""
        for network in self.networks.values():
            copy_local_state(network, backbone)

    def begin_step(self, step: int, teacher: nn.Module) -> None:
        """Renew the Gram teacher if it is due before this step; all ranks call it before each step.

        Args:
            step: counted from 0 through the whole run.
            teacher: backbone of the teacher, sharded like the frozen networks.
        """
        self._gram_is_ready = not self.gram_waits or step >= self.gram_renewals.load_step
        if GRAM_TEACHER in self.networks and self.gram_renewals.is_due(step):
            copy_local_state(self.networks[GRAM_TEACHER], teacher)
            logger.info("the Gram teacher is the teacher before iteration %d from now on", step)

    @torch.no_grad()
    def targets(
        self, images: Mapping[str, Tensor], *, weights: AnchorWeights, teacher_patches: Tensor | None = None
    ) -> AnchorTargets:
        """Look at the global crops with the frozen networks whose losses count in this step.

        Args:
            images: finished batch; the Gram teacher sees `collated_gram_teacher_crops` if they are there.
            weights: of the step.
            teacher_patches: of the teacher, [2 * B, N, D]; needed if the Gram loss `compares_with_teacher`.
        """
        crops = images["collated_global_crops"]
        gram_crops = images.get("collated_gram_teacher_crops", crops)
        needs_gram = self._gram_is_ready and self.gram is not None and (weights.gram > 0 or self.gram.compute_stats)
        is_shared = needs_gram and self.gram_source == START and gram_crops is crops
        start: Mapping[str, Tensor] = {}
        if weights.cls > 0 or weights.patch > 0 or is_shared:
            start = self.networks[START](crops, is_training=True)
        gram = None
        if is_shared:
            gram = start["x_norm_patchtokens"]
        elif needs_gram and self.compares_with_teacher:
            gram = teacher_patches
        elif needs_gram:
            gram = self.networks[self.gram_source](gram_crops, is_training=True)["x_norm_patchtokens"]
        return AnchorTargets(
            weights=weights,
            cls=start["x_norm_clstoken"] if weights.cls > 0 else None,
            patches=start["x_norm_patchtokens"] if weights.patch > 0 else None,
            gram=gram,
        )

    def forward(
        self, tokens: Mapping[str, Tensor], targets: AnchorTargets, images: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the losses, 0-dim, and what is to be recorded, without gradient.

        Args:
            tokens: features of the student for the global crops, some patches of which it did not see.
            targets: for the same crops.
            images: finished batch.
        """
        weights = targets.weights
        total = tokens["x_norm_clstoken"].new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        if targets.cls is not None:
            loss = self.feature_loss(tokens["x_norm_clstoken"], targets.cls)
            total, metrics["anchor_cls_loss"] = total + weights.cls * loss, loss.detach()
        if targets.patches is not None:
            loss = self._patch_loss(tokens["x_norm_patchtokens"], targets.patches, images)
            total, metrics["anchor_patch_loss"] = total + weights.patch * loss, loss.detach()
        if targets.gram is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights.gram > 0):
                loss, of_gram = self.gram(tokens["x_norm_patchtokens"], targets.gram, images)
            total = total + weights.gram * loss
            metrics |= of_gram | {"gram_loss_weight": loss.new_full((), weights.gram)}
        return total, metrics

    def _patch_loss(self, student: Tensor, start: Tensor, images: Mapping[str, Tensor]) -> Tensor:
        """Compare the patches that the student saw, or some of them; of others there are no features to be kept."""
        seen = ~images["collated_masks"]  # [2 * B, N]
        if self.max_tokens is not None:
            ranks = patch_ranks(images["seeds"], num_crops=_NUM_GLOBAL_CROPS, num_patches=student.shape[1])
            seen_first = ranks.to(student.device, non_blocking=True) + images["collated_masks"]
            places = smallest(seen_first, self.max_tokens)
            student, start, seen = take(student, places), take(start, places), take(seen, places)
        return self.feature_loss(student, start, seen)
