"""`SlowDigits`: the digits, read slowly as long as a file is there, so that a test can catch a training in the middle.

Dataset string: `support.slow_digits.SlowDigits:split=TRAIN:while_there=FILE`, with tests/ in PYTHONPATH.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_adapters.digits import Digits

SLOW_S = 0.35  # for one image


class SlowDigits(Digits):
    """The same images and labels, whether they come slowly or not."""

    def __init__(
        self,
        *,
        while_there: str,
        split: str = "ALL",
        channels: int = 3,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(split=split, channels=channels, transform=transform)
        self._file = Path(while_there)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self._file.exists():
            time.sleep(SLOW_S)
        return super().__getitem__(index)
