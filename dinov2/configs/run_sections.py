"""Settings of a run: data and batch, optimiser and schedules, checkpoints, logging.

The comment of a field gives its unit and range, and where a number comes from. Defaults are DINOv2's (arXiv:2304.07193
and its released configs). A step is an optimiser step; an epoch is train.OFFICIAL_EPOCH_LENGTH steps.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dinov2.configs.parts import require_part_names
from dinov2.configs.section import Section, nearest_multiples
from dinov2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """What is trained on, how much at a time, and where the run lives."""

    KEY: ClassVar[str] = "train"

    batch_size_per_gpu: int = 64  # images of one rank in one accumulation step, >= 1
    # images of one step over all ranks and accumulation steps, >= 1, a multiple of their product; it overrules
    # batch_size_per_gpu; null: what batch_size_per_gpu gives
    global_batch_size: int | None = None
    dataset_path: str = ""  # training images: Name:key=value:..., e.g. ImageFolder:root=photos
    output_dir: str = "."  # folder of the run
    seed: int = 0  # of weights, order, crops and masks, >= 0
    num_workers: int = 10  # loader processes of one rank, >= 0; results do not depend on it
    OFFICIAL_EPOCH_LENGTH: int | None = 1250  # steps, >= 1; null: images of the dataset // global batch size
    centering: Literal["centering", "sinkhorn_knopp"] = "centering"  # how the teacher's targets are kept from collapse
    # images of earlier passes, 2 crops each, whose teacher features take part in sinkhorn_knopp, so that the few images
    # of a pass need not use all prototypes, >= 0; of the patches, as many, 1 of each masked crop; 0: none
    sinkhorn_queue_size: int = 0
    prototype_init_crops: int = 4096  # crops that prototype_init=kmeans looks at, >= 2; at most 4 of each image
    # compute cheap results of the student's blocks again in the backward pass instead of keeping them, for less memory
    # and the same values: norms, activations, sums, rotations; not matrix products and attention
    checkpointing: bool = False
    # keep nothing but what goes into each block, with or without train.checkpointing: the least memory, at the cost of
    # a second forward pass of the student's backbone
    checkpointing_full: bool = False
    # let torch.compile make kernels for the blocks, which takes minutes at the start and needs a C compiler, for CUDA
    # Triton too; the values are the same but for rounding. Where it cannot work, a warning says so, and the blocks run
    # as they are. DINOv3's files set true
    compile: bool = False
    # what torch.compile aims at; reduce-overhead: CUDA graphs, without optim.gradient_accumulation_steps;
    # max-autotune-no-cudagraphs: the fastest kernels that it finds by trying, perhaps others at the next start
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = "default"
    compile_target: Literal["student", "teacher", "both"] = "both"  # whose backbone is compiled
    on_bad_image: Literal["error", "skip"] = "error"  # image that cannot be read: stop, or take another
    # epoch: each pass over the images in a new order, those behind its last whole batch left out; infinite: passes
    # follow without a gap, each visits each image once; sharded_infinite: the same without a list of all in memory
    sampler: Literal["epoch", "infinite", "sharded_infinite"] = "sharded_infinite"
    resume: bool = True  # go on from the newest complete checkpoint of output_dir
    resume_path: str | None = None  # checkpoint of another run to go on from; {rank} stands for the rank; null: none
    max_steps: int | None = None  # stop after this step, >= 1, schedules unchanged; null: at the end of optim.epochs

    def __post_init__(self) -> None:
        self.require("batch_size_per_gpu", self.batch_size_per_gpu >= 1, "at least 1 image")
        for name, unit in (("global_batch_size", "image"), ("OFFICIAL_EPOCH_LENGTH", "step"), ("max_steps", "step")):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, f"at least 1 {unit}, or null")
        self.require("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63")
        self.require("num_workers", self.num_workers >= 0, "at least 0")
        self.require("sinkhorn_queue_size", self.sinkhorn_queue_size >= 0, "at least 0 images")
        is_used = self.centering == "sinkhorn_knopp" or not self.sinkhorn_queue_size
        self.require("sinkhorn_queue_size", is_used, "0, or set train.centering=sinkhorn_knopp")
        self.require("prototype_init_crops", self.prototype_init_crops >= 2, "at least 2")
        self.require("output_dir", self.output_dir != "", "a folder, e.g. outputs/run1")
        has_home = self.output_dir.startswith("~")
        self.require("output_dir", not has_home, "written without ~, which only a shell replaces; use ${oc.env:HOME}")

    @property
    def recomputation(self) -> Literal["none", "selective", "full"]:
        """What the student's blocks do not keep for the backward pass."""
        return "full" if self.checkpointing_full else "selective" if self.checkpointing else "none"

    @property
    def compiled(self) -> tuple[Literal["student", "teacher"], ...]:
        """Whose blocks are to run compiled."""
        networks = ("student", "teacher") if self.compile_target == "both" else (self.compile_target,)
        return networks if self.compile else ()


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """Optimiser, learning rate, weight decay and their schedules."""

    KEY: ClassVar[str] = "optim"

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"  # adam and sgd add weight decay to the gradient
    epochs: int = 100  # length of the run and of its schedules, >= 1
    weight_decay: float = 0.04  # at the start, >= 0; cosine to weight_decay_end
    weight_decay_end: float = 0.4  # at the end, >= 0
    base_lr: float = 0.004  # peak learning rate at the batch size that scaling_rule names, >= 0
    warmup_epochs: int = 10  # epochs of linear rise from 0 to the peak, 0..epochs
    min_lr: float = 1.0e-06  # learning rate at the end of the cosine, >= 0; not scaled
    # the cosines of learning rate, weight decay and momentum are drawn 1 + this as long, cut at epochs and stretched to
    # their final values, so that they end steeper, >= 0
    schedule_trunc_extra: float = 0.0
    clip_grad: float | None = 3.0  # largest gradient norm of a sub-module, >= 0; 0 or null: no clipping
    freeze_last_layer_epochs: int = 1  # epochs in which the heads' last layers stay as they are, >= 0
    # epochs, whole or not, in which the backbone stays as it is and runs without gradient, while new heads settle, >= 0
    freeze_backbone_epochs: float = 0.0
    # epochs, whole or not, in which the backbone's learning rate then rises linearly from 0 to what it would be, >= 0
    unfreeze_ramp_epochs: float = 0.0
    # parts of the backbone that stay as they are for the whole run: patch_embed (of a ResNet: its first convolution and
    # norm), pos_embed, cls_token, registers, mask_token, embeddings (all of these), norms, layerscale, attention, mlp,
    # and blocks, counted from 0: blocks:3, blocks:0-5. What embeddings and the lowest blocks compute needs no gradient
    # then, which saves their memory and the time of their backward pass
    freeze: tuple[str, ...] = ()
    # peak learning rate; sqrt_wrt_1024: base_lr * sqrt(global batch / 1024); linear_wrt_256: base_lr * global batch /
    # 256; none: base_lr
    scaling_rule: Literal["sqrt_wrt_1024", "linear_wrt_256", "none"] = "sqrt_wrt_1024"
    backbone_lr_multiplier: float = 1.0  # factor on the learning rate of the backbone, >= 0; 0: it stays as it is
    head_lr_multiplier: float = 1.0  # factor on the learning rate of the heads, >= 0
    patch_embed_lr_mult: float = 0.2  # factor on the learning rate of the patch embedding, >= 0
    dino_head_wd_multiplier: float = 1.0  # factor on the weight decay of the DINO head, >= 0
    layerwise_decay: float = (
        0.9  # factor on the learning rate from one block to the block below it, above 0 and up to 1
    )
    adamw_beta1: float = 0.9  # averaging of gradients in adamw and adam, 0..1 (1 excluded)
    adamw_beta2: float = 0.999  # averaging of squared gradients in adamw and adam, 0..1 (1 excluded)
    sgd_momentum: float = 0.9  # 0..1 (1 excluded)
    gradient_accumulation_steps: int = 1  # batches whose gradients are summed into one step, >= 1

    def __post_init__(self) -> None:
        self.require("epochs", self.epochs >= 1, "at least 1")
        for name in (
            "warmup_epochs",
            "weight_decay",
            "weight_decay_end",
            "base_lr",
            "min_lr",
            "freeze_last_layer_epochs",
            "freeze_backbone_epochs",
            "unfreeze_ramp_epochs",
            "backbone_lr_multiplier",
            "head_lr_multiplier",
            "schedule_trunc_extra",
            "patch_embed_lr_mult",
            "dino_head_wd_multiplier",
        ):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("clip_grad", (self.clip_grad or 0) >= 0, "at least 0, or null")
        self.require("layerwise_decay", 0 < self.layerwise_decay <= 1, "above 0 and at most 1")
        for name in ("adamw_beta1", "adamw_beta2", "sgd_momentum"):
            self.require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        require_part_names(self, "freeze")
        self.require("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointingConfig(Section):
    """When the whole state of a run is saved and what is kept."""

    KEY: ClassVar[str] = "checkpointing"

    period: int = 3750  # steps between saves, >= 1
    period_minutes: float | None = None  # minutes, > 0; also save when so long has passed since the last; null: never
    max_to_keep: int | None = 3  # complete checkpoints kept, >= 2; null: all
    keep_every: int | None = None  # steps, a multiple of period; such checkpoints are never removed; null: none
    # score of the evaluations, e.g. knn_top1_pct: the checkpoint with the best one is kept, whatever max_to_keep;
    # null: none
    save_best: str | None = None
    save_best_mode: Literal["max", "min"] = "max"  # which score is the best: the largest or the smallest
    copy_to: str | None = None  # second folder, on another disk, that gets a copy of each checkpoint; null: none
    background: bool = True  # true: training goes on while a checkpoint is written; false: it waits

    def __post_init__(self) -> None:
        self.require("period", self.period >= 1, "at least 1 step")
        self.require("period_minutes", self.period_minutes is None or self.period_minutes > 0, "above 0, or null")
        self.require(
            "max_to_keep", self.max_to_keep is None or self.max_to_keep >= 2, "at least 2, or null to keep all"
        )
        self.require("keep_every", self.keep_every is None or self.keep_every >= 1, "at least 1 step, or null")
        if self.keep_every is not None and self.keep_every % self.period:
            raise ConfigError(
                f"checkpointing.keep_every={self.keep_every} is not a multiple of checkpointing.period={self.period}; "
                f"use {nearest_multiples(self.keep_every, self.period)}"
            )
        has_home = self.copy_to is not None and self.copy_to.startswith("~")
        self.require("copy_to", not has_home, "written without ~, which only a shell replaces; use ${oc.env:HOME}")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """Who is told about the progress of a run, and how often."""

    KEY: ClassVar[str] = "logging"

    period_steps: int = 10  # steps between log lines, >= 1
    tensorboard: bool = False  # also write TensorBoard files; needs the extra tensorboard
    wandb: bool = False  # also send to Weights & Biases; needs the extra wandb
    wandb_project: str = "dinov2-adapt"  # project there

    def __post_init__(self) -> None:
        self.require("period_steps", self.period_steps >= 1, "at least 1 step")
        self.require("wandb_project", self.wandb_project != "", "a project name")
