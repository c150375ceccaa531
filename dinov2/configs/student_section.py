"""Settings of the backbone.

The comment of a field gives its unit and range, and where a number comes from. Defaults are DINOv2's (arXiv:2304.07193
and its released configs); what DINOv3 (arXiv:2508.10104) adds is off.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from dinov2.configs.section import Section, nearest_multiples, show_value
from dinov2.errors import ConfigError

ViTArch = Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_so400m", "vit_huge2", "vit_giant2", "vit_7b"]
ResNetArch = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
RESNET_ARCHS: tuple[str, ...] = get_args(ResNetArch)

# Width and attention heads of each named ViT; the same as in dinov2.models, which this package does not import.
ARCH_WIDTH_AND_HEADS = {
    "vit_tiny": (192, 3),
    "vit_small": (384, 6),
    "vit_base": (768, 12),
    "vit_large": (1024, 16),
    "vit_so400m": (1152, 18),
    "vit_huge2": (1280, 20),
    "vit_giant2": (1536, 24),
    "vit_7b": (4096, 32),
}


# Blocks of each named backbone: of a ResNet, its residual blocks.
ARCH_BLOCKS = {
    **{"vit_tiny": 12, "vit_small": 12, "vit_base": 12, "vit_large": 24},
    **{"vit_so400m": 27, "vit_huge2": 32, "vit_giant2": 40, "vit_7b": 40},
    **{"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50},
}


@dataclass(frozen=True, kw_only=True)
class StudentConfig(Section):
    """The backbone; the teacher has the same one, without stochastic depth."""

    KEY: ClassVar[str] = "student"

    # width, blocks, heads: vit_tiny 192, 12, 3; vit_small 384, 12, 6; vit_base 768, 12, 12; vit_large 1024, 24, 16;
    # vit_so400m 1152, 27, 18; vit_huge2 1280, 32, 20; vit_giant2 1536, 40, 24; vit_7b 4096, 40, 32. resnet18, resnet34,
    # resnet50, resnet101, resnet152 are torchvision's: trained without iBOT (ibot.loss_weight=0), and of the keys below
    # only in_chans, the two on weights and sync_batchnorm are theirs
    arch: Literal[ViTArch, ResNetArch] = "vit_large"
    patch_size: int = 16  # px, >= 1; both crop sizes must be multiples of it
    in_chans: int = 3  # channels of an image, >= 1
    embed_dim: int | None = None  # width, >= 1, a multiple of num_heads; null: that of arch
    depth: int | None = None  # blocks, >= 1; null: that of arch
    num_heads: int | None = None  # attention heads, >= 1; null: that of arch
    drop_path_rate: float = 0.3  # chance that a block skips an image, 0..1 (1 excluded)
    drop_path_uniform: bool = True  # true: the same chance in all blocks; false: rising from 0 to drop_path_rate
    layerscale: float | None = 1.0e-05  # first value of LayerScale, >= 0; 0 or null: no LayerScale
    pretrained_weights: str = ""  # file with a backbone for student and teacher to start from; empty: random
    allow_partial_weights: bool = False  # true: what such a file lacks keeps its first values; false: that is an error
    # feed-forward part of a block; all but mlp are gated and have 2/3 of its width, rounded up to a multiple of 8 or of
    # the number in the name
    ffn_layer: Literal["mlp", "swiglu", "swiglufused", "swiglu32", "swiglu64", "swiglu128"] = "mlp"
    ffn_ratio: float | None = None  # hidden width of the feed-forward part / embed_dim, > 0; null: that of arch
    norm_layer: Literal["layernorm", "layernormbf16", "rmsnorm"] = "layernorm"  # with epsilon 1e-6, 1e-5, 1e-5
    qkv_bias: bool = True  # bias of the query, key and value projection
    mask_k_bias: bool = False  # true: the key's part of that bias is kept at 0; without qkv_bias there is none
    proj_bias: bool = True  # bias of the attention's output projection
    ffn_bias: bool = True  # bias of the feed-forward part
    num_register_tokens: int = 0  # extra tokens, >= 0 (arXiv:2309.16588; the released _reg and DINOv3 models have 4)
    untie_cls_and_patch_norms: bool = False  # true: own last norms for class and register tokens and for patches
    untie_global_and_local_cls_norm: bool = False  # true: own last norm for class and register tokens of local crops
    pos_embed_type: Literal["learned", "rope"] = "learned"  # learned: an added table (DINOv2); rope: rotations (DINOv3)
    # rope: base of the geometric series of periods, > 0; null: from min_period to max_period instead
    pos_embed_rope_base: float | None = 100.0
    pos_embed_rope_min_period: float | None = None  # rope: shortest period, > 0, given with max_period; null: by base
    pos_embed_rope_max_period: float | None = None  # rope: longest period, > 0; null: by base
    # rope: patch positions are divided by height and width, or both by the smaller or the larger of them
    pos_embed_rope_normalize_coords: Literal["separate", "min", "max"] = "separate"
    pos_embed_rope_shift_coords: float | None = None  # rope, in training: positions + uniform in -value..value, >= 0
    pos_embed_rope_jitter_coords: float | None = None  # rope, in training: each axis * 1/value..value, >= 1; null: none
    pos_embed_rope_rescale_coords: float | None = None  # rope, in training: both axes * 1/value..value, >= 1
    pos_embed_rope_dtype: Literal["bf16", "fp32", "fp16"] = "bf16"  # rope: type of angles, sines and cosines
    interpolate_antialias: bool = False  # antialias when pos_embed is resized; the released _reg models: true
    interpolate_offset: float = 0.1  # added to the size when pos_embed is resized, >= 0; the _reg models: 0.0
    attention_backend: Literal["auto", "sdpa", "xformers"] = "auto"  # auto: sdpa, PyTorch's own
    sync_batchnorm: bool = False  # ResNets: batch statistics over all ranks, not of each rank

    @property
    def is_resnet(self) -> bool:
        """Whether `arch` is a ResNet, which has no patch tokens."""
        return self.arch in RESNET_ARCHS

    @property
    def num_blocks(self) -> int:
        """Blocks of the backbone; of a ResNet, its residual blocks."""
        return self.depth or ARCH_BLOCKS[self.arch]

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_chans"):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("embed_dim", "depth", "num_heads"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "at least 1, or null")
        self.require("drop_path_rate", 0 <= self.drop_path_rate < 1, "at least 0 and below 1")
        self.require("layerscale", (self.layerscale or 0) >= 0, "at least 0, or null")
        self.require("ffn_ratio", self.ffn_ratio is None or self.ffn_ratio > 0, "above 0, or null")
        self.require("num_register_tokens", self.num_register_tokens >= 0, "at least 0")
        self.require("interpolate_offset", self.interpolate_offset >= 0, "at least 0")
        self._require_rope_ranges()
        if self.is_resnet:
            self._require_no_vit_keys()
        else:
            self.require("sync_batchnorm", not self.sync_batchnorm, f"false: student.arch={self.arch} has no BatchNorm")
            self._require_ffn_of_the_family()
            self._require_whole_heads()

    def _require_rope_ranges(self) -> None:
        for name in ("base", "min_period", "max_period"):
            value = getattr(self, f"pos_embed_rope_{name}")
            self.require(f"pos_embed_rope_{name}", value is None or value > 0, "above 0, or null")
        shift = self.pos_embed_rope_shift_coords
        self.require("pos_embed_rope_shift_coords", (shift or 0) >= 0, "at least 0, or null")
        for name in ("pos_embed_rope_jitter_coords", "pos_embed_rope_rescale_coords"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "at least 1, or null")
        base, low, high = (getattr(self, f"pos_embed_rope_{name}") for name in ("base", "min_period", "max_period"))
        if (low is None) != (high is None) or (base is None) == (low is None):
            raise ConfigError(
                f"student.pos_embed_rope_base={show_value(base)}, pos_embed_rope_min_period={show_value(low)} and "
                f"pos_embed_rope_max_period={show_value(high)}: set the base alone, or both periods and base null"
            )
        if low is not None and low > high:
            raise ConfigError(
                f"student.pos_embed_rope_min_period={low} is above student.pos_embed_rope_max_period={high}"
            )

    def _require_no_vit_keys(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "ffn_ratio"):
            self.require(name, getattr(self, name) is None, f"null: student.arch={self.arch} is no ViT")
        no_registers = self.num_register_tokens == 0
        self.require("num_register_tokens", no_registers, f"0: student.arch={self.arch} has no tokens")

    def _require_ffn_of_the_family(self) -> None:
        """The two families hold gated layers in one matrix or in two, which weights of the other cannot fill."""
        if self.pos_embed_type == "learned":
            fits = self.ffn_layer not in ("swiglu32", "swiglu64", "swiglu128")
            self.require("ffn_layer", fits, "mlp, swiglu or swiglufused with student.pos_embed_type=learned")
        else:
            fits = self.ffn_layer != "swiglufused"
            self.require(
                "ffn_layer", fits, "mlp, swiglu, swiglu32, swiglu64 or swiglu128 with student.pos_embed_type=rope"
            )

    def _require_whole_heads(self) -> None:
        arch_width, arch_heads = ARCH_WIDTH_AND_HEADS[self.arch]
        width, heads = self.embed_dim or arch_width, self.num_heads or arch_heads
        if width % heads:
            raise ConfigError(
                f"student.embed_dim={width} is not a multiple of student.num_heads={heads} "
                f"(student.arch={self.arch} has {arch_width} and {arch_heads}); set both"
            )
        if self.pos_embed_type == "rope" and width % (4 * heads):
            raise ConfigError(
                f"student.embed_dim={width} is not a multiple of 4 * student.num_heads={4 * heads}, which "
                f"student.pos_embed_type=rope needs; use {nearest_multiples(width, 4 * heads)}"
            )
