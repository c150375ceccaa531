"""`Digits`: 1797 scanned handwritten digits, 8 x 8 px, that come with scikit-learn; no download.

Dataset string: `Digits:split=TRAIN`. Source: E. Alpaydin, C. Kaynak, UCI repository 1998; images stand in the order of
their writers, so train (the first two thirds) and val (the rest) have different writers, but for one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

from dinov2.data.datasets.decoders import pillow_mode
from dinov2.errors import ConfigError

_FULL_SCALE = 16  # largest pixel value in the source


class Digits(Dataset[tuple[Any, int]]):
    """Handwritten digits 0 to 9 as grey Pillow images, or RGB ones with three equal channels.

    Args:
        split: TRAIN, VAL or ALL, in any case.
        channels: 1 or 3.
        transform: called with the image of an item.

    Raises:
        ConfigError: the split or the number of channels is wrong.
    """

    def __init__(self, *, split: str = "ALL", channels: int = 3, transform: Callable[[Any], Any] | None = None) -> None:
        self._mode = pillow_mode(channels)
        digits = load_digits()
        boundary, end = len(digits.target) * 2 // 3, len(digits.target)
        spans = {"TRAIN": (0, boundary), "VAL": (boundary, end), "ALL": (0, end)}
        if split.upper() not in spans:
            raise ConfigError(f"dataset Digits: split={split} must be one of {', '.join(spans)}")
        self._first, last = spans[split.upper()]
        pixels = digits.images[self._first : last]  # [n, 8, 8], 0 .. 16
        self._images = np.round(pixels * (255 / _FULL_SCALE)).astype(np.uint8)
        self._targets = digits.target[self._first : last].astype(np.int64)
        self.transform = transform

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self._images[index]).convert(self._mode)
        return (image if self.transform is None else self.transform(image)), int(self._targets[index])

    def path(self, index: int) -> str:
        """Number of the digit in scikit-learn's set."""
        return f"digit {self._first + index}"

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0 .. 9."""
        return [str(digit) for digit in range(10)]

    def get_targets(self) -> np.ndarray:
        """Labels of all images, int64."""
        return self._targets

    def metadata(self) -> dict[str, np.ndarray]:
        """Columns that describe each image, by name."""
        return {"path": np.array([self.path(index) for index in range(len(self))]), "target": self._targets}
