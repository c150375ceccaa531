"""Show what training makes of the images: a contact sheet of raw images, crops and masks.

    python run/preview.py --dataset S --config-file F [--output preview.png] [--num-images 8] [--stage NAME] [--seed 0]
        [key=value ...]

The images are the first that a run of one process with this config draws, with the same crops, colours and masks:
order, augmentation and masks come from the same functions and the same seeds. With `--stage` they are what that stage
would make of these first images.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.configs import Config, batch_size_per_rank, load_config, stage_configs
from dinov2.data import DataAugmentationDINO
from dinov2.data.contact_sheet import (
    Cell,
    Row,
    draw_sheet,
    find_window,
    mosaic,
    show_channels,
    show_colours,
    show_masked,
)
from dinov2.data.datasets.extended import image_path
from dinov2.data.loaders import make_collate
from dinov2.data.random_crops import image_size
from dinov2.data.raw_pixels import as_fractions, open_image, read_shown_pixels
from dinov2.data.samplers import make_stream, pass_size
from dinov2.data.samples import Sample, TrainingSamples
from dinov2.errors import ConfigError, DatasetError
from dinov2.logging import run_program, setup_logging
from dinov2.run.data_table import printable
from dinov2.run.named_dataset import choose_name, open_dataset, require_outside
from dinov2.train.build import build_augmentation

_NUM_LOCAL = 4  # local crops shown


def main(argv: Sequence[str] | None = None) -> int:
    """Draw as the command line says; returns the exit code (0 done, 1 failed, 2 bad usage)."""
    return run_program(_run, argv)


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        prog="preview.py",
        description="Contact sheet of what training makes of the images: raw, stain-normalised if the dataset does "
        "that, the two global crops, the iBOT mask on the first, local crops.",
    )
    parser.add_argument("--dataset", metavar="S", help="dataset string; default: train.dataset_path")
    parser.add_argument("--config-file", "--config", metavar="F", help="YAML file of the run; default: none")
    parser.add_argument("--output", default="preview.png", metavar="PNG", help="picture; default: preview.png")
    parser.add_argument("--num-images", type=int, default=8, metavar="N", help="images shown; default: 8")
    parser.add_argument("--stage", metavar="NAME", help="of the config's stages; default: the first")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of order, crops and masks, >= 0; stands for train.seed (default 0)"
    )
    parser.add_argument(
        "opts", nargs="*", metavar="key=value", help="config keys over the file, e.g. crops.local_crops_size=98"
    )
    return parser


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_intermixed_args(argv)
    if args.num_images < 1:
        raise ConfigError(f"--num-images {args.num_images}: must be at least 1")
    overrides = list(args.opts) + ([] if args.seed is None else [f"train.seed={args.seed}"])
    cfg = _settings_of(args.stage, load_config(args.config_file, overrides))
    name, output = choose_name(args.dataset, cfg), Path(args.output)
    setup_logging(None, rank=0)
    dataset = open_dataset(name, cfg)
    require_outside(dataset, output.parent, option="--output")
    rows = preview_rows(dataset, cfg, num_images=args.num_images)
    heading = [printable(name), _describe(cfg, config_file=args.config_file, stage=args.stage)]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(rows, heading=heading).save(output)
    except (OSError, ValueError) as error:  # Pillow's for an ending it does not know is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--output {output}: cannot be written ({reason}); name a .png file") from error
    print(f"written: {output}, {len(rows)} of {len(dataset)} images of {printable(name)}")
    return 0


def _settings_of(stage: str | None, cfg: Config) -> Config:
    """Return the settings of a stage; None: of the first."""
    found = dict(stage_configs(cfg))
    if stage is None:
        return next(iter(found.values()))
    if stage not in found:
        known = f"it has {', '.join(found)}" if cfg.stages else "it has none"
        raise ConfigError(f"--stage {stage}: the config has no stage of that name; {known}")
    return found[stage]


@dataclass(frozen=True)
class _Drawn:
    """The place of an image in the stream of samples, and its sample or why there is none."""

    index: int
    sample: Sample | None
    reason: str = ""


def preview_rows(dataset: Any, cfg: Config, *, num_images: int) -> list[Row]:
    """Make a row of pictures of each of the first images of training.

    Args:
        dataset: the images.
        cfg: of the run.
        num_images: rows; fewer if a pass over the dataset has fewer images.

    Raises:
        DatasetError: none of them can be read.
    """
    augmentation = build_augmentation(cfg)
    num_in_pass = pass_size(dataset)
    wanted_batch = batch_size_per_rank(cfg, world_size=1) * cfg.optim.gradient_accumulation_steps
    global_batch_size = min(wanted_batch, num_in_pass)
    stream = make_stream(dataset, cfg.train.sampler, seed=cfg.train.seed, global_batch_size=global_batch_size)
    samples = TrainingSamples(dataset, augmentation, seed=cfg.train.seed)
    drawn = []
    for position in range(min(num_images, num_in_pass)):
        index = stream.index_at(position)
        try:
            drawn.append(_Drawn(index, samples[position, index]))
        except DatasetError as error:
            drawn.append(_Drawn(index, None, str(error)))
    good = [one.sample for one in drawn if one.sample is not None]
    if not good:
        raise DatasetError(drawn[0].reason)
    collate = make_collate(
        augmentation,
        patch_size=cfg.student.patch_size,
        seed=cfg.train.seed,
        global_batch_size=global_batch_size,
        mask_sample_probability=cfg.ibot.mask_sample_probability,
        mask_ratio_min_max=cfg.ibot.mask_ratio_min_max,
    )
    batch = collate(good)
    batch = augmentation.finish(batch, batch["seeds"])
    if not cfg.ibot.loss_weight:
        batch.pop("collated_masks")
    places = iter(range(len(good)))
    return [
        Row(_caption(dataset, one.index), (), one.reason)
        if one.sample is None
        else _row(dataset, one.index, batch, next(places), augmentation=augmentation, num_samples=len(good))
        for one in drawn
    ]


def _row(
    dataset: Any,
    index: int,
    batch: dict[str, Any],
    place: int,
    *,
    augmentation: DataAugmentationDINO,
    num_samples: int,
) -> Row:
    """Pictures of one image; `place` is that of its sample in the batch."""
    image = open_image(dataset, index)
    pixels = read_shown_pixels(image)
    window = find_window(pixels)
    num_channels = len(pixels)
    cells = [Cell(show_colours(as_fractions(pixels), window), _words(image, pixels))]
    raw = _unnormalised(dataset, index)
    if raw is not None:
        before = read_shown_pixels(raw)
        cells[0] = Cell(show_colours(as_fractions(before), find_window(before)), "raw")
        cells.append(Cell(show_colours(as_fractions(pixels), window), "stain-normalised"))
    if num_channels not in (1, 3):
        cells.append(Cell(show_channels(as_fractions(pixels), window), f"its {num_channels} channels"))
    globals_, locals_ = (
        [_denormalised(crop, augmentation) for crop in batch[f"collated_{kind}_crops"][place::num_samples]]
        for kind in ("global", "local")
    )
    pictures = [show_colours(crop, window) for crop in globals_]
    size = augmentation.global_crops_size
    cells += [Cell(picture, f"global crop {number}, {size} px") for number, picture in enumerate(pictures, start=1)]
    if "collated_masks" in batch:
        cells.append(_masked(pictures[0], batch["collated_masks"][place]))
    if locals_:
        shown = locals_[:_NUM_LOCAL]
        words = f"{len(shown)} of {len(locals_)} local crops, {augmentation.local_crops_size} px"
        cells.append(Cell(mosaic([show_colours(crop, window) for crop in shown]), words))
    return Row(_caption(dataset, index, pixels, image=image), cells)


def _unnormalised(dataset: Any, index: int) -> Any:
    """Image before its stain was normalised; None if the dataset does no such thing."""
    if hasattr(dataset, "place"):  # a mixture
        part, inner = dataset.place(index)
        return _unnormalised(dataset.parts[part], inner)
    return dataset.raw_image(index) if getattr(dataset, "stain_norm", "none") != "none" else None


def _words(image: Any, pixels: np.ndarray) -> str:
    """What the picture of a raw image shows."""
    middle = "middle of " if image_size(image) != pixels.shape[1:] else ""
    stretched = "" if pixels.dtype == np.uint8 and len(pixels) in (1, 3) else ", stretched"
    channels = ", first 3 channels" if len(pixels) > 3 else ""
    return f"{middle}raw{channels}{stretched}"


def _masked(picture: Any, mask: Tensor) -> Cell:
    """The mask of a crop; `mask` [patches] bool."""
    side = int(np.sqrt(len(mask)))
    grid = mask.numpy().reshape(side, side)
    words = f"mask: {100 * grid.mean():.0f} % of {side} x {side} patches" if grid.any() else "mask: none"
    return Cell(show_masked(picture, grid), words)


def _denormalised(crop: Tensor, augmentation: DataAugmentationDINO) -> np.ndarray:
    """Crop [C, H, W] as fractions of full scale."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (augmentation.mean, augmentation.std))
    return (crop * std + mean).numpy()


def _caption(dataset: Any, index: int, pixels: np.ndarray | None = None, *, image: Any = None) -> str:
    """Path, label, size and kind of an image."""
    parts = [f"{index}: {printable(image_path(dataset, index))}"]
    if hasattr(dataset, "get_target"):
        parts.append(_label(dataset, dataset.get_target(index)))
    elif hasattr(dataset, "get_targets") and (targets := dataset.get_targets()) is not None:
        parts.append(_label(dataset, int(targets[index])))
    if pixels is not None:
        height, width = image_size(image)
        parts.append(f"{width} x {height} px, {len(pixels)} x {pixels.dtype}")
    return "   ".join(part for part in parts if part)


def _label(dataset: Any, target: Any) -> str:
    """Name of a class; empty without a label."""
    names = list(getattr(dataset, "class_names", ()))
    if target is None or (isinstance(target, int) and target < 0):
        return ""
    return f"label {printable(str(names[target])) if isinstance(target, int) and target < len(names) else target}"


def _describe(cfg: Config, *, config_file: str | None, stage: str | None) -> str:
    """Say where the pictures come from."""
    parts = [f"config {config_file or 'of defaults'}", *([] if stage is None else [f"stage {stage}"])]
    return f"{', '.join(parts)}, seed {cfg.train.seed}: the first images of a run of one process"
