"""Bases of datasets, decoding of image files, and ImageNet at its official address."""

from dinov2.data.datasets.image_net import ImageNet
from dinov2.data.datasets.image_net_22k import ImageNet22k

__all__ = ["ImageNet", "ImageNet22k"]
