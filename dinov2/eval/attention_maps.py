"""Where the class token of images looks: the attention of each head of one block, and their mean, as maps.

    python eval/attention_maps.py --config-file F --pretrained-weights W --dataset S [--image-size 448] [--block 11]
                                  --output maps.png

Maps show the weights of the patches alone; what class token and registers get is left out, and the share that is left
stands below each map.

Shapes: H heads, R registers; a grid of an image has rows x columns patches.
"""

import argparse
import sys
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.contact_sheet import Cell, Row, draw_sheet
from dinov2.errors import ConfigError
from dinov2.eval.picture_images import ShownImage
from dinov2.eval.picture_program import Shown, run_picture
from dinov2.models import DinoVisionTransformer

_CELL = 192  # px
_MOST_HEADS = 16  # shown
_COLOURS = "inferno"
_TAIL = 0.995  # quantile of a map that gets the brightest colour: single patches may stand far out


def main(argv: Sequence[str] | None = None) -> int:
    """Draw as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_picture(
        argv,
        name="attention_maps",
        description="Attention of the class token to the patches of images, for each head of a block.",
        draw=_draw,
        add_options=_add_options,
    )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--block", type=int, metavar="N", help="whose attention is shown, counted from 0; default: the last"
    )


def attention_maps(
    model: DinoVisionTransformer, image: Tensor, *, device: torch.device, dtype: torch.dtype, block: int = -1
) -> np.ndarray:
    """Compute how the class token of one image weighs the patches.

    Args:
        model: in evaluation mode, on the device.
        image: [C, H, W], normalised; sides are multiples of the patch size.
        device: where the model is.
        dtype: of the forward pass (autocast).
        block: counted from 0, or from the last by negative numbers.

    Returns:
        Weights [heads, rows, columns], float32; those of a head sum to 1 together with the weights of the class token
        itself and of the registers, which are left out.
    """
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        weights = model.get_class_attention(image[None].to(device), block)[0]
    rows, columns = (side // model.patch_size for side in image.shape[1:])
    return weights[:, 1 + model.num_register_tokens :].unflatten(1, (rows, columns)).float().cpu().numpy()


def _draw(shown: Shown) -> Image.Image:
    model = shown.model
    block = model.depth - 1 if shown.args.block is None else shown.args.block
    if not 0 <= block < model.depth:
        raise ConfigError(f"--block {block}: the backbone has blocks 0 to {model.depth - 1}")
    rows = []
    for image in shown.images:
        maps = attention_maps(model, image.values, device=shown.device, dtype=shown.dtype, block=block)
        cells = [Cell(image.picture, f"{image.picture.width} x {image.picture.height} px")]
        cells.append(_cell("mean", maps.mean(axis=0), image))
        cells += [_cell(f"head {number}", weights, image) for number, weights in enumerate(maps[:_MOST_HEADS])]
        rows.append(Row(image.name, cells))
    about = f"attention of the class token to the patches in block {block}, each map in its own range"
    if model.num_heads > _MOST_HEADS:
        about += f"; the first {_MOST_HEADS} of {model.num_heads} heads, the mean is over all"
    return draw_sheet(rows, heading=[shown.heading, about], cell_px=_CELL)


def _cell(name: str, weights: np.ndarray, image: ShownImage) -> Cell:
    """Colour one map, dark to bright."""
    brightest = max(float(np.quantile(weights, _TAIL)), 1e-12)
    colours = matplotlib.colormaps[_COLOURS](np.clip(weights / brightest, 0, 1), bytes=True)[..., :3]
    picture = Image.fromarray(np.ascontiguousarray(colours)).resize(image.picture.size, Image.Resampling.NEAREST)
    return Cell(picture, f"{name}, {100 * weights.sum():.0f} % on patches")


if __name__ == "__main__":
    sys.exit(main())
