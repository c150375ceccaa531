"""Random resized crops of one image, drawn before it is decoded, cut and resized in 8 or 16 bits.

Source: boxes as Inception's crops in torchvision's `RandomResizedCrop` (same distribution); bicubic with antialiasing.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinov2.data.datasets.decoders import pil_to_tensor
from dinov2.data.datasets.image_source import ImageSource, RegionSource

_ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height
_NUM_ATTEMPTS = 10
_UINT16_MAX = 65535
_DECODING_MARGIN = 2.0  # an image is decoded this many times finer than its finest crop; as Pillow's `thumbnail`


@dataclass(frozen=True)
class CropBox:
    """A part of an image, in pixels of the whole image, and what becomes of it."""

    top: int
    left: int
    height: int
    width: int
    size: int  # side of the finished crop, px
    flip_horizontally: bool
    flip_vertically: bool

    @property
    def reduction(self) -> float:
        """How many times smaller the finished crop is, in the direction where that is less."""
        return min(self.height, self.width) / self.size


def draw_box(
    height: int, width: int, *, scale: tuple[float, float], size: int, flips: tuple[float, float], rng: random.Random
) -> CropBox:
    """Draw a box.

    Args:
        height: of the image, px.
        width: of the image, px.
        scale: smallest and largest share of the image's area.
        size: side of the finished crop, px.
        flips: probabilities of a horizontal and a vertical flip.
        rng: the only source of randomness.
    """
    top, left, box_height, box_width = _draw_rectangle(height, width, scale, rng)
    horizontally, vertically = (rng.random() < probability for probability in flips)
    return CropBox(top, left, box_height, box_width, size, horizontally, vertically)


def cut_crops(image: ImageSource | Image.Image | Tensor, boxes: list[CropBox]) -> list[Tensor]:
    """Cut and resize boxes out of one image.

    Args:
        image: a source, which is decoded smaller where it can be and no box suffers, or of which no more is read than
            the boxes need; a Pillow image of mode L or RGB; or a tensor [C, H, W], uint8 or uint16. Left unchanged.
        boxes: in pixels of the full image.

    Returns:
        One tensor [C, size, size] a box, of the image's dtype.

    Raises:
        DatasetError: a source cannot be decoded.
        TypeError: a tensor of another dtype.
    """
    if isinstance(image, RegionSource):
        return _cut_regions(image, boxes)
    height, width = image_size(image)
    pixels = _require_integers(_decode(image, boxes))
    down, across = pixels.shape[1] / height, pixels.shape[2] / width
    return [_cut(pixels, box, down, across) for box in boxes]


def image_size(image: ImageSource | Image.Image | Tensor) -> tuple[int, int]:
    """Height and width of an image, px."""
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width


def _draw_rectangle(
    height: int, width: int, scale: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box with random area and aspect; a central one if none fits."""
    log_aspects = (math.log(_ASPECT_RANGE[0]), math.log(_ASPECT_RANGE[1]))
    for _ in range(_NUM_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_aspects))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    aspect = min(max(width / height, _ASPECT_RANGE[0]), _ASPECT_RANGE[1])
    box_height, box_width = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _decode(image: Any, boxes: list[CropBox]) -> Tensor:
    """Pixels [C, H, W]."""
    if isinstance(image, ImageSource):
        return image.to_tensor(reduce=min(box.reduction for box in boxes) / _DECODING_MARGIN)
    if isinstance(image, Image.Image):
        return pil_to_tensor(image)
    return image


def _require_integers(pixels: Tensor) -> Tensor:
    if pixels.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"an image is uint8 or uint16, not {pixels.dtype}")
    return pixels


def _cut_regions(image: RegionSource, boxes: list[CropBox]) -> list[Tensor]:
    """Cut boxes out of an image read in parts: each box by itself, or once what holds them all, if that is less."""
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    if sum(box.height * box.width for box in boxes) < (bottom - top) * (right - left):
        parts = (image.read_region(box.top, box.left, box.height, box.width) for box in boxes)
        return [
            _cut(_require_integers(part), replace(box, top=0, left=0), 1.0, 1.0)
            for part, box in zip(parts, boxes, strict=True)
        ]
    shared = _require_integers(image.read_region(top, left, bottom - top, right - left))
    return [_cut(shared, replace(box, top=box.top - top, left=box.left - left), 1.0, 1.0) for box in boxes]


def _cut(pixels: Tensor, box: CropBox, down: float, across: float) -> Tensor:
    """Cut one box out of an image whose sides are `down` and `across` times those the box was drawn for."""
    top, left = min(round(box.top * down), pixels.shape[1] - 1), min(round(box.left * across), pixels.shape[2] - 1)
    bottom = max(top + 1, round((box.top + box.height) * down))
    right = max(left + 1, round((box.left + box.width) * across))
    crop = _resize(pixels[:, top:bottom, left:right], box.size)
    flipped = [dim for dim, flip in ((-2, box.flip_vertically), (-1, box.flip_horizontally)) if flip]
    return crop.flip(flipped) if flipped else crop


def _resize(region: Tensor, size: int) -> Tensor:
    """Resize to [C, size, size]; uint16 passes through float32, as torch resizes no other way."""
    region = region[None]
    if region.dtype == torch.uint16:
        resized = F.interpolate(region.float(), (size, size), mode="bicubic", antialias=True)
        return resized[0].round().clamp(0, _UINT16_MAX).to(torch.uint16)
    region = region.contiguous(memory_format=torch.channels_last)  # torch's fast path for 3 and 4 channels of uint8
    return F.interpolate(region, (size, size), mode="bicubic", antialias=True)[0].contiguous()
