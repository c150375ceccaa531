"""Settings that keep a network which starts from published weights from losing what it knows. All are off by default.

The comment of a field gives its unit and range, and where a number comes from. Keys and defaults of `gram` are DINOv3's
(arXiv:2508.10104 and its released configs).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dinov2.configs.schedule_sections import ScheduleConfig
from dinov2.configs.section import Section


@dataclass(frozen=True, kw_only=True)
class GramWeightScheduleConfig(ScheduleConfig):
    """Weight of the Gram loss over the run; null: gram.loss_weight throughout."""

    KEY: ClassVar[str] = "gram.loss_weight_schedule"


@dataclass(frozen=True, kw_only=True)
class GramConfig(Section):
    """Gram anchoring: similarities between patches of the student are kept to those of a frozen network."""

    KEY: ClassVar[str] = "gram"

    use_loss: bool = False  # true: the Gram loss is on


@dataclass(frozen=True, kw_only=True)
class AnchorConfig(Section):
    """Anchoring of features to the starting weights, by the cosine distance of tokens of global crops."""

    KEY: ClassVar[str] = "anchor"

    cls_weight: float = 0.0  # weight of the class tokens' distance, >= 0; 0: off

    def __post_init__(self) -> None:
        self.require("cls_weight", self.cls_weight >= 0, "at least 0")
