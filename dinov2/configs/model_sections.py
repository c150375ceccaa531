"""Settings of the networks: starting weights, precision and sharding, heads, student, teacher.

The comment of a field gives its unit and range, and where a number comes from. `python -m dinov2.configs` writes these
comments into configs/ssl_default_config.yaml. Defaults are DINOv2's (arXiv:2304.07193 and its released configs).
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from dinov2.configs.section import Section, is_range
from dinov2.errors import ConfigError

# Width and attention heads of each named size; the same as in dinov2.models, which this package does not import.
ARCH_WIDTH_AND_HEADS = {
    "vit_tiny": (192, 3),
    "vit_small": (384, 6),
    "vit_base": (768, 12),
    "vit_large": (1024, 16),
    "vit_giant2": (1536, 24),
}


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

    def __post_init__(self) -> None:
        self.require("loss_weight", self.loss_weight >= 0, "at least 0")
        self.require("head_n_prototypes", self.head_n_prototypes >= 2, "at least 2")
        for name in ("head_bottleneck_dim", "head_nlayers", "head_hidden_dim"):
            self.require(name, getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class DinoConfig(HeadConfig):
    """Loss between class tokens of crops, its head, and the KoLeo regulariser."""

    KEY: ClassVar[str] = "dino"

    koleo_loss_weight: float = 0.1  # factor, >= 0; 0: off (arXiv:1806.03198)
    koleo_loss_distributed: bool = False  # look for the nearest neighbour in all ranks' images, not only in this rank's

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("koleo_loss_weight", self.koleo_loss_weight >= 0, "at least 0")


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
class StudentConfig(Section):
    """The backbone; the teacher has the same one, without stochastic depth."""

    KEY: ClassVar[str] = "student"

    # width, blocks, heads: vit_tiny 192, 12, 3; vit_small 384, 12, 6; vit_base 768, 12, 12; vit_large 1024, 24, 16;
    # vit_giant2 1536, 40, 24
    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"] = "vit_large"
    patch_size: int = 16  # px, >= 1; both crop sizes must be multiples of it
    in_chans: int = 3  # channels of an image, >= 1
    embed_dim: int | None = None  # width, >= 1, a multiple of num_heads; null: that of arch
    depth: int | None = None  # blocks, >= 1; null: that of arch
    num_heads: int | None = None  # attention heads, >= 1; null: that of arch
    drop_path_rate: float = 0.3  # chance that a block skips an image, 0..1 (1 excluded)
    drop_path_uniform: bool = True  # true: the same chance in all blocks; false: rising from 0 to drop_path_rate
    layerscale: float | None = 1.0e-05  # first value of LayerScale, >= 0; 0 or null: no LayerScale
    pretrained_weights: str = ""  # file with a backbone for student and teacher to start from; empty: random
    ffn_layer: Literal["mlp", "swiglu", "swiglufused"] = "mlp"  # feed-forward part of a block
    qkv_bias: bool = True  # bias of the query, key and value projection
    proj_bias: bool = True  # bias of the attention's output projection
    ffn_bias: bool = True  # bias of the feed-forward part
    num_register_tokens: int = 0  # extra tokens, >= 0 (arXiv:2309.16588; the released _reg models have 4)
    interpolate_antialias: bool = False  # antialias when pos_embed is resized; the released _reg models: true
    interpolate_offset: float = 0.1  # added to the size when pos_embed is resized, >= 0; the _reg models: 0.0
    attention_backend: Literal["auto", "sdpa", "xformers"] = "auto"  # auto: sdpa, PyTorch's own

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_chans"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("embed_dim", "depth", "num_heads"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "at least 1, or null")
        self.require("drop_path_rate", 0 <= self.drop_path_rate < 1, "at least 0 and below 1")
        self.require("layerscale", (self.layerscale or 0) >= 0, "at least 0, or null")
        self.require("num_register_tokens", self.num_register_tokens >= 0, "at least 0")
        self.require("interpolate_offset", self.interpolate_offset >= 0, "at least 0")
        self._require_whole_heads()

    def _require_whole_heads(self) -> None:
        arch_width, arch_heads = ARCH_WIDTH_AND_HEADS[self.arch]
        width, heads = self.embed_dim or arch_width, self.num_heads or arch_heads
        if width % heads:
            raise ConfigError(
                f"student.embed_dim={width} is not a multiple of student.num_heads={heads} "
                f"(student.arch={self.arch} has {arch_width} and {arch_heads}); set both"
            )


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
