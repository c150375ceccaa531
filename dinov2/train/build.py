"""Build the parts of a run from its config: with `SSLMetaArch` and `networks`, the one place that reads config keys."""

import json
import logging
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.configs import Config, batch_size_per_rank, config_digest, stage_configs, to_dict
from dinov2.data import DataAugmentationDINO, make_data_loader, make_dataset
from dinov2.distributed import Environment, all_gather_objects
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.build import DTYPES, compute_dtype
from dinov2.fsdp import FSDPCheckpointer, PeriodicCheckpointer, RngState
from dinov2.logging import MetricLogger
from dinov2.train.batches import DeviceBatches, skipped_file
from dinov2.train.compilation import run_compiled, try_block
from dinov2.train.networks import build_networks
from dinov2.train.param_groups import common_groups, param_groups
from dinov2.train.prototype_init import start_heads
from dinov2.train.schedules import Schedules, scaled_lr
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """Numbers of a run, or of one of its stages, that follow from the config, the dataset and the number of ranks."""

    batch_size_per_rank: int  # images of one rank in one forward pass
    accumulation_steps: int  # forward passes of one optimiser step
    images_per_pass: int  # over all ranks
    global_batch_size: int  # images of one optimiser step
    epoch_length: int  # optimiser steps
    first_step: int  # step of the run with which it begins
    total_steps: int  # optimiser steps of the schedules
    last_step: int  # step of the run after which it ends, or the run by train.max_steps, <= first_step + total_steps
    lr: float  # peak learning rate after the scaling rule
    end_lr: float  # learning rate at the end of its schedule


def plan_run(
    cfg: Config, *, dataset_size: int, world_size: int, saved_global_batch: int | None = None, first_step: int = 0
) -> RunPlan:
    """Work out batch sizes, steps and the learning rate of a run without stages, or of one stage.

    Args:
        cfg: config of the run.
        dataset_size: images of one pass over the data.
        world_size: ranks.
        saved_global_batch: images of one step of the run that is continued; None: a new run.
        first_step: optimiser steps of the stages before.

    Raises:
        ConfigError: the batch does not divide over the ranks or into KoLeo's groups, or is larger than the dataset.
    """
    per_rank = batch_size_per_rank(cfg, world_size=world_size, saved_global_batch=saved_global_batch)
    accumulation = cfg.optim.gradient_accumulation_steps
    global_batch = per_rank * world_size * accumulation
    if cfg.train.global_batch_size is None and per_rank != cfg.train.batch_size_per_gpu:
        logger.info(
            "global_batch=%d is kept from the checkpoint: %d images per process and pass instead of "
            "train.batch_size_per_gpu=%d; train.global_batch_size changes it",
            global_batch,
            per_rank,
            cfg.train.batch_size_per_gpu,
        )
    if global_batch > dataset_size:
        raise ConfigError(
            f"the global batch of {global_batch} images (train.batch_size_per_gpu={per_rank} x {world_size} ranks x "
            f"optim.gradient_accumulation_steps={accumulation}) is larger than the dataset of {dataset_size} images; "
            f"use a batch of at most {dataset_size}"
        )
    epoch_length = cfg.train.OFFICIAL_EPOCH_LENGTH or dataset_size // global_batch
    total = cfg.optim.epochs * epoch_length
    _require_koleo_groups(cfg, images_per_pass=per_rank * world_size)
    _require_enough_images_for_koleo(cfg, dataset_size=dataset_size)
    lr, end_lr = scaled_lr(cfg, global_batch_size=global_batch)
    return RunPlan(
        batch_size_per_rank=per_rank,
        accumulation_steps=accumulation,
        images_per_pass=per_rank * world_size,
        global_batch_size=global_batch,
        epoch_length=epoch_length,
        first_step=first_step,
        total_steps=total,
        last_step=min(first_step + total, cfg.train.max_steps or first_step + total),
        lr=lr,
        end_lr=end_lr,
    )


def build_schedules(cfg: Config, *, plan: RunPlan) -> Schedules:
    """Build the schedules of learning rate, weight decay, teacher and local crops' weight."""
    return Schedules(cfg, lr=plan.lr, end_lr=plan.end_lr, epoch_length=plan.epoch_length)


def _require_koleo_groups(cfg: Config, *, images_per_pass: int) -> None:
    """Raise ConfigError unless KoLeo's groups divide the images of a pass and hold enough neighbours."""
    dino = cfg.dino
    if not (dino.koleo_loss_weight and dino.koleo_loss_distributed) or images_per_pass == 1:
        return
    size = dino.koleo_distributed_loss_group_size or images_per_pass
    if images_per_pass % size:
        divisors = [d for d in range(dino.koleo_topk + 1, images_per_pass + 1) if images_per_pass % d == 0]
        nearest = min(divisors, key=lambda divisor: abs(divisor - size), default=images_per_pass)
        raise ConfigError(
            f"dino.koleo_distributed_loss_group_size={size} does not divide the {images_per_pass} images that all "
            f"ranks pass through the network at once; use {nearest}"
        )
    if size <= dino.koleo_topk and not dino.koleo_queue_size:
        raise ConfigError(
            f"dino.koleo_topk={dino.koleo_topk} needs groups of at least {dino.koleo_topk + 1} images, but {size} are "
            f"compared with each other; lower it, or raise dino.koleo_distributed_loss_group_size or the batch"
        )


def _require_enough_images_for_koleo(cfg: Config, *, dataset_size: int) -> None:
    """Raise ConfigError if the queue holds so many images that some often meet an earlier view of themselves."""
    dino, most = cfg.dino, dataset_size // 4
    if dino.koleo_loss_weight and dino.koleo_queue_size > most:
        raise ConfigError(
            f"dino.koleo_queue_size={dino.koleo_queue_size} is more than a quarter of the {dataset_size} images of the "
            f"dataset: too many would be pushed away from an earlier view of themselves; use at most {most}"
        )


def seed_global_generators(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators: stochastic depth uses them; weights and crops have their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_dataset(cfg: Config, *, output_dir: Path) -> Any:
    """Open the training images."""
    return make_dataset(
        cfg.train.dataset_path,
        channels=cfg.student.in_chans,
        cache_dir=cfg.data.cache_dir or str(output_dir / "cache"),
        max_image_pixels=cfg.data.max_image_pixels,
    )


def require_equal_sizes(dataset: Any) -> None:
    """Raise DatasetError on all ranks if they see different numbers of images."""
    sizes = all_gather_objects(len(dataset))
    if len(set(sizes)) > 1:
        raise DatasetError(
            f"the processes find different numbers of images ({', '.join(map(str, sizes))}): the data changed while "
            f"they were opened, or a node sees another folder; start again once all see the same"
        )


def build_batches(
    cfg: Config, dataset: Any, *, plan: RunPlan, env: Environment, samples_seen: int, output_dir: Path
) -> DeviceBatches:
    """Build the endless batches of this rank, beginning after the samples that were seen before."""
    augmentation = build_augmentation(cfg)
    loader = make_data_loader(
        dataset,
        augmentation=augmentation,
        batch_size=plan.batch_size_per_rank,
        patch_size=cfg.student.patch_size,
        num_workers=cfg.train.num_workers,
        sampler=cfg.train.sampler,
        seed=cfg.train.seed,
        start_position=samples_seen,
        rank=env.rank,
        world_size=env.world_size,
        accumulation_steps=plan.accumulation_steps,
        mask_sample_probability=cfg.ibot.mask_sample_probability,
        mask_ratio_min_max=cfg.ibot.mask_ratio_min_max,
        on_bad_image=cfg.train.on_bad_image,
        pin_memory=env.device.type == "cuda",
    )
    return DeviceBatches(
        iter(loader),
        augmentation=augmentation,
        device=env.device,
        skipped_file=skipped_file(output_dir, rank=env.rank),
    )


def build_augmentation(cfg: Config) -> DataAugmentationDINO:
    """Build crops and photometric augmentation."""
    crops, augmentation, in_chans = cfg.crops, cfg.augmentation, cfg.student.in_chans
    has_colour_jitter = augmentation.color_jitter_probability and (augmentation.saturation or augmentation.hue)
    if in_chans != 3 and (has_colour_jitter or augmentation.grayscale_probability):
        logger.info("saturation, hue and grey are left out: they act on 3 channels, and student.in_chans=%d", in_chans)
    return DataAugmentationDINO(
        crops.global_crops_scale,
        crops.local_crops_scale,
        crops.local_crops_number,
        crops.global_crops_size,
        crops.local_crops_size,
        gram_teacher_crops_size=crops.gram_teacher_crops_size if cfg.gram.use_loss else None,
        gram_teacher_no_distortions=crops.gram_teacher_no_distortions,
        horizontal_flip_probability=augmentation.horizontal_flip_probability,
        vertical_flip_probability=augmentation.vertical_flip_probability,
        color_jitter_probability=augmentation.color_jitter_probability,
        brightness=augmentation.brightness,
        contrast=augmentation.contrast,
        saturation=augmentation.saturation,
        hue=augmentation.hue,
        grayscale_probability=augmentation.grayscale_probability,
        blur_probability=augmentation.blur_probability,
        blur_sigma=augmentation.blur_sigma,
        solarize_probability=augmentation.solarize_probability,
        solarize_threshold=augmentation.solarize_threshold,
        mean=augmentation.mean,
        std=augmentation.std,
        in_chans=in_chans,
    )


def build_model(cfg: Config, *, device: torch.device) -> SSLMetaArch:
    """Build student and teacher, sharded, with memory on the device but without values; `resume` fills them."""
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    precision = cfg.compute_precision
    model.prepare_for_distributed_training(
        device,
        strategy=precision.sharding_strategy,
        param_dtype=compute_dtype(cfg, device=device),
        reduce_dtype=DTYPES[precision.reduce_dtype],
        hybrid_shard_size=precision.hybrid_shard_size,
    )
    return model


def compile_blocks(cfg: Config, model: SSLMetaArch, *, plan: RunPlan, device: torch.device) -> None:
    """Let blocks run compiled, if the config asks for it and a block like them can be; all ranks together."""
    names, mode = cfg.train.compiled, cfg.train.compile_mode
    if cfg.student.is_resnet or not names:
        return
    crops, channels = cfg.crops, cfg.student.in_chans
    sizes = [(2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size)]
    batch = [
        torch.zeros(number * plan.batch_size_per_rank, channels, size, size, device=device)
        for number, size in sizes
        if number
    ]

    def try_out(compute: Callable[..., torch.Tensor]) -> None:
        for name in names:
            with torch.device("meta"):
                backbone = build_networks(cfg, of_teacher=name == "teacher")["backbone"]
            if name == "teacher":
                backbone.eval().requires_grad_(False)
            try_block(backbone, compute, batch if name == "student" else batch[:1], dtype=model.autocast_dtype)

    backbones = [getattr(model, name)["backbone"] for name in names]
    if run_compiled(backbones, mode=mode, try_out=try_out):
        logger.info("compile=%s mode=%s: first steps take longer", ",".join(names), mode)


def start_drawn_heads(cfg: Config, model: SSLMetaArch, drawn: Sequence[str], *, dataset: Any, env: Environment) -> None:
    """Start those of the drawn heads from the training images whose section asks for it; all ranks together."""
    inits = {"dino_head": cfg.dino.prototype_init, "ibot_head": cfg.ibot.prototype_init}
    heads = [name for name in drawn if inits[name] == "kmeans"]
    if not heads:
        return
    start_heads(
        model,
        heads,
        dataset,
        augmentation=build_augmentation(cfg),
        num_crops=cfg.train.prototype_init_crops,
        seed=cfg.train.seed,
        num_workers=cfg.train.num_workers,
        device=env.device,
        on_bad_image=cfg.train.on_bad_image,
    )


def build_param_groups(cfg: Config, model: SSLMetaArch) -> list[dict]:
    """Group the student's parameters by their multipliers, as one stage has them."""
    optim = cfg.optim
    return param_groups(
        model.student,
        layerwise_decay=optim.layerwise_decay,
        patch_embed_lr_mult=optim.patch_embed_lr_mult,
        dino_head_wd_multiplier=optim.dino_head_wd_multiplier,
    )


def build_optimizer(cfg: Config, model: SSLMetaArch) -> torch.optim.Optimizer:
    """Build the optimiser over the student's parameter groups; schedules set learning rate and decay at each step."""
    optim = cfg.optim
    groups = common_groups([build_param_groups(stage, model) for _, stage in stage_configs(cfg)])
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optim.base_lr, momentum=optim.sgd_momentum, foreach=True)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optim.optimizer]
    return kind(groups, lr=optim.base_lr, betas=(optim.adamw_beta1, optim.adamw_beta2), fused=True)


def build_grad_scaler(cfg: Config, *, device: torch.device) -> torch.amp.GradScaler:
    """Build the loss scaler; it passes values through unless training runs in float16."""
    enabled = compute_dtype(cfg, device=device) == torch.float16 and cfg.compute_precision.grad_scaler
    return torch.amp.GradScaler(device.type, enabled=enabled)


def build_checkpointer(
    cfg: Config,
    model: SSLMetaArch,
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    output_dir: Path,
    read_only: bool = False,
) -> PeriodicCheckpointer:
    """Build what saves and restores the whole state of the run; the stages tell it the run's numbers."""
    saving = cfg.checkpointing
    settings = to_dict(cfg)
    settings["train"]["output_dir"] = os.path.realpath(output_dir)  # whose copies they are, wherever one looks from
    checkpointer = FSDPCheckpointer(
        model,
        str(output_dir),
        sharding_strategy=cfg.compute_precision.sharding_strategy,
        config_text=json.dumps(settings),
        config_digest=config_digest(cfg),
        background=saving.background,
        save_to_disk=not read_only,
        optional_parts=("anchoring.",),
        **({"queues": model.queues} if model.queues else {}),
        optimizer=optimizer,
        scaler=scaler,
        rng=RngState(),
    )
    return PeriodicCheckpointer(
        checkpointer,
        saving.period,
        max_to_keep=saving.max_to_keep,
        keep_every=saving.keep_every,
        period_minutes=saving.period_minutes,
        save_best=saving.save_best,
        save_best_mode=saving.save_best_mode,
        copy_to=saving.copy_to,
    )


def build_metric_logger(cfg: Config, *, last_step: int, start_step: int, output_dir: Path) -> MetricLogger:
    """Build what records and shows the metrics of every step."""
    return MetricLogger(
        output_dir,
        period_steps=cfg.logging.period_steps,
        total_steps=last_step,
        start_step=start_step,
        tensorboard=cfg.logging.tensorboard,
        wandb=cfg.logging.wandb,
        wandb_project=cfg.logging.wandb_project,
        config=to_dict(cfg),
    )
