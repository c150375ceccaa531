"""Items of a dataset looked at once, in order, by worker processes, with a progress bar."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dinov2.data.loaders import iterate_and_end_workers, prepare_worker

logger = logging.getLogger(__name__)

_LINE_PERIOD_S = 30


def run_in_workers(
    items: Dataset[Any], indices: np.ndarray, *, batch: int, num_workers: int, description: str
) -> Iterator[list[Any]]:
    """Yield the items of some indices, a batch at a time and in order, and show how far it is.

    Raises:
        DatasetError: a worker was killed.
    """
    loader = DataLoader(
        items,
        batch_sampler=_Batches(indices, batch),
        num_workers=num_workers if len(indices) > batch else 0,
        collate_fn=list,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),
    )
    with (
        closing(iterate_and_end_workers(loader, batch_size_key="data.max_image_pixels")) as batches,
        _Progress(len(indices), description) as progress,
    ):
        for found in batches:
            yield found
            progress.add(len(found))


class _Progress:
    """Show how many images were looked at: a bar on a terminal, elsewhere a log line each half minute."""

    def __init__(self, total: int, description: str) -> None:
        self._total, self._description, self._done = total, description, 0
        self._shown_s = time.monotonic()
        hidden = not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=description, unit=" images", dynamic_ncols=True, leave=False, disable=hidden)

    def add(self, count: int) -> None:
        """Count images that are done."""
        self._done += count
        self._bar.update(count)
        if self._bar.disable and time.monotonic() - self._shown_s > _LINE_PERIOD_S:
            self._shown_s = time.monotonic()
            logger.info("%s done=%d of=%d", self._description, self._done, self._total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class _Batches:
    """Lists of indices, made when they are asked for."""

    def __init__(self, indices: np.ndarray, batch: int) -> None:
        self.indices = indices
        self.batch = batch

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.indices[start : start + self.batch].tolist() for start in range(0, len(self.indices), self.batch))
