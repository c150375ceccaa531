"""Settings of the images: crops, photometric augmentation, reading.

The comment of a field gives its unit and range, and where a number comes from. Defaults are DINOv2's, whose recipe of
colour jitter, blur and solarisation is BYOL's (arXiv:2006.07733).
"""

from dataclasses import dataclass
from typing import ClassVar

from dinov2.configs.section import Section, is_range


@dataclass(frozen=True, kw_only=True)
class CropsConfig(Section):
    """Two global crops and some smaller local crops of each image."""

    KEY: ClassVar[str] = "crops"

    global_crops_scale: tuple[float, float] = (0.32, 1.0)  # smallest and largest share of the image's area, 0..1
    local_crops_number: int = 8  # local crops of an image, >= 0
    local_crops_scale: tuple[float, float] = (0.05, 0.32)  # smallest and largest share of the image's area, 0..1
    global_crops_size: int = 224  # px, a multiple of student.patch_size
    local_crops_size: int = 96  # px, a multiple of student.patch_size
    # px, a multiple of student.patch_size: the Gram teacher sees the global crops in this size; null: as they are
    gram_teacher_crops_size: int | None = None
    gram_teacher_no_distortions: bool = False  # such crops without colour jitter, grey, blur and solarisation

    def __post_init__(self) -> None:
        for name in ("global_crops_scale", "local_crops_scale"):
            scale = getattr(self, name)
            self.require(name, scale[0] > 0 and is_range(scale, 0, 1), "two rising numbers above 0 and up to 1")
        self.require("local_crops_number", self.local_crops_number >= 0, "at least 0")
        for name in ("global_crops_size", "local_crops_size"):
            self.require(name, getattr(self, name) >= 1, "at least 1 px")
        size = self.gram_teacher_crops_size
        self.require("gram_teacher_crops_size", size is None or size >= 1, "at least 1 px, or null")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Section):
    """Flips and changes of the pixel values. Three numbers stand for the first global, second global, local crops."""

    KEY: ClassVar[str] = "augmentation"

    horizontal_flip_probability: float = 0.5  # of mirroring left and right, 0..1
    vertical_flip_probability: float = 0.0  # 0..1; 0.5 suits images without an up and a down (microscopy, histology)
    color_jitter_probability: float = 0.8  # of the four changes below, in random order, 0..1
    brightness: float = 0.4  # factor drawn from 1 - value .. 1 + value, value >= 0
    contrast: float = 0.4  # as brightness
    saturation: float = 0.2  # as brightness; acts on images of 3 channels
    hue: float = 0.1  # turns of the colour circle, -value .. value, 0..0.5; acts on images of 3 channels
    grayscale_probability: float = 0.2  # 0..1; acts on images of 3 channels
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)  # of Gaussian blur, 0..1 each
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # px, smallest and largest, > 0
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)  # of inverting bright values, 0..1 each
    solarize_threshold: float = 0.5  # values above are inverted; fraction of full scale, 0..1
    mean: tuple[float, ...] | None = None  # one per channel, fraction of full scale; null: ImageNet's for 3, else 0.5
    std: tuple[float, ...] | None = None  # one per channel, > 0; null: ImageNet's for 3 channels, else 0.25

    def __post_init__(self) -> None:
        for name in (
            "horizontal_flip_probability",
            "vertical_flip_probability",
            "color_jitter_probability",
            "grayscale_probability",
            "solarize_threshold",
        ):
            self.require(name, 0 <= getattr(self, name) <= 1, "in 0..1")
        for name in ("brightness", "contrast", "saturation"):
            self.require(name, getattr(self, name) >= 0, "at least 0")
        self.require("hue", 0 <= self.hue <= 0.5, "in 0..0.5")
        for name in ("blur_probability", "solarize_probability"):
            self.require(name, all(0 <= p <= 1 for p in getattr(self, name)), "three numbers in 0..1")
        rising = 0 < self.blur_sigma[0] <= self.blur_sigma[1]
        self.require("blur_sigma", rising, "two rising numbers above 0 px")
        self.require("std", all(value > 0 for value in self.std or ()), "above 0 in each channel")
        self.require("mean", (self.mean is None) == (self.std is None), "given together with augmentation.std")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Reading images and what is remembered about them."""

    KEY: ClassVar[str] = "data"

    cache_dir: str | None = None  # folder offered to datasets that cache what they find; null: <train.output_dir>/cache
    max_image_pixels: int | None = 178956970  # larger images are refused, >= 1; null: no limit (Pillow's bomb limit)

    def __post_init__(self) -> None:
        holds = self.max_image_pixels is None or self.max_image_pixels >= 1
        self.require("max_image_pixels", holds, "at least 1, or null")
