"""Settings that keep a network which starts from published weights from losing what it knows. All are off by default.

The comment of a field gives its unit and range, and where a number comes from. Keys and defaults of `gram` are DINOv3's
(arXiv:2508.10104 and its released configs).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dinov2.configs.parts import require_part_names
from dinov2.configs.schedule_sections import ScheduleConfig
from dinov2.configs.section import Section
from dinov2.errors import ConfigError

START_WEIGHTS = "start"  # a value of gram.ckpt
LORA_TARGETS = ("qkv", "proj", "fc1", "fc2", "w12", "w1", "w2", "w3")
_LINEAR_RESIZES = ("bilinear", "bicubic")


@dataclass(frozen=True, kw_only=True)
class GramWeightScheduleConfig(ScheduleConfig):
    """Weight of the Gram loss over the run, instead of gram.loss_weight."""

    KEY: ClassVar[str] = "gram.loss_weight_schedule"


@dataclass(frozen=True, kw_only=True)
class GramConfig(Section):
    """Gram anchoring: the similarities between patches of a global crop stay those that a Gram teacher sees."""

    KEY: ClassVar[str] = "gram"

    use_loss: bool = False  # true: the Gram loss takes part in training
    # also record the loss among masked and among unmasked patches, and the loss where its weight is 0
    compute_stats: bool = False
    loss_weight: float = 1.0  # factor, >= 0; 0: the loss is not computed
    ema_teacher: bool = False  # true: the Gram teacher is the teacher itself, on the crops it sees anyway
    # weights of the Gram teacher; start: those that the run starts from; null: the teacher's of it_load_ema_teacher
    ckpt: str | None = None
    # before this step the Gram teacher becomes the teacher of that time; -1: never; without ckpt the loss begins here
    it_load_ema_teacher: int = -1
    rep_update: bool = True  # true: it also becomes the teacher of the time after each update_frequency steps
    update_frequency: int = 50000  # steps, >= 1
    it_first_update: int = 0  # step from which on rep_update acts, >= 0
    max_updates: int | None = None  # how often rep_update acts, >= 0; null: to the end
    normalized: bool = True  # similarities are cosines; false: dot products
    img_level: bool = False  # between patches of one crop; false: between all patches of a process, as many squared
    remove_neg: bool = False  # negative similarities of both count as 0
    remove_only_teacher_neg: bool = False  # those of the Gram teacher alone count as 0
    # all: every patch; masked, unmasked: those that the student does not see, or sees; with img_level=false
    tokens_used: Literal["all", "masked", "unmasked"] = "all"
    # how features of larger crops (crops.gram_teacher_crops_size) are brought to the student's grid of patches
    global_teacher_resize_method: Literal["nearest", "bilinear", "bicubic", "area"] = "bicubic"
    global_teacher_resize_antialias: bool = False  # smooth before making smaller; bilinear and bicubic only
    # patches compared with each other, drawn anew for each crop (img_level=false: for each process) and step, >= 2;
    # null: all, at a cost that grows with their square
    max_tokens: int | None = None
    loss_weight_schedule: GramWeightScheduleConfig | None = None

    def __post_init__(self) -> None:
        self.require("loss_weight", self.loss_weight >= 0, "at least 0")
        self.require("it_load_ema_teacher", self.it_load_ema_teacher >= -1, "a step, or -1 for never")
        self.require("update_frequency", self.update_frequency >= 1, "at least 1 step")
        self.require("it_first_update", self.it_first_update >= 0, "at least 0")
        self.require("max_updates", (self.max_updates or 0) >= 0, "at least 0, or null")
        self.require("max_tokens", self.max_tokens is None or self.max_tokens >= 2, "at least 2 patches, or null")
        if self.use_loss:
            self._require_no_contradiction()

    def _require_no_contradiction(self) -> None:
        if self.remove_neg and self.remove_only_teacher_neg:
            raise ConfigError("gram.remove_neg and gram.remove_only_teacher_neg are both true; set one to false")
        if self.ema_teacher and self.ckpt is not None:
            raise ConfigError(
                f"gram.ema_teacher=true has no use for gram.ckpt={self.ckpt!r}; set gram.ckpt=null or "
                f"gram.ema_teacher=false"
            )
        alone = self.tokens_used == "all" or not self.img_level
        self.require("tokens_used", alone, "all with gram.img_level=true; or set gram.img_level=false")
        smooths = not self.global_teacher_resize_antialias or self.global_teacher_resize_method in _LINEAR_RESIZES
        self.require("global_teacher_resize_antialias", smooths, "false unless the method is bilinear or bicubic")

    @property
    def follows_teacher(self) -> bool:
        """Whether the Gram teacher's weights change during the run."""
        return self.rep_update or self.it_load_ema_teacher >= 0


@dataclass(frozen=True, kw_only=True)
class AnchorConfig(Section):
    """Anchoring of features: tokens of global crops stay near those that the starting weights give, by their angle."""

    KEY: ClassVar[str] = "anchor"

    cls_weight: float = 0.0  # weight of 1 - cosine of the class tokens, >= 0; 0: off
    patch_weight: float = 0.0  # weight of 1 - cosine of the patches that the student sees, >= 0; 0: off
    max_tokens: int | None = None  # patches of a crop, drawn anew in each step, >= 1; null: all

    def __post_init__(self) -> None:
        for name in ("cls_weight", "patch_weight"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1 patch, or null")

    @property
    def is_on(self) -> bool:
        """Whether features are anchored."""
        return self.cls_weight > 0 or self.patch_weight > 0


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Section):
    """Low-rank updates (LoRA, arXiv:2106.09685): the backbone's weights rest, small products beside them learn."""

    KEY: ClassVar[str] = "lora"

    # inner width of the products, >= 0; 0: off, the weights themselves learn. The teacher, and so every file of
    # weights, is a plain network; it follows the student with its products added to its weights
    rank: int = 0
    alpha: float = 16.0  # the products count alpha / rank times, > 0
    # linear layers that get a product, of those that the backbone has: qkv and proj of attention; fc1 and fc2, or w12,
    # w1, w2 and w3, of the feed-forward part
    targets: tuple[str, ...] = LORA_TARGETS
    dropout: float = 0.0  # share of a product's inputs that is left out at random in training, 0..1 (1 excluded)
    # parts of the backbone whose own weights learn as well, named as in optim.freeze; whole blocks get no products.
    # Norms have few values and follow the domain; the mask token is of no use after training. ExPLoRA
    # (arXiv:2406.10973) adds one or two whole blocks: [norms, mask_token, blocks:11]
    also_train: tuple[str, ...] = ("norms", "mask_token")

    def __post_init__(self) -> None:
        self.require("rank", self.rank >= 0, "at least 0")
        self.require("alpha", self.alpha > 0, "above 0")
        known = bool(self.targets) and set(self.targets) <= set(LORA_TARGETS)
        self.require("targets", known, f"a list of some of {', '.join(LORA_TARGETS)}")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        require_part_names(self, "also_train")


@dataclass(frozen=True, kw_only=True)
class GuardRailsConfig(Section):
    """What ends a run that goes wrong, while best_teacher.pth holds the best teacher so far.

    The limits lie between runs that were seen to be healthy and broken ones; see dinov2/train/guard_rails.py.
    """

    KEY: ClassVar[str] = "guard_rails"

    # stop: warn, then end the run with the reason; warn: only warn, once a cause; off: watch nothing; auto: stop where
    # the run starts from weights (student.pretrained_weights, MODEL.WEIGHTS), else warn: features and targets of random
    # networks are poor for a while without harm
    action: Literal["auto", "stop", "warn", "off"] = "auto"
    window_steps: int = 10  # steps whose mean is judged, >= 1: single batches scatter
    patience_steps: int = 10  # steps in a row that the mean is out of bounds: the first one warns, the last one ends
    patience_evaluations: int = 2  # evaluations in a row that are out of bounds: the first one warns, the last one ends
    max_blank_pct: float = 90.0  # crops of a single colour, 0..100; a folder of scans may well have some
    max_copies_pct: float = 90.0  # images that are there twice, of a batch or of those looked at first, 0..100
    min_feature_std_share: float = 0.3  # spread of the class tokens over the largest so far, 0..1
    # what targets say of an image, over the most so far, 0..1; where evaluations follow, one of them must agree
    min_target_information_share: float = 0.1
    min_teacher_momentum: float = 0.5  # below it the teacher is little but the student, 0..1; the parents go to 0.99
    min_rank_share: float = 0.5  # RankMe of an evaluation over that of the start, 0..1
    # neighbours kept since the start, in percent, 0..100, of features that are not better than those of the start
    min_overlap_pct: float = 10.0
    max_drop_points: float = 10.0  # fall of knn_top1_pct below the start, points, >= 0

    def __post_init__(self) -> None:
        for name in ("window_steps", "patience_steps", "patience_evaluations"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        self.require("max_drop_points", self.max_drop_points >= 0, "at least 0")
        for name in ("max_blank_pct", "max_copies_pct", "min_overlap_pct"):
            self.require(name, 0 <= getattr(self, name) <= 100, "in 0..100")
        for name in ("feature_std_share", "target_information_share", "teacher_momentum", "rank_share"):
            self.require(f"min_{name}", 0 <= getattr(self, f"min_{name}") <= 1, "in 0..1")
