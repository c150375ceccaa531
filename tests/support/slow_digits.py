"""`SlowDigits`: the digits, read slowly as long as a file says so, so that a test can catch a training in the middle.

Dataset string: `support.slow_digits.SlowDigits:split=TRAIN:slow=FILE`, with tests/ in PYTHONPATH; the file holds the
seconds for one image, and may come and go.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_adapters.digits import Digits


class SlowDigits(Digits):
    """The same images and labels, whether they come slowly or not."""

    def __init__(
        self,
        *,
        slow: str,
        split: str = "ALL",
        channels: int = 3,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(split=split, channels=channels, transform=transform)
        self._file = Path(slow)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(self._file.read_text()))
        return super().__getitem__(index)
