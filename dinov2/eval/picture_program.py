"""The skeleton of programs that show what a backbone sees in images: from the command line to a PNG file.

python eval/NAME.py --config-file F --pretrained-weights W --dataset S --output F.png [key=value ...]
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dinov2 import distributed
from dinov2.configs import Config
from dinov2.errors import ConfigError
from dinov2.eval.build import compute_dtype, load_frozen_backbone
from dinov2.eval.options import config_from_options, get_backbone_parser, parse_options
from dinov2.eval.picture_images import ShownImage, load_images
from dinov2.logging import run_program, setup_logging

_MOST_IMAGES = 40  # in a picture


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a program draws from."""

    args: argparse.Namespace
    model: Any  # a `DinoVisionTransformer` in evaluation mode, on the device
    images: Sequence[ShownImage]
    device: torch.device
    dtype: torch.dtype  # of the forward pass
    heading: str  # weights and dataset, in a line


def run_picture(
    argv: Sequence[str] | None,
    *,
    name: str,
    description: str,
    draw: Callable[[Shown], Image.Image],
    add_options: Callable[[argparse.ArgumentParser], None],
    check_options: Callable[[argparse.Namespace], None] = lambda args: None,
) -> int:
    """Run a program that draws one picture of some images.

    Args:
        argv: arguments without the program's name; None: those of the process.
        name: of the program: `NAME.py`, and of the picture, `NAME.png`.
        description: for --help.
        draw: makes the picture; of several processes only the first calls it.
        add_options: adds the program's own options.
        check_options: raises a `ConfigError` for a wrong value.

    Returns:
        Exit code: 0 done, 1 failed, 2 bad usage or config.
    """

    def body(argv: Sequence[str] | None) -> int:
        parser = get_backbone_parser(f"{name}.py", description=description)
        _add_image_options(parser, name=name)
        add_options(parser)
        args = parse_options(parser, argv)
        if not args.dataset:
            raise ConfigError("--dataset is not given; name a folder of images, or a dataset string")
        if not 1 <= args.num_images <= _MOST_IMAGES:
            raise ConfigError(f"--num-images {args.num_images}: must be 1 to {_MOST_IMAGES}")
        output = Path(args.output or Path(args.output_dir) / f"{name}.png")
        require_png(output)
        check_options(args)
        cfg = config_from_options(args)
        if cfg.student.is_resnet:
            raise ConfigError(f"student.arch={cfg.student.arch}: {name}.py needs patches, which a ResNet has not")
        env = distributed.init(cfg.compute_precision.device)
        try:
            setup_logging(None, rank=env.rank)
            distributed.on_main_first(_draw_and_save, args, cfg, env.device, output, draw)
            return 0
        finally:
            distributed.shutdown()

    return run_program(body, argv)


def require_png(path: Path) -> None:
    """Raise ConfigError before any work is done for a picture of another kind."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--output {path}: must be a .png file")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, and make its folder if needed.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror}); choose another") from error


def _add_image_options(parser: argparse.ArgumentParser, *, name: str) -> None:
    parser.add_argument("--dataset", metavar="S", help="images: a folder, or a dataset string")
    parser.add_argument(
        "--num-images", type=int, default=8, metavar="N", help=f"shown, 1 to {_MOST_IMAGES}; default: 8"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="shorter side of an image before the network, px, a multiple of the patch size; larger shows finer maps; "
        "default: that of evaluations",
    )
    parser.add_argument("--output", metavar="PNG", help=f"picture; default: OUTPUT_DIR/{name}.png")


def _draw_and_save(
    args: argparse.Namespace, cfg: Config, device: torch.device, output: Path, draw: Callable[[Shown], Image.Image]
) -> None:
    """Load images and weights, draw, and write the picture; for rank 0."""
    images = load_images(cfg, args.dataset, num_images=args.num_images, image_size_px=args.image_size)
    model = load_frozen_backbone(cfg, args.pretrained_weights, checkpoint_key=args.checkpoint_key, device=device)
    shown = Shown(
        args=args,
        model=model,
        images=images,
        device=device,
        dtype=compute_dtype(cfg, device=device),
        heading=f"{args.pretrained_weights} on {args.dataset}",
    )
    save_picture(draw(shown), output)
    print(f"written: {output}, {len(images)} images of {args.dataset}")
