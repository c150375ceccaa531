"""How many images a second does one core prepare: our worker half, and the parents' recipe on Pillow images?

Both read the same JPEG files from memory and give 2 crops of 224 px and 8 of 96 px, turn by turn. The recipe is
DINOv2's, from torchvision's transforms; `pillow blur` is the same with Pillow's Gaussian blur, which is faster than
torchvision's on a Pillow image. The device half is timed here on one core of the CPU; on a GPU it runs there.

    python benchmarks/augmentation.py --repeats 20
"""

import argparse
import io
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torchvision import transforms

from dinov2.data import DataAugmentationDINO
from dinov2.data.datasets.decoders import EncodedImage
from dinov2.train.host_memory import keep_freed_memory

SIZES = ((375, 500), (1536, 2048))  # height, width, px
NUM_TILES = 4  # down and across in the larger images
GLOBAL_SCALE, LOCAL_SCALE, NUM_LOCAL = (0.32, 1.0), (0.05, 0.32), 8
BASELINE = "parents' recipe"


def make_jpegs(height: int, width: int, *, count: int, quality: int) -> list[bytes]:
    """Photographs from scikit-learn's two, each another part, brightness and side; large ones are mosaics of parts."""
    rng = np.random.default_rng(0)
    photos = load_sample_images().images  # two of [427, 640, 3], uint8
    tiles = 1 if height <= photos[0].shape[0] else NUM_TILES
    tile_height, tile_width = height // tiles, width // tiles

    def part() -> np.ndarray:
        photo = photos[rng.integers(len(photos))]
        top = rng.integers(photo.shape[0] - tile_height + 1)
        left = rng.integers(photo.shape[1] - tile_width + 1)
        pixels = photo[top : top + tile_height, left : left + tile_width, :] * rng.uniform(0.7, 1.0)
        return pixels[:, :: rng.choice([-1, 1])].astype(np.uint8)

    files = []
    for _ in range(count):
        mosaic = np.concatenate([np.concatenate([part() for _ in range(tiles)], axis=1) for _ in range(tiles)])
        file = io.BytesIO()
        Image.fromarray(mosaic).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


class PillowBlur:
    """Pillow's Gaussian blur of a random radius."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def parents_recipe(blur: Callable[[Image.Image], Image.Image]) -> Callable[[bytes], list[torch.Tensor]]:
    """DINOv2's augmentation as torchvision transforms of a Pillow image, with decoding."""
    jitter = [
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        transforms.RandomGrayscale(0.2),
    ]
    finish = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]

    def crop(size: int, scale: tuple[float, float], *changes: Any) -> transforms.Compose:
        bicubic = transforms.InterpolationMode.BICUBIC
        cut = transforms.RandomResizedCrop(size, scale=scale, interpolation=bicubic)
        return transforms.Compose([cut, transforms.RandomHorizontalFlip(), *jitter, *changes, *finish])

    def maybe_blur(probability: float) -> transforms.RandomApply:
        return transforms.RandomApply([blur], p=probability)

    first = crop(224, GLOBAL_SCALE, maybe_blur(1.0))
    second = crop(224, GLOBAL_SCALE, maybe_blur(0.1), transforms.RandomSolarize(128, p=0.2))
    local = crop(96, LOCAL_SCALE, maybe_blur(0.5))

    def prepare(data: bytes) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [first(image), second(image), *(local(image) for _ in range(NUM_LOCAL))]

    return prepare


def make_variants(files: list[bytes]) -> dict[str, Callable[[], Any]]:
    """What is timed, each over all files; the crops of our worker half change from call to call."""
    augmentation = DataAugmentationDINO(GLOBAL_SCALE, LOCAL_SCALE, NUM_LOCAL)
    seeds = iter(range(10**9))
    recipe = parents_recipe(transforms.GaussianBlur(9, sigma=(0.1, 2.0)))
    faster_recipe = parents_recipe(PillowBlur())
    batch = augmentation.stack([augmentation.crop(EncodedImage(data), next(seeds)) for data in files])

    def finish() -> dict[str, Any]:
        first = next(seeds) * len(files)
        return augmentation.finish(batch, torch.arange(first, first + len(files)))

    return {
        BASELINE: lambda: [recipe(data) for data in files],
        "the same, pillow blur": lambda: [faster_recipe(data) for data in files],
        "worker half": lambda: [augmentation.crop(EncodedImage(data), next(seeds)) for data in files],
        "decoding alone": lambda: [EncodedImage(data).to_tensor() for data in files],
        "device half, CPU": finish,
    }


def measure(files: list[bytes], *, repeats: int) -> dict[str, dict[str, float]]:
    """Time all variants turn by turn, and compare each with the baseline of the same turn."""
    variants = make_variants(files)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            started = time.perf_counter()
            run()
            if turn:  # the first one warms up
                times[name].append((time.perf_counter() - started) / len(files))
    rows = {}
    for name, values in times.items():
        ratios = [base / value for base, value in zip(times[BASELINE], values, strict=True)]
        first, _, third = statistics.quantiles(values)
        rows[name] = {
            "images_per_s": 1 / statistics.median(values),
            "ms_per_image": 1000 * statistics.median(values),
            "quartile_1_ms": 1000 * first,
            "quartile_3_ms": 1000 * third,
            "speed_ratio": statistics.median(ratios),
            "min_speed_ratio": min(ratios),
        }
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--images", type=int, default=8, help="JPEG files of each size")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG files")
    parser.add_argument("--default-allocator", action="store_true", help="without keep_freed_memory()")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.default_allocator:
        keep_freed_memory()  # as the training program does, whose workers inherit it
    result: dict[str, Any] = {
        **vars(args),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    for height, width in SIZES:
        files = make_jpegs(height, width, count=args.images, quality=args.quality)
        kib = statistics.median(len(data) for data in files) / 1024
        rows = measure(files, repeats=args.repeats)
        print(f"\n{height} x {width} px, JPEG quality {args.quality}, {kib:.0f} KiB (median)")
        print(f"{'':24}{'images/s':>10}{'ms/image':>10}{'quartiles':>16}{'speed':>8}{'min':>7}")
        for name, row in rows.items():
            quartiles = f"{row['quartile_1_ms']:.2f}-{row['quartile_3_ms']:.2f}"
            print(
                f"{name:24}{row['images_per_s']:10.1f}{row['ms_per_image']:10.2f}{quartiles:>16}"
                f"{row['speed_ratio']:7.1f}x{row['min_speed_ratio']:6.1f}x"
            )
        result[f"{height}x{width}"] = {"kib": kib} | rows
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
