"""`SSLMetaArch`: student, EMA teacher and losses of DINOv2 and DINOv3, and one training step over them.

Shapes: B images on this rank, 2 global crops, L local crops, N patches, M masked patches, D features, K prototypes.
Source: Oquab et al. 2023, arXiv:2304.07193, and Siméoni et al. 2025, arXiv:2508.10104; names and numbers of the
parents' `SSLMetaArch`.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from dinov2.configs import Config
from dinov2.distributed import get_rank, is_main_process, on_main_first
from dinov2.eval.build import build_backbone
from dinov2.fsdp import copy_local_state, full_state_dict, load_full_state_dict, shard
from dinov2.hub.stored_tensor import State
from dinov2.layers.dino_head import DINOHead
from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.assignments import Assignments
from dinov2.loss.feature_queue import FeatureQueues, one_patch_of_each_crop, score_with_past
from dinov2.train.anchor import Anchoring, AnchorTargets, AnchorWeights
from dinov2.train.batch_statistics import at_rest, average_statistics, copy_statistics, keep_frozen_statistics
from dinov2.train.collapse_signs import signs_of_crops, signs_of_features, signs_of_student, signs_of_targets
from dinov2.train.low_rank import move_towards
from dinov2.train.networks import build_networks, whole_state

_NUM_GLOBAL_CROPS = 2
_NO_ANCHORS = AnchorWeights()


@dataclass(frozen=True)
class TeacherTargets:
    """What the student of one step has to predict."""

    cls: Assignments  # both global crops, crop-major, 2 * B rows
    patch: Assignments | None  # masked patches, M rows; None without the iBOT loss
    anchors: AnchorTargets
    signs: Mapping[str, Tensor]  # of collapse, 0-dim each


class SSLMetaArch(nn.Module):
    """Student and teacher, each a ModuleDict of `backbone`, `dino_head` and, if separate and used, `ibot_head`.

    `anchoring` holds frozen backbones that the student is held near, if the config asks for it.

    Args:
        cfg: config of the run.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.follow(cfg)
        self.dino_global_ignore_diagonal = cfg.dino.global_ignore_diagonal
        self.centering = cfg.train.centering
        self.autocast_dtype = torch.float32

        self._build_networks = partial(build_networks, cfg)
        self.student, self.teacher = self._build_networks(), self._build_networks(of_teacher=True)
        self.teacher.requires_grad_(False)
        self.anchoring = Anchoring.from_config(
            cfg.gram, cfg.anchor, build_network=partial(build_backbone, cfg, drop_path_rate=0.0)
        )
        patch_prototypes = cfg.ibot.head_n_prototypes if cfg.ibot.separate_head else cfg.dino.head_n_prototypes
        self.dino_loss = DINOLoss(cfg.dino.head_n_prototypes)
        self.ibot_patch_loss = iBOTPatchLoss(patch_prototypes)
        past_scores, past_neighbours = cfg.train.sinkhorn_queue_size, cfg.dino.koleo_queue_size
        self.queues = FeatureQueues.of_sizes({"cls": past_scores, "patch": past_scores, "koleo": past_neighbours})
        self.koleo_loss = KoLeoLoss(
            distributed=cfg.dino.koleo_loss_distributed,
            topk=cfg.dino.koleo_topk,
            group_size=cfg.dino.koleo_distributed_loss_group_size if cfg.dino.koleo_loss_distributed else None,
            past=self.queues.get("koleo"),
        )
        self.train()

    def follow(self, cfg: Config) -> None:
        """Take over those settings that a stage of a run may have of its own, for the steps to come."""
        self.dino_loss_weight = cfg.dino.loss_weight
        self.koleo_loss_weight = cfg.dino.koleo_loss_weight
        self.ibot_loss_weight = cfg.ibot.loss_weight
        self.anchor_cls_weight = cfg.anchor.cls_weight
        self.anchor_patch_weight = cfg.anchor.patch_weight
        self.num_local_crops = cfg.crops.local_crops_number

    def begin_step(self, step: int) -> None:
        """Do what is due before a step, counted through the whole run; all ranks call it before each step."""
        self.anchoring.begin_step(step, self.teacher.backbone)

    def prepare_for_distributed_training(
        self,
        device: torch.device,
        *,
        strategy: str,
        param_dtype: torch.dtype,
        reduce_dtype: torch.dtype,
        hybrid_shard_size: int | None = None,
    ) -> None:
        """Shard student and teacher, module by module, and make their memory on the device; values come afterwards.

        The model must have been built on the meta device, so that no rank ever holds a whole network.
        """
        assert all(param.is_meta for param in self.parameters()), "values set before sharding would be lost"
        self.autocast_dtype = param_dtype
        for networks in (self.student, self.teacher, self.anchoring.networks):
            for module in networks.values():
                shard(
                    module,
                    strategy=strategy,
                    param_dtype=param_dtype,
                    reduce_dtype=reduce_dtype,
                    hybrid_shard_size=hybrid_shard_size,
                )
        self.to_empty(device=device)

    def init_weights(self, seed: int, *, given: Mapping[str, State] | None = None) -> None:
        """Fill student and teacher equally, sharded or not; all ranks call it, rank 0 draws and reads for all.

        Args:
            seed: of a generator of their own, from which weights are drawn, module by module.
            given: for modules of the student, e.g. `backbone`, tensors to be used instead; rank 0's count. A module
                that is given whole is not drawn.

        Raises:
            CheckpointError: a given tensor cannot be read, on all ranks together.
        """
        generator = torch.Generator().manual_seed(seed)
        networks: dict[str, nn.Module] = {}
        if is_main_process():
            with torch.device("meta"):
                networks = dict(self._build_networks())

        def state_of(name: str) -> State | None:
            """Give rank 0 a module's tensors, whose memory no name holds longer than they are used."""
            return whole_state(networks.pop(name), (given or {}).get(name, {}), generator) if networks else None

        for name, module in self.student.items():
            load_full_state_dict(module, state_of(name), read=lambda stored: stored.read())
        copy_local_state(self.teacher, self.student)
        self.anchoring.copy_from(self.teacher.backbone)
        self.dino_loss.init_weights()
        self.ibot_patch_loss.init_weights()

    def change_head(self, name: str, change: Callable[[DINOHead], None]) -> None:
        """Change a head of the student and of the teacher; all ranks call it.

        Args:
            name: dino_head or ibot_head.
            change: gets the whole head, on the CPU; called on rank 0 alone.
        """
        state = full_state_dict(self.student[name])

        def changed() -> None:
            with torch.device("meta"):
                head = self._build_networks()[name]
            head.to_empty(device="cpu").load_state_dict(state)
            change(head)
            state.update(head.state_dict())

        on_main_first(changed)
        load_full_state_dict(self.student[name], state)
        copy_local_state(self.teacher[name], self.student[name])

    def train(self, mode: bool = True) -> "SSLMetaArch":
        """Set the student's mode; the teacher and frozen networks stay in evaluation mode."""
        super().train(mode)
        keep_frozen_statistics(self.student)
        self.teacher.eval()
        return self

    def forward_backward(
        self,
        images: dict[str, Tensor],
        *,
        teacher_temp: float,
        dino_local_loss_weight: float = 1.0,
        gram_loss_weight: float = 1.0,
        freeze_backbone: bool = False,
        backprop: Callable[[Tensor], None] = Tensor.backward,
    ) -> dict[str, Tensor]:
        """Compare the student on masked and local crops with the teacher on whole ones, and add up gradients.

        Args:
            images: a finished batch: collated_global_crops [2 * B, C, H, W] and collated_local_crops [L * B, C, h, w],
                float32, crop-major; collated_masks [2 * B, N] bool; mask_indices_list [M], positions in the flattened
                masks; masks_weight [M], 1 / (masked patches of the patch's image); where they are used,
                collated_gram_teacher_crops [2 * B, C, ., .], and seeds of the samples, [B] int64, on any device.
            teacher_temp: teacher temperature, > 0.
            dino_local_loss_weight: factor on the local crops' part of the DINO loss, >= 0.
            gram_loss_weight: factor on the Gram loss, >= 0, where the config asks for it.
            freeze_backbone: pass through the student's backbone without gradients; only the heads get some.
            backprop: called with the total loss; scales it where gradients are accumulated or in float16.

        Returns:
            0-dim tensors without gradient: total_loss, each loss before its weight, and signs of collapse. The losses
            are means, as DINOv3 records them, of cross-entropies over pairs of crops or over masked patches (KoLeo:
            over the global crops), so they can be compared between runs whose weights and numbers of crops differ;
            log K is a uniform guess. DINOv2 records them weighed by pairs of crops, KoLeo with its weight, iBOT halved.
        """
        anchor_weights = _NO_ANCHORS  # a frozen backbone is where it is
        if not freeze_backbone:
            anchor_weights = AnchorWeights(
                gram=gram_loss_weight, cls=self.anchor_cls_weight, patch=self.anchor_patch_weight
            )
        with torch.autocast(
            images["collated_global_crops"].device.type,
            dtype=self.autocast_dtype,
            enabled=self.autocast_dtype != torch.float32,
        ):
            targets = self.teacher_targets(images, teacher_temp=teacher_temp, anchor_weights=anchor_weights)
            total, metrics = self.student_losses(
                images, targets, dino_local_loss_weight=dino_local_loss_weight, freeze_backbone=freeze_backbone
            )
        backprop(total)
        metrics |= {
            "total_loss": total.detach(),
            **targets.signs,
            "dino_center_norm": self.dino_loss.center.norm(),
            "ibot_center_norm": self.ibot_patch_loss.center.norm(),
        }
        return metrics

    @torch.no_grad()
    def teacher_targets(
        self, images: dict[str, Tensor], *, teacher_temp: float, anchor_weights: AnchorWeights = _NO_ANCHORS
    ) -> TeacherTargets:
        """Assign the class tokens of both global crops, and the patches that the student will not see."""
        tokens = self.teacher.backbone(images["collated_global_crops"], is_training=True)
        cls, patches = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]
        cls_targets = self._assign(self.dino_loss, self.teacher.dino_head, cls, teacher_temp)
        patch_targets = None
        if self.ibot_loss_weight > 0:
            masked = patches.flatten(0, 1).index_select(0, images["mask_indices_list"])  # [M, D]
            masks = images["collated_masks"]
            patch_targets = self._assign(self.ibot_patch_loss, _patch_head(self.teacher), masked, teacher_temp, masks)
        signs = signs_of_crops(images["collated_global_crops"]) | signs_of_features(cls) | signs_of_targets(cls_targets)
        signs["patch_norm"] = patches.float().norm(dim=-1).mean()
        anchors = self.anchoring.targets(images, weights=anchor_weights, teacher_patches=patches)
        return TeacherTargets(cls=cls_targets, patch=patch_targets, anchors=anchors, signs=signs)

    def student_losses(
        self,
        images: dict[str, Tensor],
        targets: TeacherTargets,
        *,
        dino_local_loss_weight: float = 1.0,
        freeze_backbone: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of all losses and, by name, each loss before its weight."""
        crops, masks = [images["collated_global_crops"]], [images["collated_masks"]]
        if self.num_local_crops:
            crops.append(images["collated_local_crops"])
            masks.append(None)
        with at_rest(self.student.backbone) if freeze_backbone else nullcontext():
            tokens = self.student.backbone(crops, masks=masks, is_training=True)
        cls = torch.cat([t["x_norm_clstoken"] for t in tokens])  # [(2 + L) * B, D]
        global_cls = tokens[0]["x_norm_clstoken"]  # [2 * B, D]

        criterion = self.dino_loss.criterion(
            targets.cls,
            num_local_crops=self.num_local_crops,
            ignore_diagonal=self.dino_global_ignore_diagonal,
            local_weight=dino_local_loss_weight,
        )
        dino, local_loss, global_loss = self.student.dino_head(cls, criterion)
        total = self.dino_loss_weight * dino
        metrics = {
            "dino_local_crops_loss": local_loss,
            "dino_local_loss_weight": total.new_full((), dino_local_loss_weight),
            "dino_global_crops_loss": global_loss,
            **signs_of_student(global_cls),
        }

        if self.koleo_loss_weight > 0:
            koleo = sum(self.koleo_loss(crop) for crop in global_cls.chunk(_NUM_GLOBAL_CROPS))
            self.koleo_loss.remember(global_cls)
            total = total + self.koleo_loss_weight * koleo
            metrics["koleo_loss"] = koleo.detach() / _NUM_GLOBAL_CROPS

        if targets.patch is not None:
            masked = tokens[0]["x_norm_patchtokens"].flatten(0, 1).index_select(0, images["mask_indices_list"])
            criterion = self.ibot_patch_loss.criterion(
                targets.patch, masks_weight=images["masks_weight"], num_images=len(global_cls)
            )
            (ibot,) = _patch_head(self.student)(masked, criterion)
            total = total + self.ibot_loss_weight * ibot
            metrics["ibot_loss"] = ibot.detach()

        anchored, of_anchors = self.anchoring(tokens[0], targets.anchors, images)
        return total + anchored, metrics | of_anchors

    def _assign(
        self,
        loss: DINOLoss | iBOTPatchLoss,
        head: DINOHead,
        tokens: Tensor,
        teacher_temp: float,
        masks: Tensor | None = None,
    ) -> Assignments:
        """Assign tokens by the configured rule; with softmax-centring their scores also count for the next centre.

        With queues, Sinkhorn-Knopp also sees earlier class tokens or, given the masks [2 * B, N], earlier patches.
        """
        if self.centering != "sinkhorn_knopp":
            scores = head(tokens)
            loss.update_center(scores)
            return loss.softmax_center_teacher(scores, teacher_temp)
        queue = self.queues.get("cls" if masks is None else "patch")
        if queue is None:
            return loss.sinkhorn_knopp_teacher(head(tokens), teacher_temp)
        features, scores, past = head(tokens, score_with_past(queue))
        if masks is not None:
            features = one_patch_of_each_crop(features, masks, first_image=get_rank() * len(masks) // 2)
        queue.push(features)
        return loss.sinkhorn_knopp_teacher(scores, teacher_temp, past=past)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student: teacher = momentum * teacher + (1 - momentum) * student.

        With low-rank updates, the student is the plain network that computes the same.
        Statistics of batch normalisation are averaged over ranks and copied; other buffers are constant and equal.
        """
        for name, module in self.teacher.items():
            move_towards(module, self.student[name], share=1 - momentum)
        average_statistics(self.student)
        copy_statistics(self.teacher, self.student)

    def apply_center_updates(self) -> None:
        """Let the centres and queues take in the scores and features of this step."""
        self.dino_loss.apply_center_update()
        self.ibot_patch_loss.apply_center_update()
        self.queues.keep()

    def discard_center_updates(self) -> None:
        """Forget the scores and features of this step, when it is cancelled."""
        self.dino_loss.discard_center_update()
        self.ibot_patch_loss.discard_center_update()
        self.queues.discard()

    def discard_batch_statistics(self) -> None:
        """Take back what the forward passes of a cancelled step did to the student's batch normalisation."""
        copy_statistics(self.student, self.teacher)  # equal since the end of the step before


def _patch_head(networks: nn.ModuleDict) -> DINOHead:
    return networks["ibot_head"] if "ibot_head" in networks else networks["dino_head"]
