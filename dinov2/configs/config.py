"""The root of all settings, and the checks that need more than one section."""

import os
from dataclasses import dataclass, field

from dinov2.configs.adaptation_sections import START_WEIGHTS, AnchorConfig, GramConfig, GuardRailsConfig, LoraConfig
from dinov2.configs.data_sections import AugmentationConfig, CropsConfig, DataConfig
from dinov2.configs.default_layers import Family
from dinov2.configs.evaluation_sections import EvaluationConfig
from dinov2.configs.model_sections import (
    ComputePrecisionConfig,
    DinoConfig,
    IbotConfig,
    ModelConfig,
    TeacherConfig,
)
from dinov2.configs.parts import require_parts
from dinov2.configs.run_sections import (
    CheckpointingConfig,
    LoggingConfig,
    OptimConfig,
    TrainConfig,
)
from dinov2.configs.schedule_sections import SchedulesConfig
from dinov2.configs.section import nearest_multiples, show_value
from dinov2.configs.stage_section import StageConfig
from dinov2.configs.student_section import StudentConfig
from dinov2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run, checked; read as `cfg.train.seed`. Never changed after it is built."""

    # whose defaults hold where nothing is set; a file with MODEL.META_ARCHITECTURE and without this key is of dinov3
    defaults: Family = "dinov2"
    MODEL: ModelConfig = field(default_factory=ModelConfig)
    compute_precision: ComputePrecisionConfig = field(default_factory=ComputePrecisionConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    ibot: IbotConfig = field(default_factory=IbotConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    guard_rails: GuardRailsConfig = field(default_factory=GuardRailsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedules: SchedulesConfig | None = None
    crops: CropsConfig = field(default_factory=CropsConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    # parts of the run, one after the other, each a mapping of name, epochs and what is not as outside of stages, of the
    # sections optim, teacher, schedules, crops and augmentation, the losses' weights, masks, batch sizes, lengths of an
    # epoch and evaluation.eval_period_iterations: [{name: heads, epochs: 2, optim: {base_lr: 1e-3}}, {name: adapt}];
    # on the command line also stages.heads.epochs=3. Schedules, and all that counts in epochs, begin anew with each
    # stage; steps are counted through. Networks, optimiser, evaluations and folder are one; []: one stage
    stages: tuple[StageConfig, ...] = ()
    # What loading has to say about the parents' keys, one sentence each; a program logs them once logging is set up.
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    # Settings of the parents that training cannot honour, one sentence each; see `require_trainable`.
    refusals: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        self._require_patch_tokens()
        self._require_blocks_to_compute_again()
        self._require_gradients_of_one_pass()
        self._require_whole_patches()
        self._require_something_to_learn()
        self._require_a_statistic_per_channel()
        self._require_whole_accumulation_steps()
        self._require_schedules_within_the_run()
        self._require_parts_to_train()
        self._require_one_source_of_gram_features()
        self._require_evaluations_for_the_best()
        self._require_another_folder_for_copies()

    def _require_patch_tokens(self) -> None:
        if not self.student.is_resnet:
            return
        for is_on, use, setting in (
            (self.ibot.loss_weight > 0, "mask", "ibot.loss_weight=0"),
            (self.gram.use_loss, "compare", "gram.use_loss=false"),
            (self.anchor.patch_weight > 0, "anchor", "anchor.patch_weight=0"),
        ):
            if is_on:
                raise ConfigError(f"student.arch={self.student.arch} has no patch tokens to {use}; set {setting}")

    def _require_blocks_to_compute_again(self) -> None:
        for name in ("checkpointing", "checkpointing_full"):
            if self.student.is_resnet and getattr(self.train, name):
                raise ConfigError(
                    f"train.{name}=true computes blocks twice, which would count each batch twice in the statistics of "
                    f"student.arch={self.student.arch}; set train.{name}=false"
                )

    def _require_gradients_of_one_pass(self) -> None:
        train, passes = self.train, self.optim.gradient_accumulation_steps
        if train.compile and train.compile_mode == "reduce-overhead" and passes > 1:
            raise ConfigError(
                f"train.compile_mode=reduce-overhead would overwrite the gradients of the passes before with "
                f"optim.gradient_accumulation_steps={passes}; set train.compile_mode=default"
            )

    def _require_whole_patches(self) -> None:
        if self.student.is_resnet:
            return
        sizes = {"crops.global_crops_size": self.crops.global_crops_size}
        if self.crops.local_crops_number > 0:
            sizes["crops.local_crops_size"] = self.crops.local_crops_size
        if self.gram.use_loss and self.crops.gram_teacher_crops_size is not None:
            sizes["crops.gram_teacher_crops_size"] = self.crops.gram_teacher_crops_size
        if self.evaluation.knn.image_size_px is not None:
            sizes["evaluation.knn.image_size_px"] = self.evaluation.knn.image_size_px
        patch = self.student.patch_size
        for key, size in sizes.items():
            if size % patch:
                raise ConfigError(
                    f"{key}={size} is not a multiple of student.patch_size={patch}; "
                    f"use {nearest_multiples(size, patch)}"
                )

    def _require_something_to_learn(self) -> None:
        weights = (self.dino.loss_weight, self.dino.koleo_loss_weight, self.ibot.loss_weight)
        if not any(weights):
            raise ConfigError(
                "dino.loss_weight, dino.koleo_loss_weight and ibot.loss_weight are all 0: nothing is learned; "
                "set one above 0"
            )

    def _require_a_statistic_per_channel(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self.augmentation, name)
            if values is not None and len(values) != self.student.in_chans:
                raise ConfigError(
                    f"augmentation.{name}={show_value(values)} has {len(values)} values, "
                    f"but student.in_chans={self.student.in_chans}; give one per channel, or null"
                )

    def _require_whole_accumulation_steps(self) -> None:
        if self.train.global_batch_size is not None:
            batch_size_per_rank(self, world_size=1)

    def _require_schedules_within_the_run(self) -> None:
        epochs = self.optim.epochs
        if self.schedules is None:
            within = self.optim.warmup_epochs <= epochs
            self.optim.require("warmup_epochs", within, f"in 0..{epochs}, the value of optim.epochs")
            schedules = ()
        else:
            schedules = tuple(vars(self.schedules).values())
        if self.gram.use_loss and self.gram.loss_weight_schedule is not None:
            schedules += (self.gram.loss_weight_schedule,)
        for schedule in (*schedules, self.dino.local_loss_weight_schedule):
            warmup, cosine = schedule.warmup_epochs, schedule.cosine_epochs or 0
            is_used = schedule is not self.dino.local_loss_weight_schedule or self.dino.reweight_dino_local_loss
            if is_used and warmup + cosine > epochs:
                raise ConfigError(
                    f"{schedule.KEY}.warmup_epochs={warmup} and cosine_epochs={show_value(schedule.cosine_epochs)} go "
                    f"beyond the end of the run at optim.epochs={epochs}; shorten them"
                )

    def _require_parts_to_train(self) -> None:
        optim, lora = self.optim, self.lora
        require_parts("optim.freeze", optim.freeze, self.student)
        if optim.freeze_backbone_epochs + optim.unfreeze_ramp_epochs > optim.epochs:
            raise ConfigError(
                f"optim.freeze_backbone_epochs={optim.freeze_backbone_epochs:g} and "
                f"unfreeze_ramp_epochs={optim.unfreeze_ramp_epochs:g} go beyond the end of the run at "
                f"optim.epochs={optim.epochs}; shorten them"
            )
        rests = optim.freeze_backbone_epochs or not optim.backbone_lr_multiplier
        if rests and not (self.dino.loss_weight or self.ibot.loss_weight):
            raise ConfigError(
                "dino.loss_weight and ibot.loss_weight are both 0: while the backbone is frozen, nothing is learned; "
                "set one above 0, or optim.freeze_backbone_epochs=0"
            )
        if not lora.rank:
            return
        if self.student.is_resnet:
            raise ConfigError(f"student.arch={self.student.arch} has none of lora.targets; set lora.rank=0")
        require_parts("lora.also_train", lora.also_train, self.student)
        if not (self.MODEL.WEIGHTS or self.student.pretrained_weights or self.train.resume_path):
            raise ConfigError(
                f"lora.rank={lora.rank} makes small changes to given weights, and none are given; name them by "
                f"student.pretrained_weights, or set lora.rank=0"
            )

    def _require_one_source_of_gram_features(self) -> None:
        if self.gram.use_loss and self.gram.ema_teacher and self.crops.gram_teacher_crops_size is not None:
            raise ConfigError(
                f"gram.ema_teacher=true compares with what the teacher sees anyway, so that "
                f"crops.gram_teacher_crops_size={self.crops.gram_teacher_crops_size} has no use; set it to null"
            )

    def _require_evaluations_for_the_best(self) -> None:
        if self.checkpointing.save_best is not None and not self.evaluation.eval_period_iterations:
            raise ConfigError(
                f"checkpointing.save_best={self.checkpointing.save_best} needs evaluations while training; set "
                f"evaluation.eval_period_iterations, or checkpointing.save_best=null"
            )

    def _require_another_folder_for_copies(self) -> None:
        copies = self.checkpointing.copy_to
        if copies is not None and os.path.realpath(copies) == os.path.realpath(self.train.output_dir):
            raise ConfigError(
                f"checkpointing.copy_to={copies} is train.output_dir itself; name another folder, best on another disk"
            )


def batch_size_per_rank(cfg: Config, *, world_size: int, saved_global_batch: int | None = None) -> int:
    """Return how many images one rank takes in one accumulation step.

    Args:
        cfg: `train.global_batch_size` decides if it is set.
        world_size: ranks, >= 1.
        saved_global_batch: images of one step of the run that is continued, which decides next, so that it goes on
            alike on another number of ranks; None: `train.batch_size_per_gpu` does.

    Raises:
        ConfigError: the global batch does not divide by ranks x accumulation steps.
    """
    accumulation = cfg.optim.gradient_accumulation_steps
    batch = cfg.train.global_batch_size or saved_global_batch
    if batch is None:
        return cfg.train.batch_size_per_gpu
    parts = world_size * accumulation
    if batch % parts == 0:
        return batch // parts
    processes = [str(number) for number in range(1, batch + 1) if batch % (number * accumulation) == 0]
    fitting = ", ".join(processes[:-1]) + " or " * (len(processes) > 1) + "".join(processes[-1:]) + " processes"
    factors = f"ranks={world_size} x optim.gradient_accumulation_steps={accumulation}"
    if cfg.train.global_batch_size is not None:
        raise ConfigError(
            f"train.global_batch_size={batch} is not a multiple of {parts} ({factors}); "
            f"use {nearest_multiples(batch, parts)}{f', or {fitting}' if processes else ''}"
        )
    instead = f"use {fitting}" if processes else f"let optim.gradient_accumulation_steps divide {batch}"
    raise ConfigError(
        f"the run to go on with has a global batch of {batch} images, no multiple of {parts} ({factors}); {instead}, "
        f"or set train.global_batch_size to {nearest_multiples(batch, parts)}"
    )


def require_trainable(cfg: Config) -> None:
    """Raise ConfigError if the settings ask for something that training cannot do yet; evaluation may go on."""
    if cfg.refusals:
        first, *others = cfg.refusals
        keys = ", ".join(sentence.partition("=")[0] for sentence in others)
        raise ConfigError(f"{first} (and {len(others)} more such settings: {keys})" if others else first)
    _require_weights_to_keep(cfg)


def _require_weights_to_keep(cfg: Config) -> None:
    """Raise ConfigError if a frozen network is asked for without weights that it could have."""
    gram = cfg.gram
    has_source = gram.ema_teacher or gram.ckpt is not None or gram.it_load_ema_teacher >= 0
    if gram.use_loss and not has_source:
        raise ConfigError(
            "gram.use_loss=true needs a Gram teacher; name its weights by gram.ckpt (gram.ckpt=start: those that the "
            "run starts from), or set gram.ema_teacher=true, or gram.it_load_ema_teacher to a step"
        )
    wishes = [f"anchor.{name}={getattr(cfg.anchor, name)}" for name in ("cls_weight", "patch_weight")]
    wishes = [wish for wish in wishes if not wish.endswith("=0.0")]
    wishes += ["gram.ckpt=start"] if gram.use_loss and gram.ckpt == START_WEIGHTS else []
    named = cfg.MODEL.WEIGHTS or cfg.student.pretrained_weights or cfg.train.resume_path
    if wishes and not named:
        raise ConfigError(
            f"{wishes[0]} keeps what the weights that the run starts from can do, but these would be random; name "
            f"weights by student.pretrained_weights or MODEL.WEIGHTS"
        )


def require_train_dataset(cfg: Config) -> str:
    """Return `train.dataset_path`; raise ConfigError if it is empty (evaluation needs none, training does)."""
    if not cfg.train.dataset_path:
        raise ConfigError(
            "train.dataset_path is empty; name the training images, e.g. train.dataset_path=ImageFolder:root=photos"
        )
    return cfg.train.dataset_path
