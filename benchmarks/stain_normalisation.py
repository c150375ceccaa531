"""How long does Reinhard's stain normalisation of a histology tile take here, and by scikit-image's conversions?

Both take uint8 RGB and give uint8 RGB in CIE L*a*b*, turn by turn, on one core. scikit-image's way has no weights for
the background: rgb2lab, mean and standard deviation, shift and stretch, lab2rgb; in float64, its own result for uint8
input, and in float32. Needs scikit-image, which nothing else here does: pip install scikit-image

    python benchmarks/stain_normalisation.py --repeats 30
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from dinov2.data.stain import TARGET_MEANS_LAB, TARGET_STDS_LAB, reinhard

SIZES_PX = (224, 512, 1024)
BASELINE = "scikit-image"
OURS = "dinov2.data.stain"


def make_tile(size_px: int) -> np.ndarray:
    """A photograph in the colours of haematoxylin and eosin, a quarter of it white glass, [H, W, 3] uint8."""
    grey = Image.fromarray(load_sample_image("flower.jpg")).convert("L").resize((size_px, size_px))
    shades = np.asarray(grey, dtype=np.float64)[..., None] / 255
    noise = np.random.default_rng(0).normal(0, 3, (size_px, size_px, 3))
    tile = np.array([90, 40, 110]) + shades * np.array([150, 170, 130]) + noise
    tile[: size_px // 2, : size_px // 2] = 245
    return tile.round().clip(0, 255).astype(np.uint8)


def by_scikit_image(dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    """Reinhard's normalisation through rgb2lab and lab2rgb."""
    try:
        from skimage.color import lab2rgb, rgb2lab
    except ImportError as error:
        sys.exit(f"this benchmark compares with scikit-image ({error}); install it: pip install scikit-image")

    def normalise(pixels: np.ndarray) -> np.ndarray:
        lab = rgb2lab((pixels / 255).astype(dtype))
        mean, std = lab.mean((0, 1)), lab.std((0, 1))
        gain = (np.array(TARGET_STDS_LAB) / std).astype(dtype)
        rgb = lab2rgb((lab - mean) * gain + np.array(TARGET_MEANS_LAB, dtype=dtype))
        return np.round(rgb * 255).astype(np.uint8)

    return normalise


def measure(tile: np.ndarray, *, repeats: int) -> dict[str, dict[str, float]]:
    """Time the variants turn by turn."""
    variants = {BASELINE: by_scikit_image(np.float64), "in float32": by_scikit_image(np.float32), OURS: reinhard}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 2):
        for name, normalise in variants.items():
            started = time.perf_counter()
            normalise(tile)
            if turn >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - started)
    rows = {}
    for name, values in times.items():
        ratios = [base / value for base, value in zip(times[BASELINE], values, strict=True)]
        first, _, third = statistics.quantiles(values)
        rows[name] = {
            "ms": 1000 * statistics.median(values),
            "quartile_1_ms": 1000 * first,
            "quartile_3_ms": 1000 * third,
            "speed_ratio": statistics.median(ratios),
            "min_speed_ratio": min(ratios),
        }
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="skimage")  # colours outside sRGB, which both clip
    result: dict[str, Any] = {"repeats": args.repeats, "load_before": os.getloadavg()[0]}
    for size_px in SIZES_PX:
        rows = measure(make_tile(size_px), repeats=args.repeats)
        print(f"\n{size_px} x {size_px} px")
        print(f"{'':20}{'ms':>9}{'quartiles':>18}{'speed':>8}{'min':>7}")
        for name, row in rows.items():
            quartiles = f"{row['quartile_1_ms']:.2f}-{row['quartile_3_ms']:.2f}"
            print(f"{name:20}{row['ms']:9.2f}{quartiles:>18}{row['speed_ratio']:7.1f}x{row['min_speed_ratio']:6.1f}x")
        result[f"{size_px}px"] = rows
    import skimage

    result |= {
        "skimage": skimage.__version__,
        "numpy": np.__version__,
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "load_after": os.getloadavg()[0],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
