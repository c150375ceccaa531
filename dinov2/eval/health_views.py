"""Which images label-free measures look at, and the two views of each that alignment compares."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VIEW_SIDE = 0.75  # side of a view over the side of the image


def choose_images(num_images: int, *, at_most: int) -> np.ndarray:
    """Choose images of a dataset by a hash of their places: always the same, and nearly the same if images are added.

    Args:
        num_images: of the dataset.
        at_most: how many to choose; 0: all.

    Returns:
        Their places, int64, rising.
    """
    if not at_most or num_images <= at_most:
        return np.arange(num_images)
    return np.sort(np.argsort(_hash(np.arange(num_images, dtype=np.uint64)), kind="stable")[:at_most])


def _hash(numbers: np.ndarray) -> np.ndarray:
    """Mix the bits of integers, uint64 to uint64, no two alike; the finaliser of SplitMix64, Steele et al. 2014."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class TwoViews(nn.Module):
    """A backbone that looks at two crops of each image: upper left and lower right, enlarged to the image's size.

    The crops have 0.75 of the image's side and share a quarter of its area. They are the same whatever augmentation
    a run uses, so alignment can be compared between runs.

    Args:
        backbone: images [B, C, side, side] to features [B, D]; kept, not copied.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of both views end to end, [B, 2 * D]."""
        side = round(VIEW_SIDE * images.shape[-1])
        views = (images[..., :side, :side], images[..., -side:, -side:])
        size = images.shape[-2:]
        return torch.cat([self.backbone(F.interpolate(view, size, mode="bilinear")) for view in views], dim=1)
