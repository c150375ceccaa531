"""Real photographs, small, for tests: parts of the two that come with scikit-learn."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

NAMES = ("china.jpg", "flower.jpg")


@cache
def _whole(name: str) -> np.ndarray:
    return load_sample_image(name)  # [427, 640, 3], uint8


def photo(number: int = 0, *, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Photograph of (width, height) px; each number gives another part of one of the two pictures."""
    rng = np.random.default_rng(number)
    pixels = _whole(NAMES[number % len(NAMES)])
    height = int(rng.integers(200, pixels.shape[0] + 1))
    width = min(pixels.shape[1], height * size[0] // size[1])
    top, left = (int(rng.integers(0, limit + 1)) for limit in (pixels.shape[0] - height, pixels.shape[1] - width))
    return Image.fromarray(pixels[top : top + height, left : left + width]).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """Content of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_photos(
    folder: Path, count: int, *, num_classes: int = 0, size: tuple[int, int] = (64, 48), suffix: str = ".jpg"
) -> list[Path]:
    """Write `count` photographs, in folders class_0, class_1, ... if there are classes, and return their paths."""
    paths = []
    for number in range(count):
        parent = folder / f"class_{number % num_classes}" if num_classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        paths.append(parent / f"photo_{number:04d}{suffix}")
        photo(number, size=size).save(paths[-1])
    return sorted(paths)
