"""Patch features of images as colours: alike colours are alike features, across all images of the picture.

    python eval/pca_maps.py --config-file F --pretrained-weights W --dataset S [--image-size 448]
                            [--foreground-threshold 0.5] --output maps.png

The three largest principal components of the patch features, fitted over the patches of all images together, become
red, green and blue. With a threshold, the first component tells objects from background, and the colours are the
components of the objects' patches alone, as in the pictures of DINOv2's paper.

Shapes: n patches of all images, D features; a grid of an image has rows x columns patches.
Source: Oquab et al. 2023, arXiv:2304.07193, figure 1.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.contact_sheet import Cell, Row, draw_sheet
from dinov2.errors import ConfigError
from dinov2.eval.picture_program import Shown, run_picture

_CELL = 256  # px
_TAILS = (0.01, 0.99)  # quantiles of a component that become 0 and 1
_BLACK = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Draw as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_picture(
        argv,
        name="pca_maps",
        description="Patch features of images as colours: their three largest principal components.",
        draw=_draw,
        add_options=_add_options,
        check_options=_check_options,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--foreground-threshold",
        type=float,
        metavar="T",
        help="of the first component, 0 to 1: patches above it are objects, others black; default: no threshold",
    )
    parser.add_argument(
        "--invert-foreground",
        action="store_true",
        help="take the patches below the threshold for objects; default: the side that is rarer at the edges",
    )


def _check_options(args: argparse.Namespace) -> None:
    threshold = args.foreground_threshold
    if threshold is not None and not 0 < threshold < 1:
        raise ConfigError(f"--foreground-threshold {threshold}: must be above 0 and below 1")
    if args.invert_foreground and threshold is None:
        raise ConfigError("--invert-foreground: needs --foreground-threshold T")


def patch_tokens(model: nn.Module, image: Tensor, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Compute the patch features of one image, [rows, columns, D] float32, on the CPU; registers are left out.

    Args:
        model: a `DinoVisionTransformer` in evaluation mode, on the device.
        image: [C, H, W], normalised; sides are multiples of the patch size.
        device: where the model is.
        dtype: of the forward pass (autocast).
    """
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        (tokens,) = model.get_intermediate_layers(image[None].to(device), 1, reshape=True)  # [1, D, rows, columns]
    return tokens[0].permute(1, 2, 0).float().cpu()


def pca_maps(
    tokens: Sequence[Tensor], *, foreground_threshold: float | None = None, invert_foreground: bool = False
) -> list[np.ndarray]:
    """Turn the patch features of images into colours; one fit for all of them.

    Args:
        tokens: of each image, [rows, columns, D]; left unchanged.
        foreground_threshold: of the first component, whose range is 0..1; patches above it get colours, others are
            black. None: all get colours.
        invert_foreground: give colours to the patches below. The sign of a component means nothing by itself; here,
            the first has its lower values at the edges of the images.

    Returns:
        Colours 0..1 of each image, [rows, columns, 3] float32.

    Raises:
        ConfigError: fewer than 4 patches are left.
    """
    values = torch.cat([grid.flatten(0, 1) for grid in tokens])  # [n, D]
    is_shown = torch.ones(len(values), dtype=torch.bool)
    if foreground_threshold is not None:
        first = _as_fractions(_components(values, 1))[:, 0]
        at_edges = torch.cat([_edges(grid) for grid in tokens])
        if first[at_edges].mean() > first.mean():
            first = 1 - first
        is_shown = (first > foreground_threshold) != invert_foreground
    count = int(is_shown.sum())
    if count < 4:
        raise ConfigError(
            f"--foreground-threshold {foreground_threshold} leaves {count} of {len(values)} patches; "
            "choose one nearer to the middle"
            if foreground_threshold is not None
            else f"the images have {count} patches altogether, too few for colours; raise --image-size"
        )
    colours = torch.full((len(values), 3), _BLACK)
    colours[is_shown] = _as_fractions(_components(values[is_shown], 3))
    parts = colours.split([grid.shape[0] * grid.shape[1] for grid in tokens])
    return [part.view(*grid.shape[:2], 3).numpy() for part, grid in zip(parts, tokens, strict=True)]


def _components(values: Tensor, count: int) -> Tensor:
    """Project on the largest principal components, [n, count] float32; each has its largest weight positive."""
    centred = values.double() - values.double().mean(dim=0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:].flip(1)  # [D, count]
    largest = directions.abs().argmax(dim=0)
    directions = directions * directions.gather(0, largest[None]).sign()
    return (centred @ directions).float()


def _as_fractions(components: Tensor) -> Tensor:
    """Stretch each component to 0..1; a few extreme patches do not count."""
    low, high = (torch.from_numpy(np.quantile(components.numpy(), tail, axis=0)).float() for tail in _TAILS)
    return ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def _edges(grid: Tensor) -> Tensor:
    """Tell which patches lie at the edge of their image, [rows * columns] bool."""
    is_edge = torch.ones(grid.shape[:2], dtype=torch.bool)
    is_edge[1:-1, 1:-1] = False
    return is_edge.flatten()


def _draw(shown: Shown) -> Image.Image:
    tokens = [patch_tokens(shown.model, image.values, device=shown.device, dtype=shown.dtype) for image in shown.images]
    threshold = shown.args.foreground_threshold
    maps = pca_maps(tokens, foreground_threshold=threshold, invert_foreground=shown.args.invert_foreground)
    rows = []
    for image, colours in zip(shown.images, maps, strict=True):
        small = Image.fromarray(np.round(colours * 255).astype(np.uint8))
        blocks = small.resize(image.picture.size, Image.Resampling.NEAREST)
        smooth = small.resize(image.picture.size, Image.Resampling.BICUBIC)
        over = Image.blend(image.picture.convert("L").convert("RGB"), smooth, 0.6)
        size = f"{small.width} x {small.height} patches"
        cells = [Cell(image.picture, f"{image.picture.width} x {image.picture.height} px"), Cell(blocks, size)]
        rows.append(Row(image.name, [*cells, Cell(over, "over the image")]))
    about = ["principal components of patch features, fitted over all these images; alike colours: alike features"]
    if threshold is not None:
        side = "below" if shown.args.invert_foreground else "above"
        about.append(f"black: patches whose first component is not {side} {threshold:g} of its range")
    return draw_sheet(rows, heading=[shown.heading, *about], cell_px=_CELL)


if __name__ == "__main__":
    sys.exit(main())
