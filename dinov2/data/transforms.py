"""Deterministic transform of images for evaluations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinov2.data.augmentations import IMAGENET_MEAN, IMAGENET_STD, require_channels
from dinov2.data.datasets.decoders import pil_to_tensor


def make_classification_eval_transform(
    resize_size: int = 256,
    crop_size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Callable[[Any], Tensor]:
    """Make the usual evaluation transform: resize the shorter side, cut out the centre, normalise.

    Args:
        resize_size: shorter side after resizing, px; bicubic with antialiasing.
        crop_size: side of the square cut out, px; an image that is smaller is enlarged to it.
        mean: of each channel, fraction of full scale.
        std: of each channel.

    Returns:
        A function from a Pillow image of mode L or RGB or a tensor [C, H, W], uint8, uint16 or float in 0..1, to
        float32 [C, crop_size, crop_size]. It raises DatasetError for an image with another number of channels.
    """
    return _EvalTransform(max(resize_size, crop_size), crop_size, torch.tensor(mean), torch.tensor(std))


class _EvalTransform:
    """See `make_classification_eval_transform`; a class, so that loader workers can be given it."""

    def __init__(self, resize_size: int, crop_size: int, mean: Tensor, std: Tensor) -> None:
        self.resize_size = resize_size
        self.crop_size = crop_size
        self.mean = mean[:, None, None]
        self.std = std[:, None, None]

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        pixels = pil_to_tensor(image) if isinstance(image, Image.Image) else image
        require_channels(len(pixels), len(self.mean))
        full_scale = 1 if pixels.is_floating_point() else torch.iinfo(pixels.dtype).max
        height, width = pixels.shape[1:]
        scale = self.resize_size / min(height, width)
        size = (max(self.resize_size, int(height * scale)), max(self.resize_size, int(width * scale)))
        if pixels.dtype == torch.uint8:  # torch's fast path for 3 and 4 channels
            batch = pixels[None].contiguous(memory_format=torch.channels_last)
        else:
            batch = pixels[None].float()
        resized = F.interpolate(batch, size, mode="bicubic", antialias=True)[0].float()
        top, left = round((size[0] - self.crop_size) / 2), round((size[1] - self.crop_size) / 2)
        square = resized[:, top : top + self.crop_size, left : left + self.crop_size] / full_scale
        return (square.clamp(0, 1) - self.mean) / self.std
