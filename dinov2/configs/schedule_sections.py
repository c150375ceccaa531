"""Schedules given piece by piece, DINOv3's second form: linear from start to peak, cosine to end, then constant.

The section is optional. Without it the schedules follow from the keys of optim and teacher.
"""

from dataclasses import dataclass
from typing import ClassVar

from dinov2.configs.section import Section, require_rising_and_falling


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Keys that all schedules share."""

    start: float  # value at the first step, >= 0; linear to peak
    peak: float  # value after the warm-up, >= 0; cosine to end
    end: float  # value after the cosine, >= 0
    warmup_epochs: int  # epochs from start to peak, >= 0
    cosine_epochs: int | None = None  # epochs from peak to end, >= 0; null: to the end of the run

    def __post_init__(self) -> None:
        require_rising_and_falling(self)


@dataclass(frozen=True, kw_only=True)
class LrScheduleConfig(ScheduleConfig):
    """Learning rate; optim.scaling_rule acts on peak and end, with sqrt_wrt_1024 as 4 * sqrt(global batch / 1024)."""

    KEY: ClassVar[str] = "schedules.lr"

    freeze_last_layer_epochs: int = 0  # epochs in which the heads' last layers stay as they are, >= 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("freeze_last_layer_epochs", self.freeze_last_layer_epochs >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class WeightDecayScheduleConfig(ScheduleConfig):
    """Weight decay."""

    KEY: ClassVar[str] = "schedules.weight_decay"


@dataclass(frozen=True, kw_only=True)
class MomentumScheduleConfig(ScheduleConfig):
    """Share of the old teacher kept in a step, 0..1."""

    KEY: ClassVar[str] = "schedules.momentum"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "peak", "end"):
            self.require(name, getattr(self, name) <= 1, "in 0..1")


@dataclass(frozen=True, kw_only=True)
class TeacherTempScheduleConfig(ScheduleConfig):
    """Temperature of the teacher's targets, > 0."""

    KEY: ClassVar[str] = "schedules.teacher_temp"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start", "peak", "end"):
            self.require(name, getattr(self, name) > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class SchedulesConfig(Section):
    """Schedules in DINOv3's form: all four or none; with them the keys of optim and teacher on these values rest."""

    KEY: ClassVar[str] = "schedules"

    lr: LrScheduleConfig
    weight_decay: WeightDecayScheduleConfig
    momentum: MomentumScheduleConfig
    teacher_temp: TeacherTempScheduleConfig
