"""A tiny backbone for the evaluation programs, the options that describe it, and what a failed program says."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from dinov2.models import build_model

IMAGE_SIZE_PX = 16
MODEL = ["student.arch=vit_tiny", "student.depth=2", "student.embed_dim=48", "student.patch_size=4"]
SIZES = [
    f"crops.global_crops_size={IMAGE_SIZE_PX}",
    "crops.local_crops_size=8",
    "compute_precision.device=cpu",
]


def tiny_backbone(*, seed: int = 0, layerscale: float = 1e-5, image_size_px: int = IMAGE_SIZE_PX) -> torch.nn.Module:
    """Build the network that MODEL and SIZES describe."""
    model = build_model("vit_tiny", depth=2, embed_dim=48, patch_size=4, img_size=image_size_px, init_values=layerscale)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def write_tiny_backbone(path: Path, **settings: float) -> Path:
    """Write it as the teacher file of a run; `settings` are those of `tiny_backbone`."""
    state = tiny_backbone(**settings).state_dict()
    torch.save({"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}}, path)
    return path


def fails_with(
    main: Callable[[Sequence[str]], int], capsys: pytest.CaptureFixture[str], args: Sequence[str], *, code: int
) -> str:
    """Run a program that must end with `code`; returns the last line it wrote to standard error."""
    assert main(args) == code
    return capsys.readouterr().err.splitlines()[-1]
