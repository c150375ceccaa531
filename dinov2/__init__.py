"""Continue DINOv2 self-supervised training on your own images."""

__version__ = "0.1.0"
