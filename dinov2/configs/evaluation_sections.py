"""Settings of evaluations, while training and after it.

The comment of a field gives its unit and range, and where a number comes from. A step is an optimiser step.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from dinov2.configs.section import Section
from dinov2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KnnConfig(Section):
    """k-NN classification with the teacher's features while training (arXiv:1805.01978)."""

    KEY: ClassVar[str] = "evaluation.knn"

    train_dataset_path: str | None = None  # images with known labels, as train.dataset_path; null: no k-NN
    val_dataset_path: str | None = None  # images to classify
    nb_knn: tuple[int, ...] = (10, 20, 100, 200)  # numbers of neighbours to try, each >= 1
    temperature: float = 0.07  # of the neighbours' votes, > 0
    batch_size: int = 256  # images that a rank reads at a time, >= 1; changes no result, see dinov2/eval/extraction.py
    image_size_px: int | None = None  # px, a multiple of student.patch_size; null: crops.global_crops_size
    resize_ratio: float = 1.142857  # shorter side before the centre crop over image_size_px, >= 1 (256 / 224)

    def __post_init__(self) -> None:
        holds = len(self.nb_knn) > 0 and all(k >= 1 for k in self.nb_knn)
        self.require("nb_knn", holds, "a list of numbers of at least 1, such as [10, 20]")
        self.require("temperature", self.temperature > 0, "above 0")
        self.require("batch_size", self.batch_size >= 1, "at least 1 image")
        self.require("image_size_px", self.image_size_px is None or self.image_size_px >= 1, "at least 1 px, or null")
        self.require("resize_ratio", self.resize_ratio >= 1, "at least 1")
        for given, missing in (
            ("train_dataset_path", "val_dataset_path"),
            ("val_dataset_path", "train_dataset_path"),
        ):
            if getattr(self, given) is not None and getattr(self, missing) is None:
                raise ConfigError(f"{self.KEY}.{given} is set but {self.KEY}.{missing} is not; set both or neither")


@dataclass(frozen=True, kw_only=True)
class HealthConfig(Section):
    """Label-free measures of the teacher's features while training: RankMe, uniformity, alignment and others."""

    KEY: ClassVar[str] = "evaluation.health"

    num_images: int = 2048  # images looked at, >= 2, of the k-NN training set or else of the training set; 0: none

    def __post_init__(self) -> None:
        self.require("num_images", self.num_images == 0 or self.num_images >= 2, "at least 2 images, or 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """Checks while training."""

    KEY: ClassVar[str] = "evaluation"

    eval_period_iterations: int | None = 12500  # steps between evaluations, >= 0; 0 or null: never
    at_start: bool = True  # evaluate before the first step, for comparison
    # end a run whose evaluations stay worse than that of the start: by checkpointing.save_best if that is set, else by
    # knn_top1_pct with evaluation.knn; without both guard_rails alone ends it. It needs at_start
    stop_below_start: bool = False
    stop_patience: int = 3  # evaluations in a row that are worse, >= 1: the first one warns, the last one ends the run
    stop_margin: float = (
        1.0  # what is worse: below the start by more points (a score in percent) or percent (others), >= 0
    )
    knn: KnnConfig = field(default_factory=KnnConfig)
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        self.require("eval_period_iterations", (self.eval_period_iterations or 0) >= 0, "at least 0 steps, or null")
        self.require("stop_patience", self.stop_patience >= 1, "at least 1 evaluation")
        self.require("stop_margin", self.stop_margin >= 0, "at least 0")
        is_evaluated = self.at_start and bool(self.eval_period_iterations)
        is_scored = self.knn.train_dataset_path is not None or self.health.num_images > 0
        self.require(
            "stop_below_start",
            not self.stop_below_start or (is_evaluated and is_scored),
            "false, or evaluation.at_start true, evaluation.eval_period_iterations at least 1 and evaluation.knn or "
            "evaluation.health on",
        )
