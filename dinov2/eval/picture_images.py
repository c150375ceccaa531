"""Images for pictures: whole, as the network sees them and as a reader does, of any size that patches tile.

Evaluations cut a square out of an image; pictures show all of it. Shapes: C channels, H rows, W columns.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinov2.configs import Config
from dinov2.data.contact_sheet import Window, find_window, show_colours
from dinov2.data.datasets.decoders import pil_to_tensor
from dinov2.data.datasets.extended import image_path
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.build import describe_preprocessing, open_eval_dataset
from dinov2.eval.health_views import choose_images

logger = logging.getLogger(__name__)

_LONGEST = 3  # longer side over the shorter; what is beyond, at both ends, is cut off


@dataclass(frozen=True)
class ShownImage:
    """An image of a picture."""

    name: str  # its path, or its place in the dataset
    values: Tensor  # [C, H, W] float32, normalised, for the network
    picture: Image.Image  # for the reader, W x H px


class WholeImage:
    """Transform that resizes a whole image so that patches tile it.

    The shorter side becomes `image_size_px`, the longer one the next multiple of the patch that keeps the proportions.

    Args:
        image_size_px: a multiple of the patch size.
        patch_size: px.
    """

    def __init__(self, image_size_px: int, *, patch_size: int) -> None:
        self.image_size_px = image_size_px
        self.patch_size = patch_size

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, Window]:
        """Return fractions of full scale [C, H, W], float32, and what becomes black and white when they are shown."""
        pixels = pil_to_tensor(image) if isinstance(image, Image.Image) else image
        if pixels.is_floating_point():
            window, full_scale = Window(np.zeros(len(pixels)), np.ones(len(pixels))), 1
        else:
            window, full_scale = find_window(pixels.numpy()), torch.iinfo(pixels.dtype).max
        height, width = pixels.shape[1:]
        longest = _LONGEST * min(height, width)
        top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
        pixels = pixels[:, top : top + longest, left : left + longest].float() / full_scale
        scale = self.image_size_px / min(height, width)
        size = [max(1, round(side * scale / self.patch_size)) * self.patch_size for side in pixels.shape[1:]]
        return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1), window


def load_images(
    cfg: Config, dataset: str, *, num_images: int, image_size_px: int | None, places: Sequence[int] | None = None
) -> list[ShownImage]:
    """Load some images of a dataset, chosen by a hash of their places: always the same.

    Args:
        cfg: network and preprocessing; `train.on_bad_image`.
        dataset: dataset string, or a folder of images.
        num_images: at most.
        image_size_px: shorter side; None: the side of evaluations, rounded down to whole patches.
        places: of the images in the dataset, in place of a choice.

    Raises:
        ConfigError: the dataset string is wrong, or patches do not tile the size.
        DatasetError: the dataset is missing or empty, or an image cannot be read.
    """
    settings = describe_preprocessing(cfg)
    size = _whole_patches(image_size_px, patch_size=cfg.student.patch_size, default=settings["crop_size"])
    transform = WholeImage(size, patch_size=cfg.student.patch_size)
    opened = open_eval_dataset(cfg, as_dataset_string(dataset), transform=transform).dataset
    if len(opened) == 0:
        raise DatasetError(f"{dataset}: holds no images")
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    chosen = choose_images(len(opened), at_most=num_images).tolist() if places is None else places
    images, errors = [], []
    for place in chosen:
        try:
            fractions, window = opened[place][0]
        except DatasetError as error:
            if cfg.train.on_bad_image == "error":
                raise
            errors.append(str(error))
            continue
        picture = show_colours(fractions.numpy(), window)
        images.append(ShownImage(_name(opened, place), (fractions - mean) / std, picture))
    if errors:
        logger.warning("%d images that cannot be read are left out; the first: %s", len(errors), errors[0])
    if not images:
        raise DatasetError(f"{dataset}: none of the {len(chosen)} images chosen can be read")
    return images


def as_dataset_string(text: str) -> str:
    """Turn the path of a folder into the dataset string of its images; leave other strings alone."""
    if not Path(text).expanduser().is_dir():
        return text
    quoted = f"'{text}'" if any(letter in text for letter in ":+*") else text
    return f"ImageFolder:root={quoted}"


def _whole_patches(image_size_px: int | None, *, patch_size: int, default: int) -> int:
    if image_size_px is None:
        return max(1, default // patch_size) * patch_size
    if image_size_px < patch_size or image_size_px % patch_size:
        below = max(1, image_size_px // patch_size) * patch_size
        raise ConfigError(
            f"--image-size {image_size_px} is not a multiple of student.patch_size={patch_size}; "
            f"use {below} or {below + patch_size}"
        )
    return image_size_px


def _name(dataset: Any, place: int) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in image_path(dataset, place))
