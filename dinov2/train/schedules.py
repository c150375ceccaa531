"""Schedules over optimiser steps: learning rate, weight decay, teacher momentum and teacher temperature."""

from dataclasses import dataclass

import numpy as np

from dinov2.configs import Config


class CosineScheduler:
    """A value for each step: zeros while frozen, a linear warm-up, then a cosine to the final value.

    Args:
        base_value: value at the end of the warm-up.
        final_value: value at `total_iters` and after it.
        total_iters: length in optimiser steps, freeze and warm-up included.
        warmup_iters: steps of the linear warm-up.
        start_warmup_value: first value of the warm-up.
        freeze_iters: steps at the start with value 0.

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
    ) -> None:
        self.final_value = float(final_value)
        num_cosine = max(total_iters - warmup_iters - freeze_iters, 0)
        phase = np.pi * np.arange(num_cosine) / max(num_cosine, 1)
        cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(phase))
        warmup = np.linspace(start_warmup_value, base_value, warmup_iters)
        self.schedule = np.concatenate([np.zeros(freeze_iters), warmup, cosine])[:total_iters]

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, step: int) -> float:
        return float(self.schedule[step]) if step < len(self.schedule) else self.final_value


@dataclass(frozen=True)
class StepValues:
    """What the schedules say for one optimiser step."""

    lr: float
    last_layer_lr: float  # 0 while the prototypes are frozen
    wd: float
    momentum: float
    teacher_temp: float


class Schedules:
    """All schedules of a run.

    Args:
        cfg: config; epochs are turned into steps here and nowhere else.
        lr: learning rate after the scaling rule.
        epoch_length: optimiser steps of one epoch.
    """

    def __init__(self, cfg: Config, *, lr: float, epoch_length: int) -> None:
        optim, teacher = cfg.optim, cfg.teacher
        total = optim.epochs * epoch_length
        warmup = min(optim.warmup_epochs * epoch_length, total)
        self.lr = CosineScheduler(lr, optim.min_lr, total, warmup_iters=warmup)
        self.wd = CosineScheduler(optim.weight_decay, optim.weight_decay_end, total)
        self.momentum = CosineScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher, total)
        temp_warmup = teacher.warmup_teacher_temp_epochs * epoch_length
        self.teacher_temp = CosineScheduler(
            teacher.teacher_temp,
            teacher.teacher_temp,
            temp_warmup,
            warmup_iters=temp_warmup,
            start_warmup_value=teacher.warmup_teacher_temp,
        )
        self.frozen_last_layer_steps = optim.freeze_last_layer_epochs * epoch_length

    def __getitem__(self, step: int) -> StepValues:
        lr = self.lr[step]
        return StepValues(
            lr=lr,
            last_layer_lr=0.0 if step < self.frozen_last_layer_steps else lr,
            wd=self.wd[step],
            momentum=self.momentum[step],
            teacher_temp=self.teacher_temp[step],
        )


def scaled_lr(base_lr: float, *, rule: str, global_batch_size: int) -> float:
    """Scale the learning rate of a reference batch to this run's images per optimiser step.

    Source: `sqrt_wrt_1024` is the parents' `apply_scaling_rules_to_cfg`; `linear_wrt_256` is Goyal et al. 2017.
    """
    factors = {
        "sqrt_wrt_1024": (global_batch_size / 1024) ** 0.5,
        "linear_wrt_256": global_batch_size / 256,
        "none": 1.0,
    }
    return base_lr * factors[rule]
