"""Settings of the networks but for the backbone: starting weights, precision and sharding, heads, losses, teacher.

The comment of a field gives its unit and range, and where a number comes from. `python -m dinov2.configs` writes these
comments into configs/ssl_default_config.yaml. Defaults are DINOv2's (arXiv:2304.07193 and its released configs).
"""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dinov2.configs.section import Section, is_range, require_rising_and_falling


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Where all networks start from."""

    KEY: ClassVar[str] = "MODEL"

    WEIGHTS: str = ""  # file with weights for the whole model, loaded at iteration 0; empty: none


@dataclass(frozen=True, kw_only=True)
class ComputePrecisionConfig(Section):
    """Device, number formats and how parameters are spread over the ranks."""

    KEY: ClassVar[str] = "compute_precision"

    device: str = "auto"  # auto | cpu | cuda | cuda:N; auto: the local rank's GPU if there is one, else the CPU
    param_dtype: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # of the forward pass; auto: bf16 if the GPU has it, else fp32
    )
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"  # of gradients while they are summed over ranks
    # NO_SHARD: whole copies; SHARD_GRAD_OP: gradients and optimiser state split; FULL_SHARD: parameters too;
    # HYBRID_SHARD: split within groups of hybrid_shard_size ranks, copied between groups
    sharding_strategy: Literal["NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD"] = "SHARD_GRAD_OP"
    hybrid_shard_size: int | None = None  # ranks, >= 1, HYBRID_SHARD only; null: the ranks of one node
    grad_scaler: bool = True  # scale the loss so that small gradients survive; acts with fp16 only

    def __post_init__(self) -> None:
        self.require("device", bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)), "auto, cpu, cuda or cuda:N")
        self.require("hybrid_shard_size", (self.hybrid_shard_size or 1) >= 1, "at least 1 rank, or null")


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Section):
    """Keys that the DINO and the iBOT head share."""

    loss_weight: float = 1.0  # factor, >= 0; 0: this loss is off
    head_n_prototypes: int = 65536  # outputs of the head, >= 2
    head_bottleneck_dim: int = 256  # width before the prototypes, >= 1
    head_nlayers: int = 3  # layers of the head's MLP, >= 1
    head_hidden_dim: int = 2048  # width of the hidden layers, >= 1
    # where prototypes and MLP start in a new run without weights for this head; kmeans: the MLP as the projection of
    # features to their main axes, prototypes as the centres of the training images' clusters there; random: noise
    prototype_init: Literal["random", "kmeans"] = "random"
    head_weight_norm: bool = True  # true: prototypes are weight_g * unit weight_v; false: one plain matrix

    def __post_init__(self) -> None:
        self.require("loss_weight", self.loss_weight >= 0, "at least 0")
        self.require("head_n_prototypes", self.head_n_prototypes >= 2, "at least 2")
        for name in ("head_bottleneck_dim", "head_nlayers", "head_hidden_dim"):
            self.require(name, getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class LocalLossWeightConfig(Section):
    """Weight of the local crops over the run, with dino.reweight_dino_local_loss (arXiv:2508.10104)."""

    KEY: ClassVar[str] = "dino.local_loss_weight_schedule"

    start: float = 0.5  # factor at the first step, >= 0; linear to peak
    peak: float = 0.5  # factor after the warm-up, >= 0; cosine to end
    end: float = 0.5  # factor after the cosine, >= 0
    warmup_epochs: int = 0  # epochs from start to peak, >= 0
    cosine_epochs: int | None = None  # epochs from peak to end, >= 0; null: to the end of the run

    def __post_init__(self) -> None:
        require_rising_and_falling(self)


@dataclass(frozen=True, kw_only=True)
class DinoConfig(HeadConfig):
    """Loss between class tokens of crops, its head, and the KoLeo regulariser."""

    KEY: ClassVar[str] = "dino"

    koleo_loss_weight: float = 0.1  # factor, >= 0; 0: off (arXiv:1806.03198)
    koleo_loss_distributed: bool = False  # look for the nearest neighbour in all ranks' images, not only in this rank's
    koleo_topk: int = 1  # nearest neighbours that each image is pushed from, >= 1; above 1 with koleo_loss_distributed
    # images among which koleo_loss_distributed looks for neighbours, >= 1, a divisor of the images of all ranks; null:
    # those of all ranks
    koleo_distributed_loss_group_size: int | None = None
    # images of earlier passes of all ranks, 2 crops each, that are further neighbours, >= 0; at most a quarter of the
    # dataset's, or too many would be pushed from an earlier view of themselves; 0: none
    koleo_queue_size: int = 0
    global_ignore_diagonal: bool = True  # a global crop is compared with the other global crop only, not with itself
    reweight_dino_local_loss: bool = False  # true: local crops are weighted by local_loss_weight_schedule
    local_loss_weight_schedule: LocalLossWeightConfig = field(default_factory=LocalLossWeightConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("koleo_loss_weight", self.koleo_loss_weight >= 0, "at least 0")
        self.require("koleo_topk", self.koleo_topk >= 1, "at least 1")
        self.require("koleo_queue_size", self.koleo_queue_size >= 0, "at least 0 images")
        alone = self.koleo_topk == 1 or self.koleo_loss_distributed
        self.require("koleo_topk", alone, "1, or set dino.koleo_loss_distributed=true")
        size = self.koleo_distributed_loss_group_size
        self.require("koleo_distributed_loss_group_size", size is None or size >= 1, "at least 1 image, or null")


@dataclass(frozen=True, kw_only=True)
class IbotConfig(HeadConfig):
    """Loss on masked patches and its head (arXiv:2111.07832)."""

    KEY: ClassVar[str] = "ibot"

    mask_sample_probability: float = 0.5  # share of global crops that are masked, 0..1
    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)  # smallest and largest share of masked patches, 0..1
    separate_head: bool = False  # true: an own head from this section's head_* keys; false: the DINO head serves both

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("mask_sample_probability", 0 <= self.mask_sample_probability <= 1, "in 0..1")
        self.require("mask_ratio_min_max", is_range(self.mask_ratio_min_max, 0, 1), "two rising numbers in 0..1")
        if self.loss_weight > 0:
            hint = f"above 0 (or set {self.KEY}.loss_weight=0)"
            self.require("mask_sample_probability", self.mask_sample_probability > 0, hint)
            self.require("mask_ratio_min_max", self.mask_ratio_min_max[1] > 0, hint)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Section):
    """The moving average of the student, and how sharp its targets are."""

    KEY: ClassVar[str] = "teacher"

    momentum_teacher: float = 0.992  # share of the old teacher kept in a step, 0..1, at the start; cosine to the next
    final_momentum_teacher: float = 1.0  # the same at the end
    warmup_teacher_temp: float = 0.04  # temperature of the targets at the start, > 0; rises linearly to teacher_temp
    teacher_temp: float = 0.07  # temperature of the targets after the warm-up, > 0
    warmup_teacher_temp_epochs: int = 30  # epochs, >= 0

    def __post_init__(self) -> None:
        for name in ("momentum_teacher", "final_momentum_teacher"):
            self.require(name, 0 <= getattr(self, name) <= 1, "in 0..1")
        for name in ("warmup_teacher_temp", "teacher_temp"):
            self.require(name, getattr(self, name) > 0, "above 0")
        self.require("warmup_teacher_temp_epochs", self.warmup_teacher_temp_epochs >= 0, "at least 0")
