"""A dataset class of a user's own that gives images which do not fit together, or are huge, without any file."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2.errors import DatasetError

NAME = "support.odd_images.OddImages"
HUGE = (5000, 4000)  # height and width, px


class HugeImage:
    """Grey image that can be read in parts only; row r has the value r // 25."""

    channels = 1
    height, width = HUGE

    def to_tensor(self, *, reduce: float = 1.0) -> Tensor:
        raise AssertionError("the whole image was read")

    def read_region(self, top: int, left: int, height: int, width: int) -> Tensor:
        assert 0 <= top and top + height <= self.height and 0 <= left and left + width <= self.width
        rows = torch.arange(top, top + height) // 25
        return rows.to(torch.uint8)[None, :, None].expand(1, height, width)


class OddImages:
    """Images that a worker makes.

    Args:
        kinds: names with commas, an image each: `u8`, `u16`, `grey`, `float`, `bad` or `huge`; a number behind a name
            chooses other pixels.
        num_channels: of u8, u16 and float; None: as many as the network takes.
        one_file: all images are said to come from one file.
    """

    def __init__(
        self,
        *,
        kinds: str,
        num_channels: int | None = None,
        one_file: bool = False,
        channels: int = 3,
    ) -> None:
        self.kinds = kinds.split(",")
        self.channels = num_channels or channels
        self.one_file = one_file

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        kind = self.kinds[index]
        name = kind.rstrip("0123456789") if kind not in ("u8", "u16") else kind
        rng = np.random.default_rng(int(kind[len(name) :] or 0))
        if name == "bad":
            raise DatasetError("it is out of order")
        if name == "huge":
            return HugeImage(), None
        values = rng.integers(0, 256, (1 if name == "grey" else self.channels, 20, 24))
        if name == "float":
            return torch.from_numpy(values / 255), None
        return torch.from_numpy((values * 257).astype(np.uint16) if name == "u16" else values.astype(np.uint8)), None

    def path(self, index: int) -> str:
        return "stack.tif" if self.one_file else f"image {index}"
