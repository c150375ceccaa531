"""Look at all images before training: what they are, what is wrong with them, and whether splits share any.

    python run/check_data.py --dataset S [--against S2 ...] [--config-file F] [--output-dir D] [--sample N]
        [key=value ...]

The mean and standard deviation are of the images as training reads them, each image counted alike whatever its size,
because each gives crops of the same sizes. Files that occur twice are found among all images, by their content; images
that are no files of their own, by their pixels. Memory is bounded: a few numbers an image.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.configs import Config, load_config
from dinov2.data.random_streams import shuffled
from dinov2.data.samplers import pass_size
from dinov2.errors import ConfigError, Dinov2Error
from dinov2.logging import run_program, setup_logging
from dinov2.run.data_findings import Findings, compare_sets, judge_set
from dinov2.run.data_plots import plot_sets
from dinov2.run.data_report import CheckedSet, count, describe_set
from dinov2.run.data_table import format_augmentation, format_comparison, format_set, printable
from dinov2.run.duplicates import content_keys, find_files
from dinov2.run.image_facts import inspect_images
from dinov2.run.named_dataset import choose_name, open_dataset, require_outside
from dinov2.train.stages import plan_stages

REPORT_NAME = "check_data.json"
PICTURE_NAME = "check_data.png"
_SAMPLE_SEED = 0  # the same images are looked at each time


def main(argv: Sequence[str] | None = None) -> int:
    """Check as the command line says; returns the exit code (0 good, 1 training would fail, 2 bad usage)."""
    return run_program(_run, argv)


def get_args_parser() -> argparse.ArgumentParser:
    """Describe the options."""
    parser = argparse.ArgumentParser(
        prog="check_data.py",
        description="What a dataset holds, what is wrong with it, and what its splits have in common. "
        f"Writes {REPORT_NAME} and {PICTURE_NAME}; exits with 1 if training would fail or splits share images.",
    )
    parser.add_argument(
        "--dataset", metavar="S", help="dataset string of the training images; default: train.dataset_path"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="S",
        help="other splits, which must have no image and no group in common with it or each other; default: none",
    )
    parser.add_argument("--config-file", "--config", metavar="F", help="YAML file of the run; default: none")
    parser.add_argument(
        "--output-dir", metavar="D", help="folder for the report; stands for train.output_dir (default: here)"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="images of each set to decode, spread over it and the same each time; files are compared whole in any "
        "case; default: all",
    )
    parser.add_argument(
        "opts", nargs="*", metavar="key=value", help="config keys over the file, e.g. student.in_chans=1"
    )
    return parser


def _run(argv: Sequence[str] | None) -> int:
    args = get_args_parser().parse_intermixed_args(argv)
    if args.sample is not None and args.sample < 1:
        raise ConfigError(f"--sample {args.sample}: must be at least 1 image")
    against = [text for text in args.against if not _is_override(text)]
    overrides = [*args.opts, *(text for text in args.against if _is_override(text))]
    if args.output_dir is not None:
        overrides.append(f"train.output_dir={args.output_dir}")
    cfg = load_config(args.config_file, overrides)
    names = [choose_name(args.dataset, cfg), *against]
    setup_logging(None, rank=0)
    datasets = [open_dataset(name, cfg) for name in names]
    for dataset in datasets:
        require_outside(dataset, Path(cfg.train.output_dir), option="--output-dir")
    folder = _make_folder(cfg.train.output_dir)
    sets = check_sets(names, datasets, cfg, sample=args.sample)
    found = [describe_set(checked, crop_size=cfg.crops.global_crops_size) for checked in sets]
    common, findings = compare_sets(sets)
    judged = [judge_set(checked, facts, cfg) for checked, facts in zip(sets, found, strict=True)]
    if args.config_file or args.opts:
        judged.insert(0, _judge_batch(cfg, num_images=pass_size(sets[0].dataset)))
    problems = [text for one in (*judged, findings) for text in one.problems]
    warnings = [text for one in (*judged, findings) for text in one.warnings]
    report = {"sets": found, "in_common": common, "problems": problems, "warnings": warnings}
    _write(report, sets, folder)
    _show(report, folder)
    return 1 if problems else 0


def check_sets(names: Sequence[str], datasets: Sequence[Any], cfg: Config, *, sample: int | None) -> list[CheckedSet]:
    """Look at the images of several sets.

    Args:
        names: dataset strings.
        datasets: that they name.
        cfg: of the run.
        sample: images of each set that are decoded; None: all.

    Raises:
        DatasetError: a worker was killed.
    """
    num_workers = min(cfg.train.num_workers, len(os.sched_getaffinity(0)))
    files = [
        find_files(dataset, num_workers=num_workers, description=f"files of {_short(name)}")
        for name, dataset in zip(names, datasets, strict=True)
    ]
    inspected = [
        inspect_images(
            dataset,
            _choose(len(dataset), sample),
            wants_digest=one.has_none,
            num_workers=num_workers,
            description=f"images of {_short(name)}",
        )
        for name, dataset, one in zip(names, datasets, files, strict=True)
    ]
    pixels = []
    for dataset, facts in zip(datasets, inspected, strict=True):
        pixels.append(np.zeros(len(dataset), dtype=np.uint64))
        pixels[-1][facts.indices] = facts.digest
    keys = content_keys(datasets, files, pixels, num_workers=num_workers)
    return [CheckedSet(*one) for one in zip(names, datasets, inspected, keys, strict=True)]


def _is_override(text: str) -> bool:
    """Tell key=value, which a list option swallows, from a dataset string."""
    return "=" in text and ":" not in text.partition("=")[0]


def _choose(num_images: int, sample: int | None) -> np.ndarray:
    """Indices to decode, rising."""
    if sample is None or sample >= num_images:
        return np.arange(num_images)
    return np.sort(shuffled(num_images, _SAMPLE_SEED)[:sample])


def _judge_batch(cfg: Config, *, num_images: int) -> Findings:
    """Tell whether there are enough images for one batch of one process."""
    try:
        plan_stages(cfg, dataset_size=num_images, world_size=1)
    except Dinov2Error as error:
        return Findings(problems=[str(error)])
    return Findings()


def _make_folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-dir {name}: cannot be made ({error.strerror}); choose another") from error
    return folder


def _write(report: dict[str, Any], sets: Sequence[CheckedSet], folder: Path) -> None:
    """Write report and picture."""
    try:
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        plot_sets(sets, report["sets"], folder / PICTURE_NAME)
    except PermissionError as error:
        raise ConfigError(f"--output-dir {folder}: cannot be written ({error.strerror}); choose another") from error


def _show(report: dict[str, Any], folder: Path) -> None:
    """Print the tables, and the sentences behind them."""
    for found in report["sets"]:
        print(format_set(found), end="\n\n")
    for found in report["in_common"]:
        print(format_comparison(found), end="\n\n")
    first = report["sets"][0]
    if first["mean"]:
        print(format_augmentation(first["mean"], first["std"]))
    print(f"written: {folder / REPORT_NAME} and {folder / PICTURE_NAME}")
    for text in report["warnings"]:
        print(f"warning: {printable(text)}")
    for text in report["problems"]:
        print(f"error: {printable(text)}", file=sys.stderr)
    if not report["problems"]:
        print(f"nothing here would make training fail ({count(len(report['warnings']), 'warning')})")


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:37]}..."
