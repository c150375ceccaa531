"""Schedules over optimiser steps: learning rate, weight decay, teacher momentum and temperature, a loss weight."""

import math
from dataclasses import dataclass

import numpy as np

from dinov2.configs import Config
from dinov2.configs.model_sections import LocalLossWeightConfig
from dinov2.configs.schedule_sections import ScheduleConfig


class StepSchedule:
    """A value for each step.

    Args:
        values: of the steps 0, 1, ...
        final_value: of all steps after them.
    """

    def __init__(self, values: np.ndarray, *, final_value: float) -> None:
        self.schedule = values
        self.final_value = float(final_value)

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, step: int) -> float:
        return float(self.schedule[step]) if step < len(self.schedule) else self.final_value


class CosineScheduler(StepSchedule):
    """Zeros while frozen, a linear warm-up, then a cosine to the final value.

    Args:
        base_value: value at the end of the warm-up.
        final_value: value at `total_iters` and after it.
        total_iters: length in optimiser steps, freeze and warm-up included.
        warmup_iters: steps of the linear warm-up.
        start_warmup_value: first value of the warm-up.
        freeze_iters: steps at the start with value 0.
        trunc_extra: the cosine is drawn 1 + trunc_extra times as long, cut off at its place, and stretched so that its
            last step has the final value: it comes down steeper at the end; >= 0.

    Source: the parents' `CosineScheduler`.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0.0,
        freeze_iters: int = 0,
        trunc_extra: float = 0.0,
    ) -> None:
        num_cosine = max(total_iters - warmup_iters - freeze_iters, 0)
        share = _falling_cosine(num_cosine, trunc_extra=trunc_extra)
        cosine = final_value + (base_value - final_value) * share
        warmup = np.linspace(start_warmup_value, base_value, warmup_iters)
        values = np.concatenate([np.zeros(freeze_iters), warmup, cosine])[:total_iters]
        super().__init__(values, final_value=final_value)


def linear_warmup_cosine_decay(
    start: float,
    peak: float,
    end: float,
    warmup_iterations: int,
    total_iterations: int,
    cosine_iterations: int | None = None,
) -> StepSchedule:
    """Rise linearly from `start` to `peak`, fall as a cosine to `end`, and stay there.

    Args:
        start: value at step 0, unless there is no warm-up.
        peak: value at the first step after the warm-up.
        end: value at the last step of the cosine and after it.
        warmup_iterations: steps of the rise.
        total_iterations: length in optimiser steps.
        cosine_iterations: steps of the fall; None: all after the warm-up.

    Source: DINOv3's function of this name.
    """
    if cosine_iterations is None:
        cosine_iterations = max(total_iterations - warmup_iterations, 0)
    rise = np.linspace(start, peak, warmup_iterations, endpoint=False)
    fall = end + (peak - end) * 0.5 * (1 + np.cos(np.linspace(0, np.pi, cosine_iterations)))
    return StepSchedule(np.concatenate([rise, fall])[:total_iterations], final_value=end)


def _falling_cosine(num_steps: int, *, trunc_extra: float) -> np.ndarray:
    """Share of the way that is still to go, 1 at the first step."""
    if not trunc_extra:
        return 0.5 * (1 + np.cos(np.pi * np.arange(num_steps) / max(num_steps, 1)))
    phase = np.linspace(0, np.pi, int((1 + trunc_extra) * num_steps))[:num_steps]
    share = 0.5 * (1 + np.cos(phase))
    return (share - share[-1]) / (1 - share[-1]) if num_steps > 1 else share


@dataclass(frozen=True)
class StepValues:
    """What the schedules say for one optimiser step."""

    lr: float
    last_layer_lr: float  # 0 while the prototypes are frozen
    wd: float
    momentum: float
    teacher_temp: float
    dino_local_loss_weight: float = 1.0
    gram_loss_weight: float = 1.0
    backbone_lr_factor: float = 1.0  # on the learning rate of the backbone; 0: it is frozen and needs no gradient
    head_lr_factor: float = 1.0  # on the learning rate of the heads


class Schedules:
    """All schedules of a run: in DINOv3's form if the config has the section `schedules`, else in the classic form.

    Args:
        cfg: config; epochs are turned into steps here and nowhere else.
        lr: peak learning rate, after the scaling rule.
        end_lr: learning rate at the end, after the scaling rule.
        epoch_length: optimiser steps of one epoch.
    """

    def __init__(self, cfg: Config, *, lr: float, end_lr: float, epoch_length: int) -> None:
        self.total_steps = cfg.optim.epochs * epoch_length
        self.epoch_length = epoch_length
        if cfg.schedules is None:
            self._build_classic(cfg, lr=lr, end_lr=end_lr)
            frozen_epochs = cfg.optim.freeze_last_layer_epochs
        else:
            self.lr = self._piecewise(cfg.schedules.lr, peak=lr, end=end_lr)
            self.wd = self._piecewise(cfg.schedules.weight_decay)
            self.momentum = self._piecewise(cfg.schedules.momentum)
            self.teacher_temp = self._piecewise(cfg.schedules.teacher_temp)
            frozen_epochs = cfg.schedules.lr.freeze_last_layer_epochs
        self.frozen_last_layer_steps = frozen_epochs * epoch_length
        self.frozen_backbone_steps = _whole_steps(cfg.optim.freeze_backbone_epochs, epoch_length=epoch_length)
        self.ramp_steps = _whole_steps(cfg.optim.unfreeze_ramp_epochs, epoch_length=epoch_length)
        self.backbone_lr_multiplier = cfg.optim.backbone_lr_multiplier
        self.head_lr_multiplier = cfg.optim.head_lr_multiplier
        self.dino_local_loss_weight = StepSchedule(np.empty(0), final_value=1.0)
        if cfg.dino.reweight_dino_local_loss:
            self.dino_local_loss_weight = self._piecewise(cfg.dino.local_loss_weight_schedule)
        self.gram_loss_weight = StepSchedule(np.empty(0), final_value=cfg.gram.loss_weight)
        if cfg.gram.loss_weight_schedule is not None:
            self.gram_loss_weight = self._piecewise(cfg.gram.loss_weight_schedule)

    def _build_classic(self, cfg: Config, *, lr: float, end_lr: float) -> None:
        optim, teacher, total = cfg.optim, cfg.teacher, self.total_steps
        warmup = min(optim.warmup_epochs * self.epoch_length, total)
        extra = optim.schedule_trunc_extra
        self.lr = CosineScheduler(lr, end_lr, total, warmup_iters=warmup, trunc_extra=extra)
        self.wd = CosineScheduler(optim.weight_decay, optim.weight_decay_end, total, trunc_extra=extra)
        self.momentum = CosineScheduler(
            teacher.momentum_teacher, teacher.final_momentum_teacher, total, trunc_extra=extra
        )
        temp_warmup = teacher.warmup_teacher_temp_epochs * self.epoch_length
        self.teacher_temp = CosineScheduler(
            teacher.teacher_temp,
            teacher.teacher_temp,
            temp_warmup,
            warmup_iters=temp_warmup,
            start_warmup_value=teacher.warmup_teacher_temp,
        )

    def _piecewise(
        self, section: ScheduleConfig | LocalLossWeightConfig, *, peak: float | None = None, end: float | None = None
    ) -> StepSchedule:
        """Build the schedule of a config section; `peak` and `end` replace its own."""
        cosine = section.cosine_epochs
        return linear_warmup_cosine_decay(
            section.start,
            section.peak if peak is None else peak,
            section.end if end is None else end,
            warmup_iterations=section.warmup_epochs * self.epoch_length,
            total_iterations=self.total_steps,
            cosine_iterations=None if cosine is None else cosine * self.epoch_length,
        )

    def __getitem__(self, step: int) -> StepValues:
        lr = self.lr[step]
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < self.frozen_last_layer_steps else lr,
            wd=self.wd[step],
            momentum=self.momentum[step],
            teacher_temp=self.teacher_temp[step],
            dino_local_loss_weight=self.dino_local_loss_weight[step],
            gram_loss_weight=self.gram_loss_weight[step],
            backbone_lr_factor=self.backbone_lr_multiplier * self._thaw(step),
            head_lr_factor=self.head_lr_multiplier,
        )

    def _thaw(self, step: int) -> float:
        """Return 0 while the backbone is frozen; then it rises in equal parts to 1, in the last step of the ramp."""
        steps = step + 1 - self.frozen_backbone_steps
        return min(max(steps / max(self.ramp_steps, 1), 0.0), 1.0)


def _whole_steps(epochs: float, *, epoch_length: int) -> int:
    """Turn epochs into steps; a part of a step counts as one, so that a short time is not lost."""
    return math.ceil(round(epochs * epoch_length, 6))


def scaled_lr(cfg: Config, *, global_batch_size: int) -> tuple[float, float]:
    """Scale the learning rates of a reference batch to this run's images per optimiser step; returns peak and end.

    In the classic form the rule acts on `optim.base_lr`, not on `optim.min_lr`. In DINOv3's form it acts on the peak
    and the end of `schedules.lr`, not on its start, and under `sqrt_wrt_1024` with a further factor of 4, as there.

    Source: `sqrt_wrt_1024` is the parents' `apply_scaling_rules_to_cfg` and `build_schedulers_v2`; `linear_wrt_256` is
    Goyal et al. 2017.
    """
    factors = {
        "sqrt_wrt_1024": (global_batch_size / 1024) ** 0.5,
        "linear_wrt_256": global_batch_size / 256,
        "none": 1.0,
    }
    rule = cfg.optim.scaling_rule
    if cfg.schedules is None:
        return cfg.optim.base_lr * factors[rule], cfg.optim.min_lr
    factor = factors[rule] * (4 if rule == "sqrt_wrt_1024" else 1)
    return cfg.schedules.lr.peak * factor, cfg.schedules.lr.end * factor
